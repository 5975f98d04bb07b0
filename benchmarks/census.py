"""Which formats load for which architecture: every one that a generic tiny config can build.

Builds each class in transformers' auto mappings from a small config, compresses it (4 bits,
`bitsandbytes:nf4`), saves it in every format, loads it in fresh processes of stock transformers
(with `import optimum_order` where a format needs that) and compares the outputs. Many architectures share
a process, so that starting does not dominate. The result is the data that `--format auto` goes by:

    make census                                        # writes optimum_order/formats/census.json
    python benchmarks/census.py OUT.json --only llama,t5
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

SECONDS = 60
"""Time limit of one architecture in one process, of building and of loading."""
BATCH = 30
"""Architectures in one process."""
MOST_PARAMETERS = 8_000_000
DATA = Path(__file__).parents[1] / "optimum_order" / "formats" / "census.json"
MIXED = "compressed-tensors, several widths"
FOUR = "rtn(bits=4, group_size=-1)"
CASES = {
    "dense": ("dense", (FOUR,)),
    "compressed-tensors": ("compressed-tensors", (FOUR,)),
    MIXED: ("compressed-tensors", (FOUR, "rtn(bits=8, group_size=-1)")),
    "compressed-tensors, inputs": (
        "compressed-tensors",
        ("rtn(bits=8, group_size=-1) > activations:8",),
    ),
    "compressed-tensors, float8": ("compressed-tensors", ("rtn:fp8 > activations:fp8",)),
    "bitsandbytes": ("bitsandbytes", ("bitsandbytes:nf4",)),
    "sparse": ("sparse", (f"magnitude:0.5 > {FOUR}",)),
}
"""By name: the format, and the orders that are dealt to the layers in turn."""

WIDTH, HEADS, LAYERS, VOCABULARY = 64, 4, 2, 128
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        [
            "hidden_size",
            "d_model",
            "n_embd",
            "dim",
            "embed_dim",
            "embedding_size",
            "word_embed_proj_dim",
            "decoder_hidden_size",
            "hidden_dim",
            "encoder_hidden_size",
            "projection_dim",
            "attention_hidden_size",
            "lru_width",
            "out_hidden_size",
            "text_embed_dim",
        ],
        WIDTH,
    ),
    **dict.fromkeys(
        [
            "intermediate_size",
            "ffn_dim",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "d_ff",
            "d_inner",
            "ffn_hidden_size",
            "ffn_hidden_dim",
            "mlp_dim",
            "decoder_intermediate_size",
            "n_inner",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "block_ff_dim",
        ],
        2 * WIDTH,
    ),
    **dict.fromkeys(
        [
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
            "num_encoder_layers",
            "num_decoder_layers",
            "depth",
            "decoder_num_hidden_layers",
            "num_hidden_groups",
            "encoder_num_hidden_layers",
        ],
        LAYERS,
    ),
    **dict.fromkeys(
        [
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "decoder_num_attention_heads",
        ],
        HEADS,
    ),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "attention_head_dim", "v_head_dim"], WIDTH // HEADS),
    **dict.fromkeys(["vocab_size"], VOCABULARY),
    **dict.fromkeys(
        [
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_source_positions",
            "max_target_positions",
            "max_sequence_length",
            "max_seq_len",
        ],
        64,
    ),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(
        ["num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "top_k_experts"], 2
    ),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size"], WIDTH),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"], 16),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"], 1),
    **dict.fromkeys(["image_size"], 32),
    **dict.fromkeys(["patch_size"], 8),
    "hidden_sizes": [32, 64],
    "depths": [1, 1],
    "num_stages": 2,
    "embed_dims": [32, 64],
    "sliding_window": 16,
    "state_size": 16,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "num_labels": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_mel_bins": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "expand": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "window_size": 4,
    "pad_token_ids": 0,
}
VARIANTS: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"head_dim", "sliding_window", "v_head_dim", "attention_head_dim"}),
    frozenset({"hidden_sizes", "depths", "num_stages", "embed_dims", "num_heads"}),
    frozenset({"image_size", "patch_size", "window_size"}),
    frozenset(
        {"num_key_value_heads", "projection_dim", "pad_token_id", "bos_token_id", "eos_token_id"}
    ),
    frozenset(
        {"top_k_experts", "n_group", "topk_group", "hidden_dim", "dim", "max_position_embeddings"}
    ),
)
"""Values that are left at the default, in the order in which it is tried."""


# Building


def shrink(config_class: Any, left: frozenset[str], depth: int = 0) -> Any:
    """Return a small config.

    Args:
        config_class: Class of the config.
        left: Keys that keep their default.
        depth: Of the config in the one of the model.
    """
    default = config_class()
    names = {*vars(default), *inspect.signature(config_class.__init__).parameters}
    names |= set(getattr(config_class, "attribute_map", {}) or {})
    values = {key: value for key, value in SMALL.items() if key in names and key not in left}
    for key, value in list(values.items()):
        current: Any = getattr(default, key, None)
        if current is None and key not in ("pad_token_id", "bos_token_id", "eos_token_id"):
            del values[key]  # it is made of other values
        elif isinstance(current, (list, tuple)) != isinstance(value, list):
            del values[key]
        elif isinstance(value, list) and len(current) != len(value):
            values[key] = (value * len(current))[: len(current)]
    for name in getattr(config_class, "sub_configs", None) or {}:
        current = getattr(default, name, None)
        if current is not None and depth < 3:
            values[name] = shrink(type(current), left, depth + 1)
    return config_class(**values)


def inputs_of(model: Any) -> dict[str, Any]:
    """Return inputs that the model takes: text, else pixels, else sound."""
    import torch

    generator = torch.Generator().manual_seed(0)
    accepted = set(inspect.signature(model.forward).parameters)
    config = model.config
    text = config.get_text_config(decoder=True)
    ids = torch.arange(3, 27).view(2, 12) % (getattr(text, "vocab_size", None) or 64)
    inputs: dict[str, Any] = {}
    name = model.main_input_name
    if name == "input_ids" or "input_ids" in accepted:
        inputs["input_ids"] = ids
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones_like(ids)
    vision = getattr(config, "vision_config", config)
    if "pixel_values" in accepted and ("input_ids" not in inputs or not model.can_generate()):
        size = getattr(vision, "image_size", None) or 32
        size = size if isinstance(size, int) else size[0]
        channels = getattr(vision, "num_channels", 3)
        inputs["pixel_values"] = torch.randn(2, channels, size, size, generator=generator)
    for key in ("input_values", "input_features"):
        if key in accepted and not inputs:
            shape = (
                (2, 4000)
                if key == "input_values"
                else (2, getattr(config, "num_mel_bins", 16), 128)
            )
            inputs[key] = torch.randn(*shape, generator=generator)
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids.clone()
    return inputs


def outputs(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return what a model computes and, if it generates, what it generates.

    Generating comes first: some formats are unpacked by the first forward of the whole model.
    """
    import torch

    results: dict[str, Any] = {}
    torch.manual_seed(0)
    with torch.no_grad():
        if model.can_generate() and "input_ids" in inputs | {model.main_input_name: None}:
            prompt = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
            if model.config.is_encoder_decoder:
                prompt["decoder_start_token_id"] = 1
            generated = model.generate(
                **prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False
            )
            results["generated"] = generated.contiguous()
        torch.manual_seed(0)
        computed = model(**inputs)
    tensors = [value for value in computed.to_tuple() if isinstance(value, torch.Tensor)]
    floating = [value for value in tensors if value.is_floating_point()]
    if floating:
        results["outputs"] = floating[0].float().contiguous()
    return results


@contextlib.contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block when time is up."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"takes more than {seconds} s")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def reason_of(error: BaseException) -> str:
    """Return an error as one short line."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "FormatError":  # without the name of the format and the advice
        return (
            text.removeprefix("Format '").partition("this model. ")[2].partition(" can; ")[0][:160]
        )
    return f"{type(error).__name__}: {text}"[:160]


def make_model(class_name: str) -> Any:
    """Return a tiny model of random weights that runs."""
    import torch
    import transformers

    model_class = getattr(transformers, class_name)
    first: BaseException | None = None
    for left in VARIANTS:
        try:
            config = shrink(model_class.config_class, left)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
            if size > MOST_PARAMETERS:
                raise MemoryError(f"{size} parameters")
            torch.manual_seed(0)
            model = model_class(config).float().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point():
                        parameter.add_(torch.randn_like(parameter), alpha=0.02)
            found = outputs(model, inputs_of(model))
            if "outputs" not in found or not torch.isfinite(found["outputs"]).all():
                raise ValueError("it computes no finite numbers")
            return model
        except TimeoutError:
            raise
        except Exception as error:  # whatever a config may be the cause of
            first = first or error
    raise RuntimeError(f"no tiny config: {reason_of(first or ValueError())}")


def compressed(original: Any, orders: tuple[str, ...], *, everything: bool) -> Any:
    """Return a copy of a model with compressed layers, as formats take it.

    Args:
        original: The model.
        orders: Dealt to the layers in turn; experts get the first.
        everything: Whether each layer is compressed, or those alone that are in no fused parameter
            and whose shape fits the method.
    """
    import copy

    from optimum_order import formats
    from optimum_order.engine.recipe import method
    from optimum_order.layers.state import LayerState
    from optimum_order.models.units import find_units
    from optimum_order.order import Order

    model = copy.deepcopy(original)
    targets = {target.name: target for unit in find_units(model) for target in unit.targets}
    states = {}
    for index, (layer, target) in enumerate(targets.items()):
        expert = target.kind == "expert"
        state = LayerState(target.read())
        rows, inputs = state.weight.shape
        stages = Order.parse(orders[0 if expert else index % len(orders)])
        backends: list[Any] = [method(stage) for stage in stages]
        reasons = [reason for one in backends if (reason := one.check_shape((rows, inputs)))]
        if not everything and (expert or target.rows is not None or reasons):
            continue
        if reasons:
            raise ValueError(f"layer '{layer}': {reasons[0]}")
        for backend in backends:
            if backend.covers(layer, target.kind):
                state = backend.apply(state, where=layer)
        target.put(state)
        states[layer] = state
    return formats.Contents(model, formats.Layers(targets, states))


def build(folder: Path, names: list[str]) -> None:
    """Compress and save these classes in every format, and what they compute."""
    import torch
    from safetensors.torch import save_file

    from optimum_order import formats

    torch.set_num_threads(1)
    for name in names:
        answer: dict[str, str] = {}
        place = folder / name
        place.mkdir(parents=True)
        try:
            with limit(SECONDS):
                original = make_model(name)
        except Exception as error:
            answer["build"] = reason_of(error)
            (place / "build.json").write_text(json.dumps(answer))
            continue
        for case, (format, orders) in CASES.items():
            for everything in (True, False):  # where experts cannot be stored, the rest may
                shutil.rmtree(place / case, ignore_errors=True)
                try:
                    with limit(SECONDS), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        contents = compressed(original, orders, everything=everything)
                        codec = formats.choose(contents, format, unproven=True)
                        variant = codec.variant(contents.layers)
                        if variant != case:
                            raise ValueError(f"its layers are stored as '{variant}'")
                        home = place / case
                        home.mkdir()
                        container = formats.container(codec.name)
                        container.write(contents, codec, home, header={})
                        sample = inputs_of(contents.model)
                        save_file(sample, home / "inputs.sft")
                        save_file(outputs(contents.model, sample), home / "outputs.sft")
                    answer.pop(case, None)
                    break
                except Exception as error:
                    answer.setdefault(case, f"not tried: {reason_of(error)}")
                    shutil.rmtree(place / case, ignore_errors=True)
        (place / "build.json").write_text(json.dumps(answer))


# Loading


def load(folder: Path, cases: list[str]) -> None:
    """Load what `build` saved, compare, and write what differs."""
    import torch
    import transformers
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    for place in sorted(folder.iterdir()):
        for case in cases:
            home = place / case
            if not home.is_dir():
                continue
            try:
                with limit(SECONDS), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model_class = getattr(transformers, place.name)
                    model, info = model_class.from_pretrained(home, output_loading_info=True)
                    if info["missing_keys"]:
                        raise ValueError(f"missing {min(info['missing_keys'])}")
                    if info["mismatched_keys"]:
                        raise ValueError(f"mismatched {min(info['mismatched_keys'])}")
                    wanted = load_file(home / "outputs.sft")
                    actual = outputs(model.eval(), load_file(home / "inputs.sft"))
                    close = 0.2 if case == "bitsandbytes" else 1e-5
                    for key, tensor in wanted.items():
                        if key == "generated" and case == "bitsandbytes":
                            continue  # its kernels round: another token may win
                        if actual[key].shape != tensor.shape:
                            raise ValueError(f"{key} have another shape")
                        error = (actual[key].double() - tensor.double()).norm()
                        if not error <= close * tensor.double().norm():
                            relative = error / tensor.double().norm()
                            raise ValueError(f"{key} differ by {relative:.2g}")
                    verdict = "ok"
            except TimeoutError:
                return  # in the middle of an import, maybe: nothing after it could be trusted
            except Exception as error:
                verdict = reason_of(error)
            (place / f"{case}.json").write_text(json.dumps(verdict))
            shutil.rmtree(home)


# All


def classes(only: list[str] | None) -> list[str]:
    """Return the model classes to try: first one of every architecture, then the others."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    public = set(dir(transformers))  # asking for a class would import its module
    by_type: dict[str, list[str]] = {}
    for task in TASKS:
        for model_type, names in getattr(auto, f"{task}_MAPPING_NAMES", {}).items():
            names = (names,) if isinstance(names, str) else names
            by_type.setdefault(model_type, []).extend(names)
    chosen = {
        model_type: [n for n in dict.fromkeys(names) if n in public]
        for model_type, names in sorted(by_type.items())
        if only is None or model_type in only
    }
    # The ones that most people use come first, for a census that is cut short.
    chosen = {name: chosen[name] for name in (*COMMON, *chosen) if name in chosen}
    longest = max(map(len, chosen.values()))
    ranked = [
        names[rank] for rank in range(longest) for names in chosen.values() if len(names) > rank
    ]
    return list(dict.fromkeys(ranked))


COMMON = [
    "llama",
    "qwen3",
    "qwen2",
    "gemma3",
    "gemma3_text",
    "gemma2",
    "gemma",
    "mistral",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "olmo2",
    "smollm3",
    "granite",
    "llama4_text",
    "deepseek_v3",
    "falcon",
    "bloom",
    "gpt_bigcode",
    "mamba",
    "mamba2",
    "rwkv",
    "nanochat",
    "bert",
    "albert",
    "roberta",
    "distilbert",
    "modernbert",
    "electra",
    "deberta-v2",
    "t5",
    "bart",
    "whisper",
    "clip",
    "siglip",
    "vit",
    "deit",
    "dinov2",
    "swin",
    "convnext",
    "resnet",
    "regnet",
    "wav2vec2",
    "mpnet",
    "xlm-roberta",
    "qwen2_vl",
    "llava",
]
"""Model types that come first."""
TASKS = (
    "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_IMAGE_CLASSIFICATION",
    "MODEL_FOR_MASKED_LM",
    "MODEL",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION",
    "MODEL_FOR_TOKEN_CLASSIFICATION",
    "MODEL_FOR_QUESTION_ANSWERING",
    "MODEL_FOR_CTC",
    "MODEL_FOR_AUDIO_CLASSIFICATION",
)
"""Auto mappings of transformers, the most usual task of an architecture first."""


def run(arguments: list[str], seconds: int) -> None:
    """Run one part in a process of its own; what it had written counts if it dies."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, *arguments],
            timeout=seconds,
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


IMPORT_FIRST = "import sys, optimum_order, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def census(output: Path, only: list[str] | None, minutes: float) -> None:
    """Run all, and write what is known after every batch."""
    import transformers

    from optimum_order import formats

    # A batch of models is gone before the next: the disk holds one.
    begin = time.monotonic()
    known: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    entries = (
        known.get("classes", {}) if known.get("transformers") == transformers.__version__ else {}
    )
    skipped = known.get("not_built", {}) if entries else {}
    todo = [name for name in classes(only) if name not in entries and name not in skipped]
    needs_import = [c for c, (f, _) in CASES.items() if formats.available()[f].import_first]
    stock = [case for case in CASES if case not in needs_import]
    for first in range(0, len(todo), BATCH):
        if time.monotonic() - begin > 60 * minutes:
            break
        names = todo[first : first + BATCH]
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "models"
            script = str(Path(__file__))
            run([script, "build", str(folder), *names], BATCH * SECONDS)
            run([script, "load", str(folder), *stock], BATCH * SECONDS)
            run(["-c", IMPORT_FIRST, script, "load", str(folder), *needs_import], BATCH * SECONDS)
            for name in names:
                place = folder / name
                try:
                    answer = json.loads((place / "build.json").read_text())
                except OSError:
                    skipped[name] = "the process that built it died"
                    continue
                if "build" in answer:
                    skipped[name] = answer["build"]
                    continue
                for case in CASES:
                    file = place / f"{case}.json"
                    if case not in answer and file.exists():
                        answer[case] = json.loads(file.read_text())
                if set(CASES) <= set(answer):  # else it is tried again by the next run
                    entries[name] = {case: answer[case] for case in CASES}
        done = first + len(names)
        print(f"{done}/{len(todo)} classes, {time.monotonic() - begin:.0f} s", flush=True)
        content = {
            "transformers": transformers.__version__,
            "classes": dict(sorted(entries.items())),
            "not_built": dict(sorted(skipped.items())),
        }
        output.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    if sys.argv[1:2] == ["build"]:
        build(Path(sys.argv[2]), sys.argv[3:])
    elif sys.argv[1:2] == ["load"]:
        load(Path(sys.argv[2]), sys.argv[3:])
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("output", type=Path, nargs="?", default=DATA)
        parser.add_argument("--only", help="model types, with commas between them")
        parser.add_argument("--minutes", type=float, default=1e9, help="begin no batch after this")
        args = parser.parse_args()
        census(args.output, args.only and args.only.split(","), args.minutes)


if __name__ == "__main__":
    main()
