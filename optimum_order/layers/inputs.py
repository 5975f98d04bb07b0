"""The values that the inputs of a layer may take while the model runs.

An engine with 8-bit kernels rounds what a layer reads to integers or to float8 numbers, times a
scale. The arithmetic here is that of compressed-tensors, step by step and dtype by dtype, so that a
model computes in memory what stock transformers computes with the folder.

Source: https://github.com/vllm-project/compressed-tensors, `quantization/lifecycle/forward.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MOST = torch.finfo(FLOAT8).max
_ENDS = {"int8": (-128.0, 127.0), "fp8": (-FLOAT8_MOST, FLOAT8_MOST)}
"""The least and the largest number by data type."""
DATA_TYPES = tuple(_ENDS)


@dataclass(frozen=True)
class InputGrid:
    """Integers of 8 bits or float8 (e4m3) numbers, times a scale of each token or of all tokens.

    Args:
        data_type: "int8" or "fp8".
        scale: (1,), finite and positive, the scale of all tokens; None where each token gets a
            scale of its own when it is read.
    """

    data_type: str
    scale: Tensor | None = None

    @classmethod
    def fit(cls, largest: Tensor, data_type: str, dtype: torch.dtype) -> Self:
        """Return the grid with one scale that spans inputs.

        Args:
            largest: The largest size of any input, one number.
            data_type: "int8" or "fp8".
            dtype: What the scale is stored in.
        """
        info = torch.finfo(dtype)
        scale = (largest.reshape(1).float() / _half_range(data_type)).to(dtype)
        # inputs that were always zero get the scale that a token of zeros gets
        scale = scale.masked_fill(scale == 0, info.eps)
        return cls(data_type, scale.clamp(max=info.max / 2**9))

    @property
    def words(self) -> str:
        """Data type and scales in words, such as "int8 per token"."""
        return f"{self.data_type} {'per token' if self.scale is None else 'per tensor'}"

    def nearest(self, x: Tensor) -> Tensor:
        """Return inputs, each replaced by the nearest value of the grid.

        Args:
            x: (batch, tokens, ..., in). As in compressed-tensors, a token is one place of the first
                two dimensions, and a matrix is one token.

        Returns:
            The same shape and dtype. A token of zeros stays zeros.
        """
        scale = self._of_tokens(x) if self.scale is None else self.scale.to(x.device)
        steps = (x / scale).clamp(*_ENDS[self.data_type])
        codes = steps.to(FLOAT8) if self.data_type == "fp8" else steps.round()
        return codes.to(scale.dtype) * scale

    def _of_tokens(self, x: Tensor) -> Tensor:
        dimensions = tuple(range(2, x.ndim)) or tuple(range(x.ndim))
        largest = x.abs().amax(dimensions, keepdim=True)
        scale = largest / torch.tensor(_half_range(self.data_type), dtype=x.dtype, device=x.device)
        return scale.masked_fill(scale == 0, torch.finfo(x.dtype).eps)


def _half_range(data_type: str) -> float:
    least, most = _ENDS[data_type]
    return (most - least) / 2
