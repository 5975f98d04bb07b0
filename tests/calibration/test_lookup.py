"""What is known of an embedding: the inputs of the head that shares its weight."""

import contextlib

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_order.backends.base import needs_of
from optimum_order.calibration.execution import Execution
from optimum_order.calibration.lookup import chances, statistics_of, tied_head
from optimum_order.calibration.sensitivity import output_sensitivities
from optimum_order.calibration.walk import walk
from optimum_order.engine.recipe import method
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Drift, Gram, SquaredNorms, Statistics
from optimum_order.models.units import find_units
from optimum_order.order import Stage

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama(tied=True):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(96, (12, 16), generator=generator)
    return [{"input_ids": part} for part in ids.split(5)]


def units_of(model):
    return find_units(model, embeddings=["*embed_tokens"])


def embedding_of(model):
    return next(t for u in units_of(model) for t in u.targets if t.kind == "embedding")


def head_inputs(model, batches):
    with torch.no_grad():
        return torch.cat([model.model(**b).last_hidden_state.flatten(0, 1) for b in batches])


class TestStatistics:
    def test_are_those_of_the_head_and_white_noise(self, batches):
        model = llama()
        target = embedding_of(model)
        seen = statistics_of(
            model,
            target,
            tied_head(model, target),
            batches,
            needs=[Gram],
            multiplying=contextlib.nullcontext,
        )
        X = head_inputs(model, batches[:2])  # 8 samples or a few more
        H = X.T @ X
        white = seen[Gram] - H
        assert seen.tokens == len(X) == 160
        assert torch.allclose(white, torch.eye(32) * white[0, 0], atol=1e-2)
        assert white.trace().item() == pytest.approx(0.2 * H.trace().item(), rel=1e-4)
        assert torch.allclose(seen[SquaredNorms], seen[Gram].diagonal())

    @pytest.mark.parametrize("pause", ["block", "group"])
    def test_are_had_at_the_pause(self, batches, pause):
        model = llama()
        target = embedding_of(model)
        X = head_inputs(model, batches[:2])
        execution = Execution(pause=pause, progress=False)
        with contextlib.closing(
            walk(model, units_of(model), batches, needs=[Gram, Drift], execution=execution)
        ) as visits:
            visit = next(visits)
        seen = visit.statistics[target.name]
        assert visit.unit.name == target.name and Drift not in seen
        assert (seen[Gram] - X.T @ X).fill_diagonal_(0).abs().max() < 1e-2

    def test_are_white_noise_without_a_tied_head(self, batches):
        model = llama(tied=False)
        assert tied_head(model, embedding_of(model)) is None
        execution = Execution(progress=False)
        with contextlib.closing(
            walk(model, units_of(model), batches, needs=[Gram], execution=execution)
        ) as visits:
            seen = next(visits).statistics["model.embed_tokens"]
        assert torch.equal(seen[Gram], torch.eye(32))


class TestRows:
    def test_matter_as_often_as_their_tokens_are_in_doubt(self, batches):
        model = llama()
        samples = [{"input_ids": ids[None]} for ids in batches[0]["input_ids"]]
        rows = output_sensitivities(model, units_of(model), samples)["model.embed_tokens"]
        with torch.no_grad():
            p = model(**samples[0]).logits[0].softmax(-1)
        assert rows.shape == (5, 96)
        assert torch.allclose(rows[0], (p * (1 - p)).mean(0), atol=1e-6)

    def test_of_an_embedding_alone_need_no_gradient(self, batches):
        model = llama()
        alone = [unit for unit in units_of(model) if unit.name == "model.embed_tokens"]
        samples = [{"input_ids": batches[0]["input_ids"][:1]}]
        assert set(output_sensitivities(model, alone, samples)) == {"model.embed_tokens"}

    def test_of_an_untied_head_need_no_labels(self, batches):
        model = llama(tied=False)
        samples = [{"input_ids": batches[0]["input_ids"][:1]}]
        rows = output_sensitivities(model, find_units(model, ["lm_head", "*.layers.*"]), samples)
        with torch.no_grad():
            logits = model(**samples[0]).logits
        assert torch.allclose(rows["lm_head"][0], chances(logits), atol=1e-6)


def test_a_tied_head_predicts_better_than_with_white_noise(batches):
    """The claim of the statistics: at one rate, the logits are nearer to what they were."""
    torch.manual_seed(3)
    model = llama()
    # hidden states of a model that was trained lie mostly in a few directions
    model.model.norm.weight.data = torch.logspace(0.7, -0.7, 32)
    target = embedding_of(model)
    ecsq = method(Stage("ecsq", rate=3, sensitivity="none"))
    seen = statistics_of(
        model,
        target,
        tied_head(model, target),
        batches,
        needs=needs_of([ecsq]),
        multiplying=contextlib.nullcontext,
    )
    white = Statistics(1, {Gram: torch.eye(32)})
    X = head_inputs(model, batches)
    state = LayerState(target.read())
    errors = []
    for statistics in (seen, white):
        error = ecsq.apply(state, statistics).weight - state.weight
        errors.append((X @ error.T).square().mean().item())
    assert errors[0] < 0.7 * errors[1]
