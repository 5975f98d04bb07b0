"""Accuracy: the fraction of images that an image classifier puts into their true class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.data.samples import Images, Samples, without_labels
from optimum_order.errors import DataError, ModelError
from optimum_order.evaluation.base import Metric
from optimum_order.models import hf


class Accuracy(Metric):
    """Top-1 accuracy of an image classifier, from 0 to 1; higher is better."""

    name = "accuracy"
    summary = "fraction of images whose most likely class is the true one, for image classifiers"
    higher_is_better = True
    bounds = (0.0, 1.0)

    @classmethod
    def is_usual(cls, model: PreTrainedModel) -> bool:
        """Return whether transformers, or the model's own code, lists an image classifier."""
        classes = hf.auto_classes()["AutoModelForImageClassification"].values()
        names = {name for entry in classes for name in entry}
        declared = getattr(model.config, "auto_map", None) or {}
        return "AutoModelForImageClassification" in declared or any(
            base.__name__ in names for base in type(model).__mro__
        )

    def check(self, model: PreTrainedModel, samples: Samples) -> None:
        name = type(model).__name__
        if not self.is_usual(model):
            raise ModelError(
                f"Accuracy is for image classifiers, such as ViTForImageClassification; {name} has "
                "no head that gives an image's class. Load the checkpoint as one, or leave the "
                "evaluation out."
            )
        if not isinstance(samples, Images):
            raise DataError(
                f"Accuracy is measured on images, got {samples.source}, which are {samples.unit}s. "
                "Give images with labels."
            )
        super().check(model, samples)
        if samples.labels is None:
            raise DataError(
                f"The images of {samples.source} have no labels, and accuracy needs them. Give a "
                "folder with one subfolder for each class, a dataset with a column of labels, or "
                "(pixels, labels)."
            )
        classes = model.config.num_labels or 0
        wrong = samples.labels[(samples.labels < 0) | (samples.labels >= classes)]
        if len(wrong):
            raise DataError(
                f"{name} knows classes 0 to {classes - 1}, got label {int(wrong[0])} from "
                f"{samples.source}. Use the labels that the model was trained with."
            )

    def score(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = model(**without_labels(batch)).logits.float()
        right = (logits.argmax(-1) == batch["labels"]).float()
        # the largest of broken logits says nothing
        return right.masked_fill(~logits.isfinite().all(-1), torch.nan)
