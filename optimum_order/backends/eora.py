"""EoRA: the adapter that takes most of the error out of a layer's outputs, in closed form.

The error of the outputs is X dW^T with dW = W_original - W. With the Gram matrix H = Q Λ Q^T of the
inputs its square is ||dW Q Λ^(1/2)||^2, so the best product of a rank is the truncated singular
value decomposition of M = dW Q Λ^(1/2), taken back: B A = U_r U_r^T M (Q Λ^(1/2))^-1, which is
U_r U_r^T dW. In that form nothing is divided by eigenvalues that may be 0.

Source: Liu et al. 2024, arXiv 2410.21271 (EoRA).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from optimum_order.backends.base import Backend, option
from optimum_order.layers.low_rank import LowRank
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics


def rank_option(default: int = 8) -> int:
    """Return the field for the rank of adapters."""
    rank: int = option(
        default,
        "columns of B and rows of A",
        check=lambda v: v > 0,
        allowed="a positive integer",
    )
    return rank


def why_no_rank(rank: int, shape: tuple[int, int]) -> str | None:
    """Return why a layer of this (out, in) shape takes no adapter of a rank, or None."""
    if rank < min(shape):
        return None
    return f"a rank of {rank} is not less than {min(shape)}, the smaller side of {shape}"


@dataclasses.dataclass(frozen=True)
class EoraOptions:
    """How large the adapters are."""

    rank: int = rank_option()


class Eora(Backend):
    """Give layers the adapter with the least error of outputs on calibration inputs."""

    name = "eora"
    summary = "add a low-rank adapter that makes up for the error of outputs, in closed form"
    kind = "adapt"
    needs = frozenset({Gram})
    reads_original = True
    Options = EoraOptions
    options: EoraOptions

    def covers(self, layer: str, kind: str = "linear") -> bool:
        # what an adapter of PEFT has hooks for, in its plainest form
        return kind == "linear" and super().covers(layer, kind)

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        return why_no_rank(self.options.rank, shape)

    def compress(self, state: LayerState, statistics: Statistics) -> LayerState:
        assert state.original is not None  # see `reads_original`
        difference = state.original.double() - state.weight.double()  # (out, in)
        if not difference.any():
            return state
        gram: Tensor = statistics[Gram]
        root = statistics.derived("root of the Gram matrix", lambda: _root(gram))  # (in, in)
        vectors = _leading(difference @ root, self.options.rank)  # (out, rank)
        adapter = LowRank.balanced(vectors.T @ difference, vectors, state.weight.dtype)
        left = difference - adapter.product()
        before, after = (_error(part, gram) for part in (difference, left))
        size = _error(state.original.double(), gram) or 1.0  # inputs may all be zero
        note = f"{self.stage}: error of outputs {before / size:.3g} to {after / size:.3g}"
        return dataclasses.replace(state, adapter=adapter, notes=(*state.notes, note))


def _root(gram: Tensor) -> Tensor:
    """Return Q Λ^(1/2), (in, in) float64, of a Gram matrix Q Λ Q^T."""
    values, vectors = torch.linalg.eigh(gram.double())
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Return the singular vectors of the largest singular values, (out, rank) with normal columns.

    Args:
        matrix: (out, in).
        rank: How many; columns beyond those that there are, as in a small layer on which an
            estimate tries the method, are zero.
    """
    if len(matrix) <= matrix.shape[1]:
        vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]
    else:  # the smaller of two eigenproblems
        right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :rank]
        vectors = torch.linalg.qr(matrix @ right).Q
    return functional.pad(vectors, (0, rank - vectors.shape[1]))


def _error(difference: Tensor, gram: Tensor) -> float:
    """Return the squared error of the outputs, tr(D H D^T)."""
    return float(((difference @ gram.double()) * difference).sum())
