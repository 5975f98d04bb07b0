"""Text for people: the console, and the rows that several commands print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optimum_order.files import size

if TYPE_CHECKING:
    from rich.console import Console


_CHEAP_ZEROS = (
    "a zero takes the bits of any weight there; '--format sparse' or 'coded' stores zeros in "
    "fewer, and 'ecsq' makes the zeros that pay"
)
_LOADS_ADAPTER = "PeftModel.from_pretrained loads it from the folder 'adapter'"
_IDLE_ADVICE = "give more --calibration-samples, or --ignore these"


def console() -> Console:
    """Return a console that prints text unchanged, for text from elsewhere is no markup."""
    from rich.console import Console

    return Console(markup=False, highlight=False)


def arrows(order: str) -> str:
    """Return an order with arrows for its '>'."""
    return order.replace(" > ", " → ")


def metric_values(metrics: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return the figures before and after of the metrics of a manifest, by name."""
    return {
        name: {when: measured and measured["value"] for when, measured in both.items()}
        for name, both in metrics.items()
    }


def smaller_text(change: Mapping[str, Any]) -> str:
    """Return what a stage that made the model smaller did to its config.

    Args:
        change: An entry of `smaller` in a manifest.
    """
    sizes = ", ".join(
        f"{field} {value}" for field, value in change["sizes"].items() if isinstance(value, int)
    )
    removed = change.get("removed")
    gone = f": without {', '.join(map(str, removed))}" if removed else ""
    return f"{sizes}{gone}"


def outcome_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows that say what a compression changed: figures, bytes, bits and sparsity.

    Args:
        manifest: A manifest, with its metrics as `metric_values`.
    """
    from optimum_order import formats

    rows = []
    for name, values in manifest["metrics"].items():
        before = "not measured" if values["before"] is None else f"{values['before']:.4g}"
        rows.append((name, f"{before} → {values['after']:.4g}"))
    bytes_ = manifest["bytes"]
    before = size(bytes_["before"]) if bytes_["before"] else "unknown"
    rows.append(("weights on disk", f"{before} → {size(bytes_['after'])}"))
    if "adapter" in bytes_:
        rows.append(("of these the adapter", f"{size(bytes_['adapter'])}: {_LOADS_ADAPTER}"))
    rows.append(("bits per compressed weight", f"{bytes_['per_weight_bits']:.2f}"))
    for change in manifest.get("smaller", ()):
        rows.append((change["stage"], smaller_text(change)))
    sparsity = f"{manifest['sparsity']:.1%}"
    coverage = manifest.get("coverage")  # 0.1.0 did not count
    if coverage is not None:
        share = coverage["compressed"] / coverage["weights"]
        rows.append(("compressed", f"{share:.1%} of {coverage['weights']:,} weights"))
        sparsity += f" of these, {share * manifest['sparsity']:.1%} of all"
    rows.append(("sparsity", sparsity))
    codec = formats.available().get(manifest["format"])
    if manifest["sparsity"] and codec is not None and not codec.zeros_are_cheap:
        rows.append(("pruning", f"saves no byte in '{codec.name}': {_CHEAP_ZEROS}"))
    if coverage is not None and coverage["idle"]:
        text = f"{coverage['idle']} of {coverage['layers']} layers: {_IDLE_ADVICE}"
        rows.append(("no calibration token", text))
    if unloaded := manifest.get("unloaded"):
        text = f"{unloaded['tensors']} tensors, {size(unloaded['bytes'])}: copied as they are"
        rows.append(("not loaded by the model", text))
    return rows
