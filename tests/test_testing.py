"""Every promise of a contract suite is broken here once, and the suite must see it."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_order.evaluation import Metric, Windows
from optimum_order.evaluation.perplexity import Perplexity
from optimum_order.testing import MetricContract

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
)


class Norm(Metric):
    """The mean square of the logits."""

    name = "norm"
    summary = "a metric for tests"
    higher_is_better = False

    def score(self, model, batch):
        return model(**batch).logits.float().square().mean((1, 2))


class Upside(Norm):
    higher_is_better = True


class Halfway(Norm):
    """Its value falls where its scores rise."""

    def value(self, mean):
        return 1 / mean


class Twoline(Norm):
    summary = "one line\nand another"


class Neighbors(Norm):
    """A score depends on the batch."""

    def score(self, model, batch):
        scores = super().score(model, batch)
        return scores + scores.mean()


class Once(Norm):
    """Skips the last batch where there are several."""

    def _scores(self, *arguments):
        scores = super()._scores(*arguments)
        return scores[:4]


class Twice(Norm):
    """Measures everything again, and the figure is of both."""

    def _scores(self, *arguments):
        first = super()._scores(*arguments)
        return torch.cat([first, super()._scores(*arguments)])


class Remembering(Norm):
    """The second figure is another."""

    runs = 0

    def measure(self, *arguments, **options):
        self.runs += 1
        return super().measure(*arguments, **options)

    def score(self, model, batch):
        return super().score(model, batch) * self.runs


class Random(Norm):
    def score(self, model, batch):
        return super().score(model, batch) * (1 + 1e-3 * torch.rand(()))


class Digestless(Norm):
    """Its digest is that of other samples."""

    def measure(self, model, samples, **options):
        result = super().measure(model, samples, **options)
        return dataclasses.replace(result, digest=samples.head(2).digest)


class Training(Norm):
    """Leaves the model in another mode."""

    def measure(self, model, samples, **options):
        result = super().measure(model, samples, **options)
        model.train()
        return result


class Changing(Norm):
    def score(self, model, batch):
        scores = super().score(model, batch)
        model.lm_head.weight.mul_(1.5)
        return scores


class Careless(Norm):
    """Turns NaN into a number."""

    def score(self, model, batch):
        return super().score(model, batch).nan_to_num()


class Details(Norm):
    """A figure that JSON cannot hold."""

    def details(self, mean, samples):
        return {"all": float("inf")}


def contract(metric):
    class Contract(MetricContract):
        def metric(self):
            return metric()

        def model(self):
            torch.manual_seed(0)
            return LlamaForCausalLM(CONFIG)

        def samples(self):
            ids = torch.randint(0, 50, (5, 6), generator=torch.Generator().manual_seed(0))
            return Windows(ids, "made up")

    return Contract()


def broken(metric) -> set[str]:
    """The tests of the contract that a metric fails."""
    suite = contract(metric)
    failed = set()
    for name in dir(suite):
        if name.startswith("test_"):
            try:
                getattr(suite, name)()
            except (AssertionError, ValueError):
                failed.add(name.removeprefix("test_"))
    return failed


def test_a_good_metric_passes():
    assert broken(Norm) == set()


def test_every_broken_promise_is_seen():
    for metric, test in [
        (Upside, "a_worse_model_has_a_lower_performance"),
        (Halfway, "a_worse_model_has_a_lower_performance"),
        (Twoline, "the_class_says_what_it_is"),
        (Neighbors, "a_score_does_not_depend_on_other_samples"),
        (Neighbors, "the_batch_size_does_not_matter"),
        (Once, "the_value_is_that_of_the_mean_score"),
        (Twice, "the_value_is_that_of_the_mean_score"),
        (Remembering, "a_measurement_is_deterministic"),
        (Random, "a_measurement_is_deterministic"),
        (Digestless, "a_measurement_says_what_was_measured_on_what"),
        (Details, "a_measurement_says_what_was_measured_on_what"),
        (Training, "the_model_is_left_unchanged"),
        (Changing, "the_model_is_left_unchanged"),
        (Careless, "a_model_that_computes_no_numbers_has_no_figure"),
    ]:
        assert test in broken(metric), metric.__name__


def test_a_hook_that_is_missing_is_an_error():
    class Incomplete(MetricContract):
        def metric(self):
            return Perplexity()

    with pytest.raises(TypeError, match="model"):
        Incomplete()
