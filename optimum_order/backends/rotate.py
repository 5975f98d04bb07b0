"""Rotate the residual stream and the values of each head: the same model in another basis.

Large values of a few channels are what rounding a weight or an input of a layer suffers from. A
rotation spreads them over all channels. RMSNorm does not notice a rotation of the stream once the
gains are folded into the layers that read it, so that both rotations disappear in the weights and
the result is a stock model. Rotations that must be computed at run time are not written: stock
models leave them out without a word.

Source: Ashkboos et al. 2024, arXiv 2404.00456 (QuaRot); Liu et al. 2024, arXiv 2405.16406
(SpinQuant: R1 is the rotation of the stream, R2 that of the values); Ashkboos et al. 2024, arXiv
2401.15024 (SliceGPT: the invariance of RMSNorm). Hadamard matrices: Sylvester 1867; Paley 1933.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_order.backends.base import Transform, option
from optimum_order.errors import OrderError

if TYPE_CHECKING:  # transformers takes seconds
    from transformers import PreTrainedModel

    from optimum_order.models.architecture import Attention, Layer, Norm, Roles

MATRICES = ("auto", "hadamard", "random")


@dataclass(frozen=True)
class RotateOptions:
    """The rotations."""

    matrix: str = option(
        "auto",
        "a Hadamard matrix with random signs, or a random orthogonal one; auto takes the first "
        "where one of the size is known",
        check=lambda v: v in MATRICES,
        allowed="auto, hadamard or random",
    )
    seed: int = option(
        0, "seed of signs and random matrices", check=lambda v: v >= 0, allowed="0 or more"
    )
    heads: bool = option(True, "rotate the values of each attention head too (R2)")
    force: bool = option(
        False,
        "rotate what was pruned or quantized before: zeros and grids are lost, which is what a "
        "study of orders may ask for",
    )


class Rotate(Transform):
    """Fold the gains of norms into the layers behind them, and rotate what lies between layers."""

    name = "rotate"
    summary = "rotate the residual stream and the values of heads, so that outliers spread"
    Options = RotateOptions
    options: RotateOptions

    @property
    def forced(self) -> bool:
        return self.options.force

    def sizes(self, model: PreTrainedModel) -> dict[str, Any]:
        roles = self._roles(model)
        self._matrix(roles.hidden, torch.Generator())
        if self.options.heads:
            self._matrix(roles.blocks[0].attention.head_dim, torch.Generator())
        return {"tie_word_embeddings": False} if roles.tied else {}

    def _roles(self, model: PreTrainedModel) -> Roles:
        """Return the roles of a model whose norms do not notice a rotation.

        Raises:
            OrderError: If they do, or the roles are unknown.
        """
        from optimum_order.errors import ModelError
        from optimum_order.models.architecture import require_roles

        try:
            roles = require_roles(model)
        except ModelError as error:
            raise OrderError(
                f"Stage '{self.stage}' cannot rotate this model. {error} Leave the stage out."
            ) from error
        around = [part.norms for part in roles.parts]
        fitting = all(norms.before and not norms.after and not norms.stream for norms in around)
        centered = any(norm.centered for norm in roles.stream_norms)
        if not fitting or centered or roles.embedding_norm is not None:
            what = "subtract a mean" if centered else "stand behind the layers that write to it"
            raise OrderError(
                f"Stage '{self.stage}' cannot rotate a model of the family '{roles.family}': norms "
                f"of its residual stream {what}, and would notice. Leave the stage out; families "
                "such as llama, mistral, qwen2, qwen3, phi3 and mixtral can be rotated."
            )
        return roles

    def transform(self, model: PreTrainedModel) -> None:
        roles = self._roles(model)
        generator = torch.Generator().manual_seed(self.options.seed)
        stream = self._matrix(roles.hidden, generator)  # (hidden, hidden)
        for part in roles.parts:
            gain = _take_gain(model, part.norms.before)
            for layer in _distinct(part.readers):
                _turn_inputs(model, layer, stream, gain)
            for layer in _distinct(part.writers):
                _turn_outputs(model, layer, stream)
        gain = _take_gain(model, roles.final_norm)
        for layer in _distinct(roles.heads):
            _turn_inputs(model, layer, stream, gain)
        for embedding in roles.embeddings:
            parameter = model.get_parameter(embedding.parameter)  # type: ignore[union-attr]
            parameter.data = (parameter.data.double() @ stream.to(parameter.device)).to(
                parameter.dtype
            )
        if self.options.heads:
            for block in roles.blocks:
                attention = block.attention
                values = self._matrix(attention.head_dim, generator)
                _turn_values(model, attention, values)

    def _matrix(self, size: int, generator: torch.Generator) -> Tensor:
        """Return an orthogonal matrix (size, size), float64.

        Raises:
            OrderError: If a Hadamard matrix was asked for, and none of the size is known.
        """
        matrix = None if self.options.matrix == "random" else hadamard(size)
        if matrix is not None:
            signs = torch.randint(0, 2, (size, 1), generator=generator) * 2.0 - 1
            return matrix * signs / math.sqrt(size)
        if self.options.matrix == "hadamard":
            raise OrderError(
                f"Stage '{self.stage}': no Hadamard matrix of {size} rows is known here. Use "
                "rotate(matrix=random)."
            )
        noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(noise)
        uniform: Tensor = q * r.diagonal().sign()  # over all rotations and reflections
        return uniform


def hadamard(size: int) -> Tensor | None:
    """Return a matrix (size, size) of 1 and -1 with orthogonal rows, float64, or None.

    Sylvester's construction doubles the matrices of Paley's two. Sizes of 1, 2 and many multiples
    of 4 have one.
    """
    doublings = 0
    while True:
        if (base := _paley(size)) is not None:
            for _ in range(doublings):
                base = torch.cat([torch.cat([base, base], 1), torch.cat([base, -base], 1)])
            return base
        if size % 2 or size < 2:
            return None
        size //= 2
        doublings += 1


def _paley(size: int) -> Tensor | None:
    """Return a Hadamard matrix of a prime and 1, or of twice that, or None."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 4:
        return None
    if _is_prime(size - 1):  # size - 1 is 3 modulo 4
        conference = _bordered(size - 1)
        conference[1:, 0] = -1
        return conference + torch.eye(size, dtype=torch.float64)
    half = size // 2
    if _is_prime(half - 1) and (half - 1) % 4 == 1:
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(half - 1), one) + torch.kron(
            torch.eye(half, dtype=torch.float64), zero
        )
    return None


def _bordered(prime: int) -> Tensor:
    """Return the quadratic residues of all differences modulo a prime, with a border of 1."""
    numbers = torch.arange(prime)
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[(numbers * numbers) % prime] = 1
    character[0] = 0
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 0] = 0
    matrix[1:, 1:] = character[(numbers[:, None] - numbers) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def _distinct(layers: tuple[Layer, ...]) -> list[Layer]:
    """Return each whole layer once: a fused one has several roles."""
    return list({layer.name: layer for layer in layers}.values())


def _take_gain(model: PreTrainedModel, norm: Norm | None) -> Tensor | None:
    """Return the gain of a norm, (hidden,) float64, and leave the norm without one."""
    if norm is None:
        return None
    parameter = model.get_parameter(f"{norm.name}.weight")
    gain = parameter.data.double() + norm.offset
    parameter.data = torch.full_like(parameter.data, 1 - norm.offset)
    return gain


def _turn_inputs(model: PreTrainedModel, layer: Layer, matrix: Tensor, gain: Tensor | None) -> None:
    """Have a layer read a stream that was turned, with a gain in front of it."""
    target = layer.target(model)
    weight = target.view.double()
    weight = weight if gain is None else weight * gain.to(weight.device)
    target.write((weight @ matrix.to(weight.device)).to(target.parameter.dtype))


def _turn_outputs(model: PreTrainedModel, layer: Layer, matrix: Tensor) -> None:
    """Have a layer write to a stream that was turned."""
    target = layer.target(model)
    weight = target.view.double()
    target.write((matrix.T.to(weight.device) @ weight).to(target.parameter.dtype))
    bias = layer.bias(model)
    if bias is not None:
        bias.data = (bias.data.double() @ matrix.to(weight.device)).to(bias.dtype)


def _turn_values(model: PreTrainedModel, attention: Attention, matrix: Tensor) -> None:
    """Turn the values of each head, and turn them back in the layer that reads them."""
    size = attention.head_dim
    values = attention.v.target(model)
    rows = attention.v.index(model)
    whole = values.view.double()
    matrix = matrix.to(whole.device)
    turned = matrix.T @ whole[rows].view(-1, size, whole.shape[1])  # (kv_heads, head_dim, hidden)
    whole[rows] = turned.flatten(0, 1)
    values.write(whole.to(values.parameter.dtype))
    bias: nn.Parameter | None = attention.v.bias(model)
    if bias is not None:
        changed = bias.data.double()
        changed[rows] = (changed[rows].view(-1, size) @ matrix).flatten()
        bias.data = changed.to(bias.dtype)
    output = attention.o.target(model)
    weight = output.view.double()
    heads = weight.view(len(weight), -1, size) @ matrix  # (hidden, heads, head_dim)
    output.write(heads.flatten(1).to(output.parameter.dtype))
