"""The model card: what a person on the Hub has to know, made from the manifest alone."""

from __future__ import annotations

import io
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from optimum_order import formats
from optimum_order.artifact.manifest import PLOT
from optimum_order.engine.recipe import available as available_methods
from optimum_order.files import size
from optimum_order.models.source import EMBEDDED

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
_PANELS_IN_A_ROW = 3
_MOST_KINDS = 10
_MANY_BLOCKS = 16
_LONGEST_TITLE = 44
_LETTERS_IN_AN_INCH = 14
# Colours of Okabe and Ito, which the colour-blind can tell apart, then three that are still far from those.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222"),
    *("#8C564B", "#7F7F7F", "#9467BD"),
)
_MARKERS = "osD^vP*Xhd"
_WIDEST_DIAGRAM = 100
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


def make(
    manifest: Mapping[str, Any],
    repo_id: str,
    auto: type,
    *,
    revision: str | None = None,
    kept: Mapping[str, Any] | None = None,
) -> ModelCard:
    """The card of an artifact.

    Args:
        manifest: The artifact's own.
        repo_id: Where it will be.
        auto: The transformers auto class that loads it.
        revision: The branch it will be on, if that is not the main one.
        kept: Metadata of the card that is there now: what people added to it, such as a licence, stays.
    """
    task, base = _TASKS.get(auto.__name__), manifest["base_model"]
    layers = manifest["layers"].values()
    quantised = any(bits < 16 for bits in (layer["bits"] for layer in layers))
    data = ModelCardData(
        base_model=base["id"] if _on_hub(base) else None,
        # "quantized" is the nearest of the Hub's relations for a model that is pruned as well, but not for one that
        # is only pruned; there is none for that.
        base_model_relation="quantized" if quantised and _on_hub(base) else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=[
            "optimum-order",
            *(["quantization"] if quantised else []),
            *(["pruning"] if manifest["sparsity"] else []),
            *dict.fromkeys(stage["method"] for stage in manifest["stages"]),
        ],
        model_name=repo_id.rpartition("/")[2],
        eval_results=[
            _result(both["after"], task or "other") for both in manifest["metrics"].values()
        ]
        or None,
    )
    for key in set(kept or {}) - _OURS:
        data[key] = kept[key]
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        _introduction(manifest),
        f"```text\n{diagram(manifest)}\n```",
        _figures(manifest),
        "## Use it",
        _loading(manifest, repo_id, task, revision),
        "## What each stage did",
        _stages(manifest),
        f"![For every layer, the error that each stage added, and the weights removed in the end]({PLOT})",
        "## What not to expect",
        _speed(manifest),
        "## How it was made",
        _making(manifest),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


# --- the head of the card --------------------------------------------------------------------------------------------


def _on_hub(base: Mapping[str, Any]) -> bool:
    """Whether the base model's name is an id on the Hub: with a namespace, or with the commit it was read at."""
    commit = re.fullmatch(r"[0-9a-f]{40}", base["revision"] or "")
    return bool(commit or re.fullmatch(r"[\w.-]+/[\w.-]+", base["id"], re.ASCII))


def _result(measured: Mapping[str, Any], task: str) -> EvalResult:
    dataset, config, split = [*measured["source"].split(":"), "", ""][:3]
    local = not _named_publicly(measured["source"])
    return EvalResult(
        task_type=task,
        dataset_type="local" if local else dataset,
        dataset_name=measured["source"],
        dataset_config=None if local else config or None,
        dataset_split=None if local else split or None,
        metric_type=measured["name"],
        metric_value=measured["value"],
    )


def _named_publicly(source: str) -> bool:
    """Whether data is known by this name to others too: `builtin`, or a dataset on the Hub with its namespace."""
    return source == "builtin" or bool(re.fullmatch(r"[\w.-]+/[\w.-]+(:[^/]*)*", source, re.ASCII))


def _introduction(manifest: Mapping[str, Any]) -> str:
    base = manifest["base_model"]
    name = (
        f"[{base['id']}](https://huggingface.co/{base['id']})"
        if _on_hub(base)
        else f"`{base['id']}`"
    )
    if base["id"] in EMBEDDED:
        name += ", the small model that comes with optimum-order,"
    return (
        f"{name} after the stages below, first to last, made with optimum-order and stored as `{manifest['format']}`. "
        "The order matters: the same stages in another order give another model."
    )


def diagram(manifest: Mapping[str, Any]) -> str:
    """The order as boxes and arrows, in plain text."""
    bytes_ = manifest["bytes"]
    boxes = [(manifest["base_model"]["id"], size(bytes_["before"]) if bytes_["before"] else "")]
    boxes += [(stage, f"error {mean:.2g}") for stage, mean, *_ in _by_stage(manifest)]
    boxes += [(manifest["format"], size(bytes_["after"]))]
    lines: list[str] = []
    for box in boxes:
        width = max(map(len, box))
        drawn = [
            f"┌{'─' * (width + 2)}┐",
            *(f"│ {text:<{width}} │" for text in box),
            f"└{'─' * (width + 2)}┘",
        ]
        if not lines or len(lines[-4]) + width > _WIDEST_DIAGRAM:
            lines += (
                drawn
                if not lines
                else [f"{arrow}{part}" for arrow, part in zip(_ARROW, drawn, strict=True)]
            )
        else:
            lines[-4:] = [
                f"{line}{arrow}{part}"
                for line, arrow, part in zip(lines[-4:], _ARROW, drawn, strict=True)
            ]
    return "\n".join(lines)


def _figures(manifest: Mapping[str, Any]) -> str:
    bytes_ = manifest["bytes"]
    rows = []
    for both in manifest["metrics"].values():
        before, after = both["before"], both["after"]
        size_ = (
            f"{after['tokens']:,} tokens" if "tokens" in after else f"{after['samples']:,} samples"
        )
        name = f"{after['name']} on {_code(after['source'])} ({size_})"
        rows.append(
            (
                name,
                f"{before['value']:.4g}" if before else "not measured",
                f"**{after['value']:.4g}**",
            )
        )
    rows += [
        (
            "weights on disk",
            size(bytes_["before"]) if bytes_["before"] else "not known",
            size(bytes_["after"]),
        ),
        ("bits per compressed weight, scales included", "", f"{bytes_['per_weight_bits']:.2f}"),
        ("compressed weights that are removed", "", f"{manifest['sparsity']:.1%}"),
    ]
    return _table(("", "before", "after"), rows)


# --- loading ---------------------------------------------------------------------------------------------------------


def _loading(
    manifest: Mapping[str, Any], repo_id: str, task: str | None, revision: str | None
) -> str:
    format = formats.available()[manifest["format"]]
    at = f', revision="{revision}"' if revision else ""
    packages = " ".join(("transformers", "torch", *format.packages))
    code = ["from transformers import pipeline", ""]
    if format.import_first:
        code.insert(0, f"import {format.import_first}  # teaches transformers the format")
    if task == "text-generation":
        code += [f'generate = pipeline("{task}", model="{repo_id}"{at})']
        code += ['print(generate("The quick brown fox", max_new_tokens=20)[0]["generated_text"])']
    else:
        code += [f'model = pipeline("{task}", model="{repo_id}"{at})']
    code_text = "\n".join(code)
    checked = (
        f"The file `optimum_order.json` says what was done to every layer. `optimum-order inspect {repo_id}` shows it, "
        f"and `optimum-order verify {repo_id}` checks that the weights are the ones that were measured."
    )
    return f"With `pip install {packages}`:\n\n```python\n{code_text}\n```\n\n{checked}"


# --- stages ----------------------------------------------------------------------------------------------------------


def _by_stage(manifest: Mapping[str, Any]) -> list[tuple[str, float, str, float, str]]:
    """Of each stage of the order: its text, mean error, the layer of the largest error, that, and what it is of."""
    found = []
    for index, stage in enumerate(manifest["stages"]):
        records = {name: layer["stages"][index] for name, layer in manifest["layers"].items()}
        errors = {name: float(record["relative_error"]) for name, record in records.items()}
        worst = max(errors, key=errors.__getitem__)
        kinds = "/".join(sorted({record["measured_on"] for record in records.values()}))
        found.append(
            (stage["stage"], sum(errors.values()) / len(errors), worst, errors[worst], kinds)
        )
    return found


def _stages(manifest: Mapping[str, Any]) -> str:
    known = available_methods()
    rows = []
    for (text, mean, worst, largest, kinds), stage in zip(
        _by_stage(manifest), manifest["stages"], strict=True
    ):
        method = known.get(stage["method"])
        summary = method.summary if method else ""
        rows.append(
            (_code(text), _cell(summary), f"{mean:.2g}", f"{largest:.2g} in {_code(worst)}", kinds)
        )
    head = ("stage", "what it does", "error added, mean", "largest", "measured on")
    note = (
        "The error is the squared change of a layer's outputs (or of its weighted inputs, or weights, where a method "
        "looks at no more) over their squared size before the stage."
    )
    return f"{_table(head, rows)}\n\n{note}"


# --- speed, and how it was made ---------------------------------------------------------------------------------------


def _speed(manifest: Mapping[str, Any]) -> str:
    layers = list(manifest["layers"].values())
    weights = [layer["shape"][0] * layer["shape"][1] for layer in layers]
    bits = sum(layer["bits"] * count for layer, count in zip(layers, weights, strict=True)) / sum(
        weights
    )
    lines = ["- No speed was measured for this card. What follows is what the formats allow."]
    if manifest["sparsity"]:
        patterns = {layer["pattern"] for layer in layers}
        saved = (
            "On disk they are left out"
            if manifest["bytes"]["per_weight_bits"] < bits
            else f"In the `{manifest['format']}` format each still takes as many bits as any other weight"
        )
        if None in patterns:
            lines.append(
                f"- {manifest['sparsity']:.1%} of the compressed weights are zero, in no pattern that hardware can "
                f"skip: **unstructured sparsity can save bytes, not time**. {saved}; loaded, the matrices are dense "
                "and every zero is multiplied."
            )
        else:
            lines.append(
                f"- {manifest['sparsity']:.1%} of the compressed weights are zero, in the pattern "
                f"{', '.join(sorted(patterns))}. Some GPUs have kernels for 2:4; stock transformers does not use them, "
                f"so here it saves no time. {saved}."
            )
    format = formats.available()[manifest["format"]]
    if bits < 16 and manifest["format"] == "dense":
        lines.append(
            "- Every weight lies on its quantisation grid, but is stored and multiplied as a dense value."
        )
    elif bits < 16 and format.import_first:
        lines.append(
            "- The weights are unpacked while the model loads, and multiplied as dense ones: expect no gain in time, "
            f"and none in memory once it is loaded. No engine computes on the `{format.name}` format itself."
        )
    elif bits < 16 and format.runs_dense and format.stock:
        lines.append(
            "- transformers unpacks the weights before it multiplies them, so expect no gain in time there. An engine "
            "with kernels for packed weights can be faster, at the widths and groups it supports."
        )
    elif bits < 16:
        lines.append(
            "- Quantised layers run on the kernels of the packages above, as fast as those are on your device."
        )
    return "\n".join(lines)


def command(manifest: Mapping[str, Any]) -> str:
    """The command that makes the artifact again; OUTPUT stands for a folder."""
    base, calibration, metrics = (
        manifest["base_model"],
        manifest["calibration"],
        list(manifest["metrics"].values()),
    )
    options: list[tuple[str, ...]] = [("--revision", base["revision"])] if base["revision"] else []
    options += [
        ("--order", manifest["order"]),
        ("--format", manifest["format"]),
        ("--schedule", manifest["schedule"]),
    ]
    if calibration:
        options += [
            ("--calibration", calibration["source"]),
            ("--calibration-samples", str(calibration["samples"])),
        ]
        options += [("--seed", str(manifest["seed"]))]
        # What "auto" chooses depends on the processor; an older manifest does not say what it was.
        options += (
            [("--calibration-dtype", calibration["dtype"])] if calibration.get("dtype") else []
        )
    if any("tokens" in read for read in [calibration or {}, *(both["after"] for both in metrics)]):
        options += [("--sequence-length", str(manifest["sequence_length"]))]
    options += [("--dtype", base["dtype"])]
    options += [(f"--{name}", *manifest[name]) for name in ("targets", "ignore") if manifest[name]]
    for both in metrics[:1]:
        options += [("--evaluate", both["after"]["source"]), ("--metric", both["after"]["name"])]
    return " \\\n    ".join(
        map(shlex.join, [("optimum-order", "export", base["id"], "OUTPUT"), *options])
    )


def _making(manifest: Mapping[str, Any]) -> str:
    base, calibration = manifest["base_model"], manifest["calibration"]
    sources = [calibration["source"]] if calibration else []
    sources += [both["after"]["source"] for both in manifest["metrics"].values()]
    private = [source for source in dict.fromkeys(sources) if not _named_publicly(source)]
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    lines = [f"```bash\n{command(manifest)}\n```"]
    if not _on_hub(base) and base["id"] not in EMBEDDED:
        lines.append(
            f"`{base['id']}` is the name of a model that its author had on disk or in memory."
        )
    if private:
        named = ", ".join(map(_code, private))
        lines.append(
            f"Data by the name its author gave it: {named}. The manifest holds a digest of what was read."
        )
    lines.append(f"Versions: {versions}.")
    return "\n\n".join(lines)


# --- the plot --------------------------------------------------------------------------------------------------------

_Value = Callable[[Mapping[str, Any]], float]


def plot(manifest: Mapping[str, Any]) -> bytes:
    """A PNG: for every layer the error that each stage added, and the weights removed in the end.

    Along each panel are the blocks of the model, with one line for each kind of layer in a block. The background is
    white and opaque, so that it reads the same on a page that is dark.
    """
    # Imported only where it is needed: at home nowhere writable, it complains, and it looks through all fonts.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    kinds: dict[str, list[tuple[int, Mapping[str, Any]]]] = defaultdict(list)
    for name, layer in manifest["layers"].items():
        block, kind = _place(name)
        kinds[kind].append((block, layer))
    panels = _panels(manifest)
    columns = min(len(panels), _PANELS_IN_A_ROW)
    rows = math.ceil(len(panels) / columns)
    crowded = max(map(len, kinds.values())) > _MANY_BLOCKS
    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.05)
        figure = Figure(
            figsize=(3.8 * columns, 2.8 * rows + 0.7), dpi=160, facecolor="white", layout=layout
        )
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, (title, value, share) in zip(axes, panels, strict=False):
            for at, (kind, found) in enumerate(
                sorted(kinds.items(), key=lambda item: -len(item[1]))[:_MOST_KINDS]
            ):
                blocks = [block for block, _ in found]
                axis.plot(
                    blocks,
                    [value(layer) for _, layer in found],
                    label=kind.rpartition(".")[2] if _last_names_differ(kinds) else kind,
                    color=_COLOURS[at],
                    marker=_MARKERS[at],
                    markersize=3 if crowded else 4.5,
                    linewidth=1.4
                    if len(set(blocks)) == len(blocks)
                    else 0,  # of experts there are many in a block
                )
            axis.set(
                title=title if len(title) <= _LONGEST_TITLE else f"{title[:_LONGEST_TITLE]}…",
                xlabel="block",
            )
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(color="#e3e3e3", linewidth=0.7)
            axis.set_ylim(*((-0.03, 1.03) if share else (0, None)))
            if share:
                axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        for axis in axes[len(panels) :]:
            axis.remove()
        handles, labels = axes[0].get_legend_handles_labels()
        wide = max(
            1, int(_LETTERS_IN_AN_INCH * figure.get_figwidth()) // (max(map(len, labels)) + 7)
        )
        figure.legend(handles, labels, loc="outside lower center", ncols=wide, frameon=False)
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _panels(manifest: Mapping[str, Any]) -> list[tuple[str, _Value, bool]]:
    """Of each panel: its title, what it shows of a layer, and whether that is a share of one."""

    def error(index: int) -> _Value:
        return lambda layer: layer["stages"][index]["relative_error"]

    panels = [
        (f"error added by {stage['stage']}", error(i), False)
        for i, stage in enumerate(manifest["stages"])
    ]
    if manifest["sparsity"]:
        panels.append(
            ("weights removed", lambda layer: layer["pruned"] / math.prod(layer["shape"]), True)
        )
    if len({layer["bits"] for layer in manifest["layers"].values()}) > 1:
        panels.append(("bits of a weight", lambda layer: layer["bits"], False))
    return panels


def _place(name: str) -> tuple[int, str]:
    """The block a layer is in, and what it is called there: `model.layers.3.mlp.up_proj` -> (3, "mlp.up_proj")."""
    found = re.match(r".*?\.(\d+)\.(.*)", name)
    return (int(found[1]), re.sub(r"\.\d+(?=\.|$)", "", found[2])) if found else (0, name)


def _last_names_differ(kinds: Iterable[str]) -> bool:
    names = [kind.rpartition(".")[2] for kind in kinds]
    return len(set(names)) == len(names)


# --- Markdown --------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_cell(text).replace('`', '')}`"
