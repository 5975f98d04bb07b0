"""Accuracy: the fraction of images that an image classifier puts into the class they belong to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_order.data.samples import Images, Samples
from optimum_order.errors import DataError, ModelError
from optimum_order.evaluation.base import Metric
from optimum_order.models import hf


class Accuracy(Metric):
    """Top-1 accuracy of an image classifier, from 0 to 1; higher is better."""

    name = "accuracy"
    summary = "fraction of images whose most likely class is the true one, for image classifiers"
    higher_is_better = True

    def check(self, model: PreTrainedModel, samples: Samples) -> None:
        if not classifies_images(model):
            raise ModelError(
                f"Accuracy is for image classifiers, such as ViTForImageClassification; {type(model).__name__} has no "
                "head that gives an image's class. Load the checkpoint as one, or leave the evaluation out."
            )
        if not isinstance(samples, Images):
            raise DataError(
                f"Accuracy is measured on images, got {samples.source}, which are {samples.unit}s."
            )
        super().check(model, samples)
        if samples.labels is None:
            raise DataError(
                f"The images of {samples.source} have no labels, and accuracy needs them. Give a folder with one "
                "subfolder for each class, a dataset with a column of labels, or (pixels, labels)."
            )
        classes = model.config.num_labels
        wrong = samples.labels[(samples.labels < 0) | (samples.labels >= classes)]
        if len(wrong):
            raise DataError(
                f"{type(model).__name__} knows classes 0 to {classes - 1}, got label {int(wrong[0])} from "
                f"{samples.source}. Use the labels that the model was trained with."
            )

    def score(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = model(**inputs).logits.float()
        right = (logits.argmax(-1) == batch["labels"]).float()
        return right.masked_fill(
            ~logits.isfinite().all(-1), torch.nan
        )  # the largest of broken logits says nothing


def classifies_images(model: PreTrainedModel) -> bool:
    """Whether transformers lists the model, or the model's own code declares it, as an image classifier."""
    classes = hf.auto_classes()["AutoModelForImageClassification"].values()
    names = {name for names in classes for name in names}
    declared = "AutoModelForImageClassification" in (getattr(model.config, "auto_map", None) or {})
    return declared or any(cls.__name__ in names for cls in type(model).__mro__)
