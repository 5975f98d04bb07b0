"""What every metric gets from the base: checks, modes, progress, batches."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_order.errors import DataError, ModelError
from optimum_order.evaluation import Metric, Windows, available
from optimum_order.evaluation.perplexity import Perplexity


class FirstToken(Metric):
    """The first token of each window, so that every figure is known beforehand."""

    name = "first_token"
    summary = "a metric for tests"
    higher_is_better = True

    def score(self, model, batch):
        ids = batch["input_ids"]
        self.mode = (model.training, torch.is_inference_mode_enabled(), ids.device)
        return ids[:, 0].float()


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def windows():
    return Windows(torch.tensor([[1, 0, 0], [2, 0, 0], [6, 0, 0]]), "made up")


def test_metrics_are_found_by_name():
    assert available()["perplexity"] is Perplexity
    for name, metric in available().items():
        assert metric.name == name and metric.summary and isinstance(metric.higher_is_better, bool)


def test_mean_and_standard_error(model, windows):
    found = FirstToken().measure(model, windows, progress=False)
    assert found.value == 3 and found.per_sequence == (1, 2, 6)
    assert found.standard_error == pytest.approx((7 / 3) ** 0.5)  # sample variance 7, three windows
    assert found.tokens == 9 and found.source == "made up" and found.digest == windows.digest


def test_one_window_has_no_standard_error(model, windows):
    found = FirstToken().measure(model, Windows(windows.ids[:1], "made up"), progress=False)
    assert found.value == 1 and found.standard_error is None


@pytest.mark.parametrize("training", [True, False])
def test_the_model_runs_in_evaluation_mode_and_is_left_as_it_was(model, windows, training):
    model.train(training)
    metric = FirstToken()
    metric.measure(model, windows, progress=False)
    assert metric.mode == (False, True, torch.device("cpu"))
    assert model.training is training


def test_the_mode_is_restored_after_a_failure(model, windows):
    class Broken(FirstToken):
        def score(self, model, batch):
            return torch.full((len(batch["input_ids"]),), torch.nan)

    model.train()
    with pytest.raises(ModelError, match="first_token of window 1 of 3 is not finite"):
        Broken().measure(model, windows, progress=False)
    assert model.training


def test_the_window_that_is_not_finite_is_named(model, windows):
    class Broken(FirstToken):
        def score(self, model, batch):
            return torch.where(batch["input_ids"][:, 0] == 6, torch.inf, 0.0)

    with pytest.raises(ModelError, match="window 3 of 3"):
        Broken().measure(model, windows, batch_size=2, progress=False)


def test_progress_is_on_stderr_and_only_if_asked_for(model, windows, capfd):
    FirstToken().measure(model, windows, progress=False)
    assert capfd.readouterr() == ("", "")
    FirstToken().measure(model, windows, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "first_token" in err and "3/3" in err


def test_windows_longer_than_the_model_reads(model):
    with pytest.raises(DataError, match="at most 8 tokens at once, got windows of 9"):
        FirstToken().measure(
            model, Windows(torch.zeros(1, 9, dtype=torch.long), "made up"), progress=False
        )


def test_tokens_that_the_model_does_not_know(model):
    with pytest.raises(DataError, match="knows tokens 0 to 49, got token 50 from made up"):
        FirstToken().measure(model, Windows(torch.tensor([[0, 50]]), "made up"), progress=False)
