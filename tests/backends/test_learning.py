"""The loop of what learns: which samples, which rate, which loss, and which state is the result."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_order.backends.learning import Student, _split
from optimum_order.engine.recipe import method
from optimum_order.layers.state import LayerState
from optimum_order.models.units import find_targets
from optimum_order.order import Stage

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
NAME = "model.layers.0.mlp.down_proj"


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


class Scaled(Student):
    """Learns one factor for one layer."""

    def __init__(self, model, states, teacher):
        super().__init__(model, states, teacher)
        self.learned["factor"] = torch.nn.Parameter(torch.tensor(1.0))

    def effective(self, name):
        return self.states[name].weight.float() * self.learned["factor"]

    def after(self):
        return {
            name: LayerState(self.effective(name).detach().to(state.weight.dtype))
            for name, state in self.states.items()
        }


def student(model, teacher):
    return Scaled(model, {NAME: LayerState(model.get_submodule(NAME).weight.detach())}, teacher)


def ids(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 48, (samples, 12), generator=generator)


def test_samples_are_learned_from_in_parts():
    batch = {"input_ids": ids(10), "attention_mask": torch.ones(10, 12)}
    parts = _split(batch, 4)
    assert [len(part["input_ids"]) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])


def test_the_rate_warms_up_and_falls_to_a_tenth():
    learner = method(Stage("refit", steps=200))
    parts = [learner._part_of_rate(step) for step in range(201)]
    assert parts[0] == pytest.approx(0.1, abs=0.02) and max(parts) == pytest.approx(1)
    assert parts.index(max(parts)) in (9, 10)
    assert all(one >= other for one, other in itertools.pairwise(parts[10:]))
    assert parts[-1] == pytest.approx(0.1)


def test_the_loss_is_the_divergence_of_the_tokens_that_are_no_padding():
    model, teacher = llama(), llama(seed=1)
    inputs = ids(2)
    mask = torch.ones_like(inputs)
    mask[1, 5:] = 0
    with torch.no_grad():
        p, q = (
            m(input_ids=inputs, attention_mask=mask).logits.double().log_softmax(-1)
            for m in (teacher, model)
        )
    rows = (p.exp() * (p - q)).sum(-1)
    learner = student(model, teacher)
    masked = learner.measured([{"input_ids": inputs, "attention_mask": mask}])
    assert masked == pytest.approx(rows[mask.bool()].mean().item(), rel=1e-3)
    alone = learner.measured([{"input_ids": inputs[:1]}])
    assert alone == pytest.approx(rows[0].mean().item(), rel=1e-3)


def test_a_student_learns_the_factor_that_was_lost_and_leaves_the_model_alone():
    teacher, model = llama(), llama()
    layer = model.get_submodule(NAME)
    layer.weight.data *= 0.5
    before = layer.weight.clone()
    learner = student(model, teacher)
    batch = {"input_ids": ids(8)}
    first = learner.measured([batch])
    optimizer = torch.optim.Adam(learner.parameters, lr=0.05)
    for _ in range(60):
        learner.step(batch, optimizer)
    assert learner.learned["factor"].item() == pytest.approx(2, abs=0.1)
    assert learner.measured([batch]) < 0.05 * first
    assert torch.equal(layer.weight, before)
    best = learner.learned_so_far()
    learner.learned["factor"].data.fill_(9.0)
    learner.load(best)
    assert learner.learned["factor"].item() == pytest.approx(2, abs=0.1)
    assert isinstance(learner.model.get_submodule(NAME).weight, torch.nn.Parameter), "put back"


def test_a_loss_that_is_no_number_is_infinite():
    model = llama()
    learner = student(model, llama(seed=1))
    learner.learned["factor"].data.fill_(float("nan"))
    assert learner.measured([{"input_ids": ids(2)}]) == float("inf")


def test_activations_within_a_block_are_computed_again_with_the_same_gradients():
    """Transformers' own checkpointing would need training mode, and with it dropout."""
    batch = {"input_ids": ids(4)}
    distill = method(Stage("distill", 1))
    model = llama()
    states = {t.name: LayerState(t.read()) for t in find_targets(model)}

    def held_and_gradients(again):
        learner = distill.student(model, states, llama(seed=1))
        if not again:
            del learner.model.model.layers[0].forward
        held = 0

        def count(tensor):
            nonlocal held
            held += tensor.numel()
            return tensor

        with learner._installed():
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                loss = learner._loss(batch)
            loss.backward()
        return held, {name: p.grad for name, p in learner.learned.items()}

    less, gradients = held_and_gradients(again=True)
    more, expected = held_and_gradients(again=False)
    assert all(gradient.any() for gradient in gradients.values())
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())
    mlp = 4 * 12 * 3 * 24  # three tensors that an MLP holds otherwise
    assert less < more - mlp
