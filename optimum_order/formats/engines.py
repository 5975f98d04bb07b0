"""Which engine loads which format: the data that `make engines` writes, and what follows from them.

An engine has kernels for some widths and groups only, and fuses projections into one matrix, which
must then be stored alike. So what a format can hold is no proof that an engine runs it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from transformers import PreTrainedModel

from optimum_order.errors import FormatError, unknown
from optimum_order.formats.base import Codec, Layers
from optimum_order.layers.grids.base import Grid
from optimum_order.layers.grids.block import ForeignBlockGrid
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState

FILE = "engines.json"
OK = "ok"
READ = "read: "
"""How the verdict on a case begins that the engine reads right and has no kernel for on the
processor that it was tried on; a reason follows."""
NOT_TRIED = "not tried: "
"""How the verdict on a case begins that the engine lacked a package for."""
ADAPTED = ("peft", "transformers")
"""Engines in which PEFT puts an adapter on what they load."""
SEVERAL = "several widths"
SEVERAL_GROUPS = "several group sizes"
FUSED = "fused layers apart"
"""Case of layers that an engine fuses and that are stored in different ways."""


@dataclass(frozen=True)
class Case:
    """One thing that an engine was asked to load.

    Args:
        format: The name of the format.
        name: What is special about the layers; empty for a plain width.
        bits: Width of a code, 0 where that is not what the case is about.
        group_size: Weights that share a scale; -1 for whole rows.
        symmetric: Whether the grid has no zero points.
        inputs: What inputs are rounded to, in the words of their grid; empty if to nothing.
    """

    format: str
    name: str = ""
    bits: int = 0
    group_size: int = -1
    symmetric: bool = True
    inputs: str = ""

    @property
    def width(self) -> str:
        """Bits and symmetry in words, or what is special."""
        name = f"{self.bits} bits {'symmetric' if self.symmetric else 'asymmetric'}"
        name = name if self.bits else self.name
        return f"{name}, inputs {self.inputs}" if self.inputs else name

    @property
    def groups(self) -> str:
        """The group size in words."""
        return "whole rows" if self.group_size == -1 else f"groups of {self.group_size}"

    def __str__(self) -> str:
        if not self.bits:
            return f"{self.format}, {self.width}" if self.width else self.format
        return f"{self.format}, {self.width}, {self.groups}"

    def as_dict(self) -> dict[str, Any]:
        """Return the case ready for JSON."""
        inputs = {"inputs": self.inputs} if self.inputs else {}
        if not self.bits:
            return {"format": self.format, "name": self.name, **inputs}
        return {
            "format": self.format,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            **inputs,
        }


@dataclass(frozen=True)
class Engine:
    """What is known of one engine.

    Args:
        name: The name that `--for` takes.
        version: The version that was tried.
        place: Where it ran.
        verdicts: `OK`, or what went wrong, by case.
        fused: By architecture, the ends of names of layers that the engine fuses. None if the
            engine loads whatever transformers loads.
        model: The architecture that all cases were tried with.
    """

    name: str
    version: str
    place: str
    verdicts: Mapping[Case, str]
    fused: Mapping[str, list[list[str]]] | None
    model: str

    @property
    def title(self) -> str:
        """The engine, its version and where it ran."""
        return f"{self.name} {self.version} ({self.place})"

    def loads(self, case: Case) -> bool:
        """Return whether the engine was seen to read a case right."""
        verdict = self.verdicts.get(case, "")
        return verdict == OK or verdict.startswith(READ)

    def loaded_widths(self, format: str | None = None) -> dict[str, list[str]]:
        """Return the names of formats by the widths that the engine loads in them.

        Args:
            format: Only this one.
        """
        widths: dict[str, list[str]] = {}
        for case in self.verdicts:
            if not case.bits or not self.loads(case) or format not in (None, case.format):
                continue
            formats = widths.setdefault(case.width, [])
            if case.format not in formats:
                formats.append(case.format)
        return widths

    @property
    def widest(self) -> int | None:
        """The most bits of a code that the engine loads with one scale for each row, if any."""
        rows = [
            case.bits
            for case in self.verdicts
            if case.group_size == -1 and not case.inputs and self.loads(case)
        ]
        return max(rows, default=0) or None

    def why_not(self, model: PreTrainedModel, codec: Codec, layers: Layers) -> str | None:
        """Return why nobody has seen the engine load a folder, or that it does not; None if it has.

        Args:
            model: The model; it may be empty.
            codec: A codec that can hold it.
            layers: The layers that the codec encodes, as outlines.

        Returns:
            A sentence.
        """
        architecture = type(model).__name__
        if self.fused is not None and architecture not in self.fused:
            return f"{self.title} is not known to have the architecture {architecture}."
        cases = cases_of(codec, layers)
        for case in cases:
            if case not in self.verdicts:
                return f"'{case}' was not tried in {self.title}."
        for case in cases:
            verdict = self.verdicts[case].rstrip(".")
            if verdict.startswith(NOT_TRIED):
                reason = verdict.removeprefix(NOT_TRIED)
                return f"'{case}' was not tried in {self.title}: {reason}."
            if not self.loads(case):
                return f"{self.title} does not load '{case}' ({verdict})."
        return self._why_not_fused(model, codec, layers)

    def _why_not_fused(self, model: PreTrainedModel, codec: Codec, layers: Layers) -> str | None:
        """Return which layers must be stored alike and are not, or None if all are."""
        if not layers.states or self.loads(Case(codec.name, FUSED)):
            return None
        modules = {name for name, _ in model.named_modules()}
        for parts in (self.fused or {}).get(type(model).__name__, []):
            apart = _apart(parts, layers, modules)
            if apart is not None:
                ignored = " ".join(f"'*.{part}'" for part in parts)
                return (
                    f"{self.name} fuses {', '.join(parts)} into one matrix, and they must be "
                    f"stored alike: {apart}. Give them one width, or leave all of them dense "
                    f"(--ignore {ignored})."
                )
        return None

    def caution(self, model: PreTrainedModel, codec: Codec, layers: Layers) -> str | None:
        """Return what was not tried of a folder that the engine reads, or None.

        Args:
            model: The model; it may be empty.
            codec: A codec of which `why_not` says nothing.
            layers: The layers that the codec encodes, as outlines.

        Returns:
            A sentence.
        """
        verdicts = [self.verdicts[case] for case in cases_of(codec, layers)]
        unrun = next((verdict for verdict in verdicts if verdict.startswith(READ)), None)
        if unrun is not None:
            return f"{self.title} reads this folder right, but {unrun.removeprefix(READ)}."
        architecture = type(model).__name__
        if self.fused is not None and architecture != self.model:
            return f"{self.title} was tried with {self.model}, not with {architecture}."
        return None


@functools.cache
def content() -> dict[str, Any]:
    """Return the data as `make engines` wrote them."""
    text = files("optimum_order.formats").joinpath(FILE).read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def names() -> list[str]:
    """Return every name that `--for` takes."""
    return sorted(content()["engines"])


def engine(name: str) -> Engine:
    """Return what is known of an engine.

    Args:
        name: Its name.

    Raises:
        FormatError: If nothing is known of it.
    """
    entry = content()["engines"].get(name)
    if entry is None:
        raise FormatError(unknown("engine", name, names()))
    return Engine(
        name=name,
        version=next(iter(entry["versions"].values())),
        place=entry["processor"],
        verdicts={case_of(row): row["verdict"] for row in entry["results"]},
        fused=entry.get("fused"),
        model=content()["architecture"],
    )


def case_of(row: Mapping[str, Any]) -> Case:
    """Return the case of a row of the data."""
    fields = ("format", "name", "bits", "group_size", "symmetric", "inputs")
    return Case(**{field: row[field] for field in fields if field in row})


def cases_of(codec: Codec, layers: Layers) -> list[Case]:
    """Return all that an engine must be able to load for a folder.

    Args:
        codec: The codec of the folder.
        layers: The layers that the codec encodes, as outlines.
    """
    if not layers.states or codec.import_first:
        return [Case(codec.name)]  # ordinary values, or decoded by our own code
    schemes = sorted(set(_schemes(codec.name, layers).values()), key=str)
    widths = {(case.bits, case.symmetric, case.name, case.inputs) for case in schemes}
    if len(widths) > 1:
        return [*schemes, Case(codec.name, SEVERAL)]
    return schemes if len(schemes) == 1 else [*schemes, Case(codec.name, SEVERAL_GROUPS)]


def _schemes(format: str, layers: Layers) -> dict[str, Case]:
    """Return the case of each layer."""
    grids = dict(_grids(layers.states))
    grouped = {grid.unit for grid in grids.values() if _group_size(grid) != -1}
    cases = {}
    for name, grid in grids.items():
        inputs = "" if (own := layers.states[name].inputs) is None else own.words
        if not isinstance(grid, (ForeignBlockGrid, UniformGrid)):
            kind = getattr(grid, "data_type", f"int{grid.bits}")
            cases[name] = Case(format, kind, inputs=inputs)
            continue
        # A row that is just one group long is stored the same either way.
        size = grid.unit if grid.unit in grouped else grid.group_size
        cases[name] = Case(format, "", grid.bits, size, grid.symmetric, inputs)
    return cases


def _grids(states: Mapping[str, LayerState]) -> Iterable[tuple[str, Grid]]:
    for name in states:
        grid = states[name].grid
        if grid is not None:
            yield name, grid


def _group_size(grid: Grid) -> int:
    return grid.group_size if isinstance(grid, (ForeignBlockGrid, UniformGrid)) else -1


def _apart(parts: list[str], layers: Layers, modules: Collection[str]) -> str | None:
    """Return what differs among layers that are fused, as the end of a sentence.

    Args:
        parts: The ends of their names.
        layers: The layers that are encoded.
        modules: The names of all modules of the model.
    """
    schemes = _schemes("", layers)
    parents = {name.rpartition(".")[0] for name in schemes if name.rpartition(".")[2] in parts}
    for parent in sorted(parents):
        own = {
            part: schemes.get(f"{parent}.{part}") for part in parts if f"{parent}.{part}" in modules
        }
        if len(set(own.values())) > 1:
            words = {
                part: "dense" if case is None else case.width or case.name
                for part, case in own.items()
            }
            if len(set(words.values())) == 1:
                words = {part: case.groups for part, case in own.items() if case is not None}
            listed = ", ".join(f"{part} {text}" for part, text in words.items())
            return f"in '{parent}' they would be {listed}"
    return None
