"""What every metric gets from the base: checks, modes, progress, batches; each sample read once."""

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
    batches = ()

    def score(self, model, batch):
        ids = batch["input_ids"]
        self.mode = (model.training, torch.is_inference_mode_enabled(), ids.device)
        self.batches = (*self.batches, len(ids))
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
    assert {name: metric.name for name, metric in available().items()} == {
        name: name for name in ("accuracy", "embedding", "fidelity", "lm_eval", "perplexity")
    }


def test_mean_and_standard_error(model, windows):
    result = FirstToken().measure(model, windows, progress=False)
    assert result.value == 3 and result.scores == (1, 2, 6)
    # the sample variance of three windows is 7
    assert result.standard_error == pytest.approx((7 / 3) ** 0.5)
    assert (result.tokens, result.source, result.digest) == (9, "made up", windows.digest)
    assert result.performance == result.value and result.performances.tolist() == [1, 2, 6]


def test_every_sample_is_read_once_for_a_measurement(model, windows):
    metric = FirstToken()
    metric.measure(model, windows, batch_size=2, progress=False)
    assert metric.batches == (2, 1)


def test_the_forwards_of_a_language_model_are_counted(tiny_llama_folder, monkeypatch):
    """A model is run once for each batch, whatever figures come of it."""
    llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    sizes = []
    forward = llama.forward
    monkeypatch.setattr(
        llama,
        "forward",
        lambda input_ids, **o: sizes.append(len(input_ids)) or forward(input_ids, **o),
    )
    Perplexity().measure(
        llama, Windows(torch.arange(40).view(5, 8), ""), batch_size=2, progress=False
    )
    assert sizes == [2, 2, 1]


def test_one_window_has_no_standard_error(model, windows):
    result = FirstToken().measure(model, Windows(windows.ids[:1], "made up"), progress=False)
    assert result.value == 1 and result.standard_error is None


def test_the_model_runs_in_evaluation_mode_and_is_left_as_before(model, windows):
    for training in (True, False):
        model.train(training)
        metric = FirstToken()
        metric.measure(model, windows, progress=False)
        assert metric.mode == (False, True, torch.device("cpu"))
        assert model.training is training


def test_the_first_window_that_is_not_finite_is_named_and_the_mode_restored(model, windows):
    class Broken(FirstToken):
        bad = (1, 2, 6)

        def score(self, model, batch):
            scores = super().score(model, batch)
            return scores.masked_fill(torch.isin(scores, torch.tensor(self.bad)), torch.inf)

    model.train()
    metric = Broken()
    for bad, number in ((metric.bad, 1), ((2.0, 6.0), 2), ((6.0,), 3)):
        metric.bad = bad
        message = f"first_token of window {number} of 3 is not finite"
        with pytest.raises(ModelError, match=message):
            metric.measure(model, windows, batch_size=2, progress=False)
        assert model.training


def test_progress_is_on_stderr_and_only_if_asked_for(model, windows, capfd):
    FirstToken().measure(model, windows, progress=False)
    assert capfd.readouterr() == ("", "")
    FirstToken().measure(model, windows, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "first_token" in err and "3 of 3" in err


def test_samples_that_the_model_cannot_read_are_refused_before_it_runs(model):
    metric = FirstToken()
    with pytest.raises(DataError, match="at most 8 tokens at once, got windows of 9"):
        metric.measure(model, Windows(torch.zeros(1, 9, dtype=torch.long), "x"), progress=False)
    assert metric.batches == ()
