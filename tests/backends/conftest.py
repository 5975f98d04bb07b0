"""Layers and inputs of every awkward kind that the methods must live with."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from optimum_order import JointCompressor
from optimum_order.layers.statistics import AbsMax, Gram, Statistics


def make_inputs(kind: str, tokens: int, width: int, seed: int) -> torch.Tensor:
    """Inputs X (tokens, width) of one of the kinds in `input_kinds`."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, width, generator=generator)
    if kind == "correlated":
        X = X[:, : width // 4] @ torch.randn(width // 4, width, generator=generator) + 0.3 * X
    elif kind == "low rank":
        X = X[:, : width // 4] @ torch.randn(width // 4, width, generator=generator)
    elif kind == "dead columns":
        X[:, ::3] = 0
    elif kind == "outliers":
        X[:, :: max(1, width // 3)] *= 100
    elif kind == "one token":
        X = X[:1]
    elif kind == "silent":
        X = torch.zeros_like(X)
    return X


@pytest.fixture(scope="session")
def input_kinds() -> tuple[str, ...]:
    """Every kind of inputs."""
    awkward = ("low rank", "dead columns", "outliers", "one token", "silent")
    return ("independent", "correlated", *awkward)


@pytest.fixture(scope="session")
def inputs():
    """`inputs(kind, tokens, width, seed) -> Statistics` of random inputs X (tokens, width)."""

    def make(kind="correlated", tokens=64, width=32, seed=0) -> Statistics:
        X = make_inputs(kind, tokens, width, seed)
        return Statistics(
            len(X), {Gram: X.T @ X, AbsMax: X.abs().sum(0) if not len(X) else X.abs().amax(0)}
        )

    return make


@pytest.fixture(scope="session")
def gaussian():
    """`gaussian(out, in, seed, dtype)`: a random weight."""

    def make(rows=16, width=32, seed=0, dtype=torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 + seed)
        return torch.randn(rows, width, generator=generator).to(dtype)

    return make


@pytest.fixture(scope="session")
def row_errors():
    """`row_errors(after, before, statistics)`: `diag(dW H dW^T)` in float64, (out,)."""

    def measure(after, before, statistics) -> torch.Tensor:
        delta = after.double() - before.double()
        return torch.einsum("oi,ij,oj->o", delta, statistics[Gram].double(), delta)

    return measure


@pytest.fixture(scope="session")
def not_worse():
    """`not_worse(a, b, deltas, statistics)`: errors a (out,) are at most b, up to float32 noise."""

    def check(a, b, deltas, statistics) -> bool:
        trace = statistics[Gram].diagonal().sum().item()
        noise = 1e-6 * trace * sum(delta.double().square().sum(1) for delta in deltas)
        return bool((a <= b * (1 + 1e-4) + noise).all())

    return check


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.randint(2, 60, (32, 16), generator=torch.Generator().manual_seed(0))


def make_model(tied=True, experts=False, dtype=torch.float32):
    torch.manual_seed(0)
    if experts:
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3, pad_token_id=None))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4  # predictions that something is lost of
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def compressor(**settings):
    return JointCompressor(
        make_model(**settings), calibration=IDS, sequence_length=16, device="cpu"
    )


def divergence(compressed, original):
    with torch.no_grad():
        one, other = (m(IDS).logits.float().log_softmax(-1) for m in (compressed, original))
    return (other.exp() * (other - one)).sum(-1).mean().item()


@pytest.fixture(scope="session")
def learning():
    """A model whose predictions can be lost and learned, what compresses it, and how far it is."""
    return SimpleNamespace(make=make_model, compressor=compressor, divergence=divergence, ids=IDS)
