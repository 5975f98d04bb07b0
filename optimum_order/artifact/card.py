"""The model card: what a person on the Hub has to know, made from the manifest alone."""

from __future__ import annotations

import hashlib
import io
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from optimum_order import formats
from optimum_order.artifact import adapter
from optimum_order.artifact.manifest import PLOT
from optimum_order.data.splits import SHORTCUTS
from optimum_order.data.text import LITERATURE
from optimum_order.errors import missing_extra
from optimum_order.files import size
from optimum_order.formats import engines
from optimum_order.models.source import EMBEDDED

Manifest = Mapping[str, Any]

FILE = "README.md"
_TEMPLATE = Path(__file__).with_name("card.md")
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModel": "feature-extraction",
}
_OURS = {"base_model", "base_model_relation", "library_name", "pipeline_tag", "tags", "model-index"}
_PLOT_WIDTH = 4.2  # inches
_MOST_KINDS = 10
_MANY_BLOCKS = 16
_LONGEST_TITLE = 44
_LETTERS_IN_AN_INCH = 14
# Colors of Okabe and Ito, which the color-blind can tell apart, then three that are far from those.
_COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222"),
    *("#8C564B", "#7F7F7F", "#9467BD"),
)
_MARKERS = "osD^vP*Xhd"
_WIDEST_DIAGRAM = 46
"""Letters that a telephone shows in a line of a card."""
_ARROW = ("   ", " → ", "   ", "   ")
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": "#666666",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.parse_math": False,
}


def check() -> None:
    """Check that a card can be made here.

    Raises:
        OptimumOrderError: If the packages of the extra `hub` are not installed.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing_extra("hub", error) from error


def local(manifest: Manifest, folder: Path, auto: type) -> str:
    """Return the card of an artifact that is on no Hub yet, without its picture.

    Its last line is a digest of the text, by which `is_untouched` tells that nobody has edited it.

    Args:
        manifest: The manifest of the artifact.
        folder: Where the artifact will be.
        auto: The transformers auto class that loads it.
    """
    text = str(make(manifest, folder.name, auto, on_hub=False))
    return f"{text.rstrip()}\n\n{_seal(text.rstrip())}\n"


def is_untouched(text: str) -> bool:
    """Return whether a card is as `local` wrote it.

    Args:
        text: Of the card, by anybody.
    """
    body, _, seal = text.rstrip().rpartition("\n\n")
    return seal == _seal(body)


def _seal(text: str) -> str:
    return f"<!-- optimum-order {hashlib.sha256(text.encode()).hexdigest()} -->"


def make(
    manifest: Manifest,
    repo_id: str,
    auto: type,
    *,
    on_hub: bool = True,
    revision: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Make the card of an artifact.

    Args:
        manifest: The manifest of the artifact.
        repo_id: Where it will be.
        auto: The transformers auto class that loads it.
        on_hub: Whether that is on the Hub, with the picture beside the card; or else a folder.
        revision: The branch it will be on, if that is not the main one.
        metadata: Metadata of the card that is on the Hub now: what people added, such as a license,
            stays.

    Raises:
        OptimumOrderError: If the packages of the extra `hub` are not installed.
        KeyError: If the manifest lacks something.
    """
    if on_hub:
        check()
    task = _TASKS.get(auto.__name__)
    title = repo_id.rpartition("/")[2]
    data = _metadata(manifest, title, task)
    for key in set(metadata or {}) - _OURS:
        data[key] = (metadata or {})[key]
    codec = formats.available()[manifest["format"]]
    adapted = bool(adapter.named(manifest))
    packages = (*codec.packages, *([adapter.PACKAGE] if adapted else []))
    arguments = f'"{task}", model="{repo_id}"'
    if revision:
        arguments += f', revision="{revision}"'
    if codec.gguf_file:
        arguments += f', model_kwargs={{"gguf_file": "{codec.gguf_file}"}}'
    base = manifest["base_model"]["id"]
    private_base = None if _on_hub(manifest["base_model"]) or base in EMBEDDED else base
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        title=title,
        repo_id=repo_id,
        task=task,
        format=codec,
        packages=("transformers", "torch", *map(shlex.quote, packages)),
        auto=auto.__name__,
        adapter=adapter.FOLDER if adapted else None,
        at_revision=f', revision="{revision}"' if revision else "",
        arguments=arguments,
        base=_base(manifest["base_model"]),
        diagram=diagram(manifest),
        figures=_figures(manifest),
        llama_arguments=_llama_arguments(repo_id, codec, on_hub=on_hub),
        serving=_serving(manifest, repo_id, codec, on_hub) if task == "text-generation" else [],
        stages=_stages(manifest),
        plot=PLOT if on_hub else None,
        command=command(manifest),
        private_base=private_base,
        private_data=_private_data(manifest),
        versions=", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        **_speed(manifest),
    )
    return card


# The head of the card


def _metadata(manifest: Manifest, title: str, task: str | None) -> ModelCardData:
    """Return the metadata of the card.

    Args:
        manifest: The manifest of the artifact.
        title: Name of the model.
        task: Its task on the Hub, if it has one.
    """
    base = manifest["base_model"]
    quantized = any(layer["bits"] < 16 for layer in manifest["layers"].values())
    results = [_result(both["after"], task or "other") for both in manifest["metrics"].values()]
    return ModelCardData(
        base_model=base["id"] if _on_hub(base) else None,
        # "quantized" is the nearest of the Hub's relations for a model that is pruned as well, but
        # not for one that is only pruned; there is none for that.
        base_model_relation="quantized" if quantized and _on_hub(base) else None,
        license=base.get("license"),
        license_name=base.get("license_name"),
        language=base.get("language"),
        library_name="transformers",
        pipeline_tag=task,
        tags=[
            "optimum-order",
            *(["quantization"] if quantized else []),
            *(["pruning"] if manifest["sparsity"] or manifest.get("smaller") else []),
            *dict.fromkeys(stage["method"] for stage in manifest["stages"]),
        ],
        model_name=title,
        eval_results=results or None,
    )


def _on_hub(base: Mapping[str, Any]) -> bool:
    """Return whether the base model's name is an id on the Hub.

    It is if it has a namespace, or was read at a commit.
    """
    commit = re.fullmatch(r"[0-9a-f]{40}", base["revision"] or "")
    return bool(commit or re.fullmatch(r"[\w.-]+/[\w.-]+", base["id"], re.ASCII))


def _result(measurement: Mapping[str, Any], task: str) -> EvalResult:
    """Return a measurement as the Hub shows it.

    Args:
        measurement: One of the manifest.
        task: The task of the model on the Hub.
    """
    source = measurement["source"]
    dataset, config, split = [*source.split(":"), "", ""][:3]
    public = is_public(source)
    return EvalResult(
        task_type=task,
        dataset_type=dataset if public else "local",
        dataset_name=source,
        dataset_config=config or None if public else None,
        dataset_split=split or None if public else None,
        metric_type=measurement["name"],
        metric_value=measurement["value"],
    )


def is_public(source: str) -> bool:
    """Return whether others know data by this name: a shortcut, or a dataset with a namespace."""
    if source in ("builtin", LITERATURE) or source.partition(":")[0] in SHORTCUTS:
        return True
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(:[^/]*)*", source, re.ASCII))


def _llama_arguments(repo_id: str, codec: type[formats.Codec], *, on_hub: bool) -> str:
    """Return the arguments that name the model to the tools of llama.cpp."""
    return f"-hf {repo_id}" if on_hub else f"-m {shlex.quote(f'{repo_id}/{codec.gguf_file}')}"


def _serving(
    manifest: Manifest, repo_id: str, codec: type[formats.Codec], on_hub: bool
) -> list[tuple[str, str]]:
    """Return for each engine how it serves the model, or that it does not.

    Args:
        manifest: The manifest of the artifact.
        repo_id: Where the model will be.
        codec: Its format.
        on_hub: Whether that is on the Hub.
    """
    if adapter.named(manifest):
        return [("transformers", "the code above: an engine must add the adapter, as PEFT does.")]
    vllm = engines.engine("vllm")
    text = f"was not seen to load these layers as `{codec.name}`: tried was {vllm.title}."
    if all(map(vllm.loads, _cases(manifest))):
        text = f"`vllm serve {repo_id}`. {vllm.title} was seen to load such layers."
    rows = [("vLLM", text)]
    text = (
        f"reads GGUF. `optimum-order convert {repo_id} OUTPUT --format gguf` writes such a file "
        "with the same values, where GGUF can hold them."
    )
    if codec.gguf_file:
        text = (
            f"`llama-server {_llama_arguments(repo_id, codec, on_hub=on_hub)}`, or the code above."
        )
    rows.append(("llama.cpp", text))
    text = "`transformers serve`, or the code above."
    if codec.import_first:
        return [("transformers", f"the code above; it alone imports `{codec.import_first}`.")]
    return [*rows, ("transformers", text)]


def _cases(manifest: Manifest) -> list[engines.Case]:
    """Return all that an engine must have been seen to load, as far as a manifest tells."""
    layers = manifest["layers"].values()
    name = manifest["format"]
    widths = {
        (layer["bits"], layer["group_size"], layer.get("inputs", ""))
        for layer in layers
        if layer["bits"] < 16
    }
    if name == "dense" or not widths:
        return [engines.Case(name)]
    signs = (True, False) if name == "gptq" else (True,)
    cases = [
        engines.Case(name, "", bits, group or -1, symmetric, inputs)
        for bits, group, inputs in sorted(widths, key=str)
        for symmetric in signs
    ]
    if len({(bits, inputs) for bits, _, inputs in widths}) > 1:
        cases.append(engines.Case(name, engines.SEVERAL))
    elif len(widths) > 1:
        cases.append(engines.Case(name, engines.SEVERAL_GROUPS))
    return cases


def _base(base: Mapping[str, Any]) -> str:
    name = f"`{base['id']}`"
    if _on_hub(base):
        name = f"[{base['id']}](https://huggingface.co/{base['id']})"
    if base["id"] in EMBEDDED:
        name += ", the small model that comes with optimum-order,"
    if "adapter" in base:
        name += f" with the LoRA adapter `{base['adapter']['id']}` merged into it"
    return name


def diagram(manifest: Manifest) -> str:
    """Draw the order as boxes and arrows, in plain text."""
    bytes_ = manifest["bytes"]
    boxes = [(manifest["base_model"]["id"], size(bytes_["before"]) if bytes_["before"] else "")]
    boxes += [
        (stage["stage"], "" if errors is None else f"error {errors.mean:.2g}")
        for stage, errors in zip(manifest["stages"], _errors(manifest), strict=True)
    ]
    boxes += [(manifest["format"], size(bytes_["after"]))]
    lines: list[str] = []
    for box in boxes:
        width = max(map(len, box))
        drawn = [
            f"┌{'─' * (width + 2)}┐",
            *(f"│ {text:<{width}} │" for text in box),
            f"└{'─' * (width + 2)}┘",
        ]
        if not lines:
            lines = drawn
            continue
        with_arrow = [f"{arrow}{part}" for arrow, part in zip(_ARROW, drawn, strict=True)]
        if len(lines[-4]) + len(with_arrow[0]) > _WIDEST_DIAGRAM:
            lines += with_arrow
        else:
            lines[-4:] = [line + part for line, part in zip(lines[-4:], with_arrow, strict=True)]
    return "\n".join(lines)


def _figures(manifest: Manifest) -> list[tuple[str, str, str]]:
    """Return what was measured before and after, as rows of a table."""
    bytes_ = manifest["bytes"]
    rows = []
    for both in manifest["metrics"].values():
        before = both["before"]
        after = both["after"]
        unit = "tokens" if "tokens" in after else "samples"
        name = f"{after['name']} on {_code(after['source'])} ({after[unit]:,} {unit})"
        original = f"{before['value']:.4g}" if before else "not measured"
        rows.append((name, original, f"**{after['value']:.4g}**"))
    original = size(bytes_["before"]) if bytes_["before"] else "not known"
    bits = f"{bytes_['per_weight_bits']:.2f}"
    return [
        *rows,
        ("weights on disk", original, size(bytes_["after"])),
        *([("of these, the adapter", "", size(bytes_["adapter"]))] if "adapter" in bytes_ else []),
        ("bits per compressed weight, scales included", "", bits),
        ("compressed weights that are removed", "", f"{manifest['sparsity']:.1%}"),
    ]


# Stages


@dataclass(frozen=True)
class _Errors:
    """The errors that one stage added.

    Args:
        mean: The mean over the layers that it treated.
        largest: The largest.
        worst: The layer with the largest.
        kinds: What they are errors of.
    """

    mean: float
    largest: float
    worst: str
    kinds: str


def _records(manifest: Manifest, layer: Mapping[str, Any]) -> list[Mapping[str, Any] | None]:
    """Return what each stage of the order did to a layer; None where it left the layer alone.

    Args:
        manifest: The manifest.
        layer: One of its layers. The record of an allocator names the stage that it chose.
    """
    texts = [stage["stage"] for stage in manifest["stages"]]
    records = list(layer["stages"])
    if len(records) == len(texts):
        return records
    aligned: list[Mapping[str, Any] | None] = []
    for text in texts:
        treated = bool(records) and (
            records[0]["stage"] == text or records[0]["stage"] not in texts
        )
        aligned.append(records.pop(0) if treated else None)
    return aligned


def _errors(manifest: Manifest) -> list[_Errors | None]:
    """Return the errors of each stage; None of a stage that changes no layer, such as depth."""
    stages: list[_Errors | None] = []
    aligned = {name: _records(manifest, layer) for name, layer in manifest["layers"].items()}
    for index in range(len(manifest["stages"])):
        records = {name: mine[index] for name, mine in aligned.items()}
        treated = {name: record for name, record in records.items() if record is not None}
        if not treated:
            stages.append(None)
            continue
        errors = {name: float(record["relative_error"]) for name, record in treated.items()}
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        kinds = "/".join(sorted({record["measured_on"] for record in treated.values()}))
        stages.append(_Errors(mean, errors[worst], worst, kinds))
    return stages


def _stages(manifest: Manifest) -> list[dict[str, Any]]:
    """Return what each stage did, as rows of a table."""
    rows = []
    for errors, stage in zip(_errors(manifest), manifest["stages"], strict=True):
        row = {
            "code": _code(stage["stage"]),
            "summary": _cell(stage.get("summary", "")),
            "errors": errors,
        }
        rows.append(row if errors is None else row | {"worst": _code(errors.worst)})
    return rows


# Speed, and how it was made


def _speed(manifest: Manifest) -> dict[str, Any]:
    """Return what decides which gains in time and memory can be expected."""
    layers = list(manifest["layers"].values())
    weights = [layer["shape"][0] * layer["shape"][1] for layer in layers]
    total = sum(layer["bits"] * count for layer, count in zip(layers, weights, strict=True))
    bits = total / sum(weights)
    patterns = {layer["pattern"] for layer in layers}
    saved = (
        f"In the `{manifest['format']}` format each still takes as many bits as any other weight"
    )
    if manifest["bytes"]["per_weight_bits"] < bits:
        saved = "On disk they are left out"
    return {
        "sparsity": manifest["sparsity"],
        "patterns": [] if None in patterns else sorted(patterns),
        "saved": saved,
        "same_bytes": bool(manifest["sparsity"])
        and not manifest.get("smaller")
        and formats.available()[manifest["format"]].stock,
        "bytes": size(manifest["bytes"]["after"]),
        "quantized": bits < 16,
    }


def command(manifest: Manifest) -> str:
    """Return the command that makes the artifact again; OUTPUT stands for a folder."""
    base = manifest["base_model"]
    calibration = manifest["calibration"]
    metrics = list(manifest["metrics"].values())
    options: list[tuple[str, ...]] = []
    model = base.get("adapter", base)
    if "adapter" in base:
        options += [("--merge-adapter",), ("--base", base["id"])]
    if model["revision"]:
        options.append(("--revision", model["revision"]))
    options.append(("--order", manifest["order"]))
    options.append(("--format", manifest["format"]))
    options.append(("--schedule", manifest["schedule"]))
    if "pause" in manifest:  # 0.1.0 had no choice
        options.append(("--pause", manifest["pause"]))
    if calibration:
        options.append(("--calibration", calibration["source"]))
        options.append(("--calibration-samples", str(calibration["samples"])))
        options.append(("--seed", str(manifest["seed"])))
    # What "auto" chooses depends on the processor; an older manifest does not say what it was.
    if calibration and calibration.get("dtype"):
        options.append(("--calibration-dtype", calibration["dtype"]))
    texts = [calibration or {}, *(both["after"] for both in metrics)]
    if any("tokens" in text for text in texts):
        options.append(("--sequence-length", str(manifest["sequence_length"])))
    options.append(("--dtype", base["dtype"]))
    options += [(f"--{name}", *manifest[name]) for name in ("targets", "ignore") if manifest[name]]
    for both in metrics[:1]:
        after = both["after"]
        options.append(("--evaluate", after["source"]))
        options.append(("--metric", after["name"]))
    lines = [("optimum-order", "compress", model["id"], "OUTPUT"), *options]
    return " \\\n    ".join(map(shlex.join, lines))


def _private_data(manifest: Manifest) -> list[str]:
    """Return the names of data that nobody but the author knows."""
    calibration = manifest["calibration"]
    sources = [calibration["source"]] if calibration else []
    sources += [both["after"]["source"] for both in manifest["metrics"].values()]
    return [_code(source) for source in dict.fromkeys(sources) if not is_public(source)]


def _cell(text: str) -> str:
    """Return text that stays in its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_cell(text).replace('`', '')}`"


# The plot

_Value = Callable[[Mapping[str, Any]], float]
_Kinds = Mapping[str, list[tuple[int, Mapping[str, Any]]]]
"""The layers of each kind, with the block that they are in."""


@dataclass(frozen=True)
class _Panel:
    """One panel of the plot.

    Args:
        title: Its title.
        value: What it shows of a layer.
        share: Whether that is a share of one.
    """

    title: str
    value: _Value
    share: bool = False


def plot(manifest: Manifest) -> bytes:
    """Draw for every layer the error that each stage added, and the weights removed in the end.

    Along each panel are the blocks of the model, with one line for each kind of layer in a block.
    The background is white and opaque, so that it reads the same on a page that is dark.

    Args:
        manifest: The manifest of the artifact.

    Returns:
        A PNG.

    Raises:
        OptimumOrderError: If the packages of the extra `hub` are not installed.
    """
    check()
    # Imported only where it is needed: without a home it can write to, it complains, and it looks
    # through all fonts.
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    kinds: dict[str, list[tuple[int, Mapping[str, Any]]]] = defaultdict(list)
    for name, layer in manifest["layers"].items():
        block, kind = _place(name)
        kinds[kind].append((block, layer))
    panels = _panels(manifest)
    with mpl.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.05)
        # one below the other: a telephone shows this width at the size of its own letters
        height = 2.2 * len(panels) + 0.7
        figure = Figure((_PLOT_WIDTH, height), 160, facecolor="white", layout=layout)
        axes = figure.subplots(len(panels), 1, squeeze=False).flatten()
        for axis, panel in zip(axes, panels, strict=True):
            _draw(axis, panel, kinds)
        handles, labels = axes[0].get_legend_handles_labels()
        letters = int(_LETTERS_IN_AN_INCH * figure.get_figwidth())
        in_a_row = max(1, letters // (max(map(len, labels)) + 7))
        figure.legend(handles, labels, loc="outside lower center", ncols=in_a_row, frameon=False)
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _draw(axis: Any, panel: _Panel, kinds: _Kinds) -> None:
    """Draw one panel.

    Args:
        axis: Axes of matplotlib.
        panel: What to draw.
        kinds: The layers.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    crowded = max(map(len, kinds.values())) > _MANY_BLOCKS
    by_length = sorted(kinds.items(), key=lambda item: -len(item[1]))[:_MOST_KINDS]
    for number, (kind, layers) in enumerate(by_length):
        blocks = [block for block, _ in layers]
        experts = len(set(blocks)) < len(blocks)  # of which there are many in a block
        axis.plot(
            blocks,
            [panel.value(layer) for _, layer in layers],
            label=kind.rpartition(".")[2] if _last_names_differ(kinds) else kind,
            color=_COLORS[number],
            marker=_MARKERS[number],
            markersize=3 if crowded else 4.5,
            linewidth=0 if experts else 1.4,
        )
    title = panel.title
    if len(title) > _LONGEST_TITLE:
        title = f"{title[:_LONGEST_TITLE]}…"
    axis.set(title=title, xlabel="block")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(color="#e3e3e3", linewidth=0.7)
    axis.set_ylim(*((-0.03, 1.03) if panel.share else (0, None)))
    if panel.share:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def _panels(manifest: Manifest) -> list[_Panel]:
    def error(index: int) -> _Value:
        def value(layer: Mapping[str, Any]) -> float:
            record = _records(manifest, layer)[index]
            return math.nan if record is None else float(record["relative_error"])

        return value

    panels = [
        _Panel(f"error added by {stage['stage']}", error(index))
        for index, (stage, errors) in enumerate(
            zip(manifest["stages"], _errors(manifest), strict=True)
        )
        if errors is not None
    ]
    if manifest["sparsity"]:
        removed: _Value = lambda layer: layer["pruned"] / math.prod(layer["shape"])  # noqa: E731
        panels.append(_Panel("weights removed", removed, share=True))
    if len({layer["bits"] for layer in manifest["layers"].values()}) > 1:
        panels.append(_Panel("bits of a weight", lambda layer: int(layer["bits"])))
    return panels


def _place(name: str) -> tuple[int, str]:
    """Return the block that a layer is in, and its name there.

    `model.layers.3.mlp.up_proj` is in block 3 and called `mlp.up_proj`.
    """
    place = re.match(r".*?\.(\d+)\.(.*)", name)
    if place is None:
        return 0, name
    return int(place[1]), re.sub(r"\.\d+(?=\.|$)", "", place[2])


def _last_names_differ(kinds: Iterable[str]) -> bool:
    names = [kind.rpartition(".")[2] for kind in kinds]
    return len(set(names)) == len(names)
