"""What a config group of compressed-tensors says of its layers: weights, scales and inputs."""

from __future__ import annotations

from dataclasses import dataclass

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from optimum_order.errors import ArtifactError
from optimum_order.formats.base import grid_of
from optimum_order.layers.grids.float8 import Float8Grid
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState

PACKED = "pack-quantized"
KINDS = {"int8": "int", "fp8": "float"}
"""What compressed-tensors calls the data types of inputs."""
_INPUTS = tuple(
    f"{data_type} per {scales}" for data_type in KINDS for scales in ("token", "tensor")
)
"""The words of every grid of inputs."""
_FIELDS = ("num_bits", "type", "symmetric", "strategy", "dynamic")


@dataclass(frozen=True)
class Scheme:
    """What one config group says.

    Args:
        bits: Width of a weight.
        group_size: Inputs that share a scale, -1 for a whole row.
        kind: Of the weights, "int" or "float".
        inputs: The words of the grid of inputs; "" where inputs are read as they are.
    """

    bits: int
    group_size: int
    kind: str = "int"
    inputs: str = ""

    @classmethod
    def of(cls, state: LayerState) -> Scheme:
        """Return the scheme of a layer on a uniform or a float8 grid."""
        inputs = "" if state.inputs is None else state.inputs.words
        if isinstance(state.grid, Float8Grid):
            return cls(state.grid.bits, state.grid.group_size, "float", inputs)
        grid = grid_of(state, UniformGrid)
        return cls(grid.bits, grid.group_size, "int", inputs)

    @classmethod
    def read(cls, group: QuantizationScheme) -> Scheme:
        """Return what a config group says, which nobody has checked.

        Args:
            group: The config group.

        Raises:
            ArtifactError: If it says what this package does not make.
        """
        weights = group.weights
        if weights is None:
            raise ArtifactError("its config group says nothing of weights")
        integers = weights.type == "int" and 2 <= weights.num_bits <= 8
        floats = (weights.type, weights.num_bits, weights.strategy) == ("float", 8, "channel")
        if (
            not (integers or floats)
            or not weights.symmetric
            or weights.strategy not in ("group", "channel")
            or weights.actorder is not None
        ):
            raise ArtifactError(
                "its config group must be symmetric integers of 2 to 8 bits, by channel or in "
                "groups, or float8 by channel"
            )
        if group.output_activations is not None:
            raise ArtifactError("its config group rounds outputs, which this package does not")
        size = weights.group_size if weights.strategy == "group" else None
        inputs = _read_inputs(group.input_activations)
        kind = "int" if integers else "float"
        return cls(weights.num_bits, -1 if size is None else size, kind, inputs)

    @property
    def format(self) -> str:
        """The name that compressed-tensors has for how such layers are stored."""
        if self.kind == "float":
            return "float-quantized" if self.inputs else "naive-quantized"
        return "int-quantized" if self.inputs else PACKED

    @property
    def words(self) -> str:
        """Width and groups in words."""
        inputs = f" with inputs {self.inputs}" if self.inputs else ""
        return f"{self.bits} bits in groups of {self.group_size}{inputs}"

    def weights(self) -> QuantizationArgs:
        """Return what the config group says of weights."""
        rows = self.group_size == -1
        return QuantizationArgs(
            num_bits=self.bits,
            type=self.kind,
            symmetric=True,
            strategy="channel" if rows else "group",
            group_size=None if rows else self.group_size,
        )

    def input_activations(self) -> QuantizationArgs | None:
        """Return what the config group says of inputs."""
        if not self.inputs:
            return None
        data_type, _, scales = self.inputs.partition(" per ")
        return QuantizationArgs(
            num_bits=8,
            type=KINDS[data_type],
            symmetric=True,
            strategy=scales,
            dynamic=scales == "token",
        )


def _read_inputs(activations: QuantizationArgs | None) -> str:
    """Return the words of the grid of inputs that a config group describes; "" for none.

    Raises:
        ArtifactError: If it is none of those that this package makes.
    """
    if activations is None:
        return ""
    for words in _INPUTS:
        own = Scheme(8, -1, inputs=words).input_activations()
        if all(getattr(own, field) == getattr(activations, field) for field in _FIELDS):
            return words
    raise ArtifactError(
        "its config group must round inputs to symmetric int8 or float8, dynamically by token or "
        "with one scale"
    )
