"""Whether the libraries that the `gptq` format is written for load the values that were measured.

Exports tiny-llama in many settings, and a GPT-2 of random weights; loads each folder with GPTQModel, and with
transformers beside it, on the CPU with GPTQModel's torch kernel; and compares every parameter bit for bit, and the
logits on 4,096 tokens, with those of the dequantised model. Exits with 1 if a parameter differs or a folder does not
load that should.

    python benchmarks/check_gptqmodel.py --env FOLDER

GPTQModel needs a newer torch than this package may have, so both libraries live in a virtual environment of their own,
made in FOLDER unless it is there already, by default in a temporary one that is removed again. Where pip finds only
CUDA builds of torch that takes 6 GB; --torch "torch==VERSION --index-url ADDRESS" installs another one first.
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

LIBRARIES = ("gptqmodel", "transformers")
GRID = "rtn(bits={}, group_size={}, symmetric={})"  # what chose the codes makes no difference to how they are stored
MIXED = "mixed_precision(bits=3.5, widths=[2, 3, 4, 8], quantizer=rtn)"
CASES = [  # order, dtype, further options
    ("gptq(bits=4, group_size=64)", "bfloat16"),
    *((GRID.format(bits, 32, "true"), "bfloat16") for bits in (2, 3)),
    *((GRID.format(bits, 32, "false"), "bfloat16") for bits in (2, 3)),
    *((GRID.format(bits, 128, "true"), "float16") for bits in (2, 3, 4, 8)),
    *((GRID.format(bits, -1, "false"), "float16") for bits in (2, 3, 4, 8)),
    ("wanda(pattern=2:4) > gptq:4", "bfloat16"),
    ("sparsegpt:0.7 > gptq:3", "bfloat16"),
    # what is left of most groups has one sign, and so a zero point at either end
    ("magnitude:0.95 > rtn(bits=2, group_size=16, symmetric=false)", "float16"),
    ("rtn:4", "bfloat16", "--ignore", "*.v_proj", "*.2.mlp.*"),
    (MIXED, "float16"),
    ("rtn(bits=4, group_size=32)", "bfloat16", "gpt2"),
    ("rtn(bits=3, group_size=32, symmetric=false)", "float16", "gpt2"),
]
UNREAD = {("transformers", case) for case in CASES if case[0] == MIXED or case[-1] == "gpt2"}
"""What a library refuses: transformers knows one width for all layers, and stumbles over GPTQModel's Conv1D."""


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.float()


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()


# --- run in the other environment: `python check_gptqmodel.py --load LIBRARY WORK` ---


def load(library: str, folder: Path):
    """The model in a folder, as a library gives it when told nothing but the kernel and the dtype that is stored."""
    if library == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        dtype = getattr(torch, json.loads((folder / "config.json").read_text())["dtype"])
        return GPTQModel.load(
            str(folder), device="cpu", dtype=dtype, backend=BACKEND.GPTQ_TORCH
        ).model
    from transformers import AutoModelForCausalLM, GPTQConfig

    kernel = GPTQConfig(
        bits=4, backend="gptq_torch"
    )  # of this only the kernel is taken, the rest from config.json
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", quantization_config=kernel, output_loading_info=True
    )
    if any(info.values()):
        raise ValueError(f"loaded in part: {info}")
    return model


def load_all(library: str, work: Path) -> None:
    """Beside each folder the parameters and logits that come out of it, or the error."""
    ids = load_file(work / "ids.safetensors")["ids"]
    for folder in sorted(file.parent for file in work.glob("*/config.json")):
        result = work / f"{folder.name}.{library}"
        try:
            model = load(library, folder)
        except Exception as error:  # whatever a library refuses with is what is to be shown
            result.with_suffix(f".{library}.json").write_text(
                json.dumps(f"{type(error).__name__}: {error}")
            )
            continue
        tensors = {"logits": logits_of(model, ids)}
        for name, module in model.named_modules():
            if hasattr(module, "qweight"):
                tensors[f"{name}.weight"] = module.dequantize_weight().T.to(model.dtype)
                if module.bias is not None:
                    tensors[f"{name}.bias"] = module.bias.to(model.dtype)
            else:
                tensors |= {
                    f"{name}.{key}": tensor
                    for key, tensor in module.named_parameters(recurse=False)
                }
        save_file(
            {name: t.detach().clone().contiguous() for name, t in tensors.items()},
            f"{result}.safetensors",
        )


# --- run in ours ---


def environment(folder: Path, requirement: str | None) -> Path:
    """The interpreter of a virtual environment that has GPTQModel."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making an environment in {folder}", flush=True)
        venv.create(folder, with_pip=True)
        for wanted in filter(None, (requirement, "gptqmodel optimum")):
            subprocess.run(
                [python, "-m", "pip", "install", "--quiet", *shlex.split(wanted)], check=True
            )
    return python


def gpt2(folder: Path) -> None:
    """A GPT-2 of random weights, its layers Conv1D with biases, with tiny-llama's tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from optimum_order import JointCompressor

    torch.manual_seed(0)
    sizes = {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, **sizes))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    JointCompressor.from_pretrained("tiny-llama").source.processor.save_pretrained(folder)


def export(number: int, case: tuple, work: Path) -> None:
    """`optimum-order export`, in this process."""
    from optimum_order.cli import main as optimum_order

    order, dtype, *options = case
    if options == ["gpt2"]:
        model, options = str(work / "models" / "gpt2"), []
    else:
        model, options = "tiny-llama", ["--calibration-samples", "4", *options]
    options = ["--order", order, "--dtype", dtype, "--format", "gptq", "--json", *options]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            optimum_order(["export", model, str(work / f"{number:02}"), *options])
        except SystemExit as ended:
            if ended.code:
                raise


def reference(folder: Path, ids: torch.Tensor, work: Path) -> dict[str, torch.Tensor]:
    """The parameters and logits of the model whose weights are what this package decodes from the folder."""
    from transformers.pytorch_utils import Conv1D

    from optimum_order import JointCompressor
    from optimum_order.artifact import manifest
    from optimum_order.artifact.verify import verify
    from optimum_order.formats.safetensors import Safetensors

    if problems := verify(folder):
        raise SystemExit(f"{folder} does not verify: {problems}")
    facts = manifest.load(folder)
    base = facts["base_model"]
    source = "tiny-llama" if base["id"] == "tiny-llama" else work / "models" / base["id"]
    model = JointCompressor.from_pretrained(source, dtype=base["dtype"]).source.load()
    weights = {}
    for name, state in Safetensors().read(
        folder, {name: said["stored"] for name, said in facts["layers"].items()}
    ):
        module = model.get_submodule(name)
        module.weight.data.copy_(state.weight.T if isinstance(module, Conv1D) else state.weight)
        weights[f"{name}.weight"] = state.weight
    return {"logits": logits_of(model, ids), **dict(model.named_parameters()), **weights}


def check(work: Path, python: Path) -> bool:
    """Print the table; whether anything in it is not as it should be."""
    from rich.console import Console
    from rich.table import Table

    from optimum_order import JointCompressor
    from optimum_order.data.text import load as load_text

    (work / "models").mkdir()
    gpt2(work / "models" / "gpt2")
    processor = JointCompressor.from_pretrained("tiny-llama").source.processor
    ids = load_text("builtin", processor, samples=16, length=256, purpose="evaluation").ids
    save_file({"ids": ids}, work / "ids.safetensors")
    for number, case in enumerate(CASES):
        export(number, case, work)
    for library in LIBRARIES:
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [python, __file__, "--load", library, work]
        done = subprocess.run(command, env=offline, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{library}: {done.stderr[-2000:]}")

    names = ("gptqmodel", "transformers", "torch")
    asked = f"from importlib.metadata import version; print(*(f'{{n}} {{version(n)}}' for n in {names}), sep=', ')"
    print(subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout)
    table = Table("order", "dtype", "perplexity")
    for library in LIBRARIES:
        table.add_column(f"{library}:\nequal")
        table.add_column("logits\ndiffer by")
        table.add_column("perplexity")
    failures, refusals = [], []
    for number, case in enumerate(CASES):
        order, dtype, *options = case
        ours = reference(work / f"{number:02}", ids, work)
        row = [" ".join([order, *options]), dtype, f"{perplexity(ours['logits'], ids):.4f}"]
        for library in LIBRARIES:
            if (refusal := work / f"{number:02}.{library}.json").exists():
                refusals.append(f"{library} on {row[0]}: {json.loads(refusal.read_text())[:300]}")
                row += ["does not load", "", ""]
                failures += [(library, row[0])] if (library, case) not in UNREAD else []
                continue
            theirs = load_file(work / f"{number:02}.{library}.safetensors")
            off = [
                name for name in ours if name != "logits" and not same(ours[name], theirs.get(name))
            ]
            failures += [(library, row[0])] if off or (library, case) in UNREAD else []
            row.append(f"{len(ours) - 1 - len(off)} of {len(ours) - 1}")
            row.append(f"{(theirs['logits'] - ours['logits']).abs().max():.4f}")
            row.append(f"{perplexity(theirs['logits'], ids):.4f}")
        table.add_row(*row)
    Console(width=160).print(table)
    print(*refusals, sep="\n")
    print(
        f"{len(CASES)} folders, {len(failures)} not as they should be"
        + (f": {failures}" if failures else ".")
    )
    return bool(failures)


def same(ours: torch.Tensor, theirs: torch.Tensor | None) -> bool:
    return theirs is not None and ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--env", type=Path, help="the folder of the environment, made if missing and kept"
    )
    parser.add_argument("--torch", help="what pip installs first")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load_all(args.load[0], Path(args.load[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        python = environment(args.env or Path(folder) / "env", args.torch)
        work = Path(folder) / "work"
        work.mkdir()
        sys.exit(check(work, python))


if __name__ == "__main__":
    main()
