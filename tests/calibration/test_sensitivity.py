"""Gradients of outputs block by block are those of one backward pass over the whole model."""

import pytest
import torch
from torch import nn

from optimum_order.calibration.sensitivity import (
    added_losses,
    divergence,
    drawn,
    output_sensitivities,
    single_samples,
)
from optimum_order.errors import ModelError
from optimum_order.models.units import find_units


def plain(model, units, samples):
    """Return the same as `output_sensitivities`, all activations of the model in memory."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    rows = {}
    for number, sample in enumerate(samples):
        outputs = {}
        handles = [
            target.module.register_forward_hook(
                lambda _, args, result, name=target.name, to=outputs: to.update({name: result})
            )
            for unit in units
            for target in unit.targets
        ]
        output = model(**sample)
        for handle in handles:
            handle.remove()
        loss = divergence(output, torch.Generator().manual_seed(number))
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            channels = gradient.movedim(1, -1) if gradient.ndim == 4 else gradient
            rows.setdefault(name, []).append(channels.flatten(0, -2).square().mean(0))
    return {name: torch.stack(values) for name, values in rows.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "vit", "resnet"])
def test_gradients_are_those_of_the_whole_model(
    make_model, make_image_model, batches, image_batches, architecture
):
    images = architecture in ("vit", "resnet")
    model = (make_image_model if images else make_model)(architecture).eval()
    units = find_units(model)
    samples = list(single_samples(image_batches if images else batches))[:2]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    sensitivities = output_sensitivities(model, units, samples)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    expected = plain(model, units, samples)
    assert set(sensitivities) == set(expected)
    for name, rows in expected.items():
        assert rows.any(), name
        torch.testing.assert_close(sensitivities[name], rows, rtol=1e-3, atol=1e-9, msg=name)


def test_a_forward_of_an_instance_is_called_and_stays(make_model, batches):
    model = make_model("llama")
    block = find_units(model)[0].module
    calls = []
    original = block.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = forward
    output_sensitivities(model, find_units(model), list(single_samples(batches))[:1])
    assert block.forward is forward
    assert len(calls) == 2  # once more in the backward pass


def test_labels_are_drawn_as_the_model_predicts():
    chances = torch.tensor([0.5, 0.3, 0.2, 0.0])
    rows = chances.log().expand(20000, 4)
    labels = drawn(rows, torch.Generator().manual_seed(0))
    frequencies = torch.bincount(labels, minlength=4) / len(labels)
    torch.testing.assert_close(frequencies, chances, rtol=0, atol=0.015)
    assert not frequencies[3]


def test_samples_come_one_by_one():
    batches = [{"x": torch.arange(3)[:, None]}, {"x": torch.arange(3, 5)[:, None]}]
    assert [int(sample["x"]) for sample in single_samples(batches)] == [0, 1, 2, 3, 4]
    assert [int(sample["x"]) for sample in single_samples(batches, last=True)] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_the_loss_grows_with_the_change_and_weights_are_put_back(make_model, batches, architecture):
    model = make_model(architecture)
    units = find_units(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    noise = torch.Generator().manual_seed(0)

    def disturbed(size):
        def rewrite(name, weight):
            return weight + size * weight.std() * torch.randn(weight.shape, generator=noise)

        return rewrite

    samples = list(single_samples(batches))[:2]
    table = added_losses(model, units, samples, [lambda name, weight: weight, disturbed(3.0)])
    assert max(table[0], key=abs) == 0 < min(table[1])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_model_without_logits_is_measured_by_its_outputs(make_model, batches):
    base = make_model("bert").base_model
    units = find_units(base)
    samples = list(single_samples(batches))[:2]
    sensitivities = output_sensitivities(base, units, samples)
    assert sensitivities and all(rows.isfinite().all() for rows in sensitivities.values())
    table = added_losses(base, units, samples, [lambda n, w: w, lambda n, w: nn.functional.relu(w)])
    assert max(table[0]) < 1e-6 < min(table[1])


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "NaN or infinite"), (0.0, "no gradient")]
)
def test_gradients_that_say_nothing_are_refused(make_model, batches, value, words):
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(value)
    samples = list(single_samples(batches))[:1]
    with pytest.raises(ModelError, match=words) as error:
        output_sensitivities(model, find_units(model), samples)
    assert "sensitivity=none" in str(error.value) and "\n" not in str(error.value)
    assert all(parameter.requires_grad for parameter in model.parameters())
