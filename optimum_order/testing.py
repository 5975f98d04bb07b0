"""Contract suites for plug-ins: a test class derives from one, gives its hooks, and pytest runs it.

class TestMyMetric(MetricContract):
    def metric(self):
        return MyMetric()

    def model(self):
        return AutoModelForCausalLM.from_pretrained("my-model")

    def samples(self):
        return Windows(ids, "my text")
"""

from __future__ import annotations

import copy
import json
import math
from abc import ABC, abstractmethod

import torch
from transformers import PreTrainedModel

from optimum_order.data.samples import Samples
from optimum_order.errors import ModelError
from optimum_order.evaluation.base import Measurement, Metric


class MetricContract(ABC):
    """The promises of every metric.

    A hook returns the same thing, made anew, at every call.
    """

    tolerance: float = 1e-4
    """Relative difference of scores that rounding in other batches may cause."""

    @abstractmethod
    def metric(self) -> Metric:
        """Return the metric."""

    @abstractmethod
    def model(self) -> PreTrainedModel:
        """Return a model that is good on the samples, so that noise in its weights is a loss."""

    @abstractmethod
    def samples(self) -> Samples:
        """Return four or more samples that differ."""

    def worse_model(self) -> PreTrainedModel:
        """Return a model that the metric must find worse than `model()`: by default, with noise."""
        model = self.model()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise * parameter.std(correction=0))
        return model

    def measure(self, model: PreTrainedModel, samples: Samples, batch_size: int = 2) -> Measurement:
        """Return the measurement of a fresh metric.

        Args:
            model: The model to measure.
            samples: The samples to measure on.
            batch_size: Samples at a time.
        """
        return self.metric().measure(model, samples, batch_size=batch_size, progress=False)

    def test_the_class_says_what_it_is(self) -> None:
        cls = type(self.metric())
        assert cls.name and cls.name == cls.name.strip(), "'name' is the word a user types"
        assert cls.summary and "\n" not in cls.summary, "'summary' is one line"
        assert isinstance(cls.higher_is_better, bool), "'higher_is_better' is True or False"

    def test_a_worse_model_has_a_lower_performance(self) -> None:
        good = self.measure(self.model(), self.samples())
        worse = self.measure(self.worse_model(), self.samples())
        assert worse.performance < good.performance, (
            f"M must be higher for the better model: got {good.performance} for it and "
            f"{worse.performance} for the worse one; see 'higher_is_better'"
        )
        lower = worse.value < good.value if good.higher_is_better else worse.value > good.value
        assert lower, "'higher_is_better' must be true of the value as of the scores"

    def test_the_value_is_that_of_the_mean_score(self) -> None:
        samples = self.samples()
        result = self.measure(self.model(), samples)
        count = len(samples)
        assert len(result.scores) == count, "every sample has one score"
        mean = math.fsum(result.scores) / count
        assert math.isclose(result.value, self.metric().value(mean), rel_tol=1e-9, abs_tol=1e-12)
        variance = math.fsum((score - mean) ** 2 for score in result.scores) / (count - 1)
        assert result.standard_error is not None
        assert math.isclose(
            result.standard_error, math.sqrt(variance / count), rel_tol=1e-6, abs_tol=1e-12
        )

    def test_a_score_does_not_depend_on_other_samples(self) -> None:
        samples = self.samples()
        whole = self.measure(self.model(), samples).scores
        part = self.measure(self.model(), samples.take(torch.tensor([2, 0])), 1).scores
        self._check_equal(part, (whole[2], whole[0]), "of a sample that is measured alone")

    def test_the_batch_size_does_not_matter(self) -> None:
        samples = self.samples()
        expected = self.measure(self.model(), samples, 1).scores
        for batch_size in (3, len(samples), 2 * len(samples)):
            scores = self.measure(self.model(), samples, batch_size).scores
            self._check_equal(scores, expected, f"in batches of {batch_size}")

    def test_a_measurement_is_deterministic(self) -> None:
        models = [self.model() for _ in range(3)]  # first of all: a hook may set torch's seed
        samples = self.samples()
        metric = self.metric()
        first, second = (
            metric.measure(model, samples, batch_size=2, progress=False) for model in models[:2]
        )
        assert first == second, "a metric must not depend on what it measured before"
        assert first == self.measure(models[2], samples), "a metric must not draw at random"

    def test_a_measurement_says_what_was_measured_on_what(self) -> None:
        samples = self.samples()
        result = self.measure(self.model(), samples)
        assert (result.name, result.source) == (self.metric().name, samples.source)
        assert result.digest == samples.digest, "the digest is that of all samples"
        assert result.tokens == samples.tokens
        facts = result.as_dict()
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts, "a manifest holds it"
        assert facts["samples"] == len(samples)

    def test_the_model_is_left_unchanged(self) -> None:
        for training in (True, False):
            model = self.model().train(training)
            before = copy.deepcopy(model.state_dict())
            self.measure(model, self.samples())
            assert model.training is training, "the mode is restored"
            after = model.state_dict()
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_a_model_that_computes_no_numbers_has_no_figure(self) -> None:
        model = self.model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        try:
            result = self.measure(model, self.samples())
        except ModelError:
            return
        raise AssertionError(f"NaN must be refused with a ModelError, got {result}")

    def _check_equal(
        self, scores: tuple[float, ...], expected: tuple[float, ...], when: str
    ) -> None:
        assert len(scores) == len(expected)
        for score, wanted in zip(scores, expected, strict=True):
            close = math.isclose(score, wanted, rel_tol=self.tolerance, abs_tol=1e-9)
            assert close, f"the score {when} is {score}, not {wanted}"
