"""LoRA: adapters come nearer to the original; weights, masks and grids stay, bit for bit."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from optimum_order import CompressedModel, JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.backends.lora import Lora
from optimum_order.engine.recipe import method
from optimum_order.errors import OrderError
from optimum_order.layers.low_rank import LowRank
from optimum_order.layers.state import LayerState
from optimum_order.order import Stage
from optimum_order.testing import gaussian


@pytest.mark.parametrize(
    "order",
    [
        "magnitude:0.5",
        "rtn(bits=3, group_size=32)",
        "magnitude:0.4 > rtn(bits=4, group_size=-1)",
        "width:0.5",
    ],
)
def test_the_model_comes_nearer_and_the_weights_stay(order, learning):
    mine = learning.compressor()
    before = mine.compress(order, progress=False)
    after = mine.compress(f"{order} > lora(steps=60, rate=0.005)", progress=False)
    original = learning.make()
    part = learning.divergence(after.model, original) / learning.divergence(before.model, original)
    assert part < 0.8
    for name, state in after.layers.items():
        state.check(name)
        earlier = before.layers[name]
        assert torch.equal(state.weight, earlier.weight), name
        assert torch.equal(state.mask, earlier.mask), name
        assert (state.grid is None) is (earlier.grid is None)
        assert state.adapter.rank == 8 and state.adapter.a.dtype == torch.float16
        assert "on samples that were held back" in state.notes[-1]


def test_it_goes_on_from_an_adapter_that_is_there(learning):
    """The first loss is that of the adapter of eora, and ranks are those that it has."""
    mine = learning.compressor()
    order = "rtn(bits=2, group_size=32) > eora(rank=4, targets=*.mlp.*)"
    before = mine.compress(order, progress=False)
    after = mine.compress(f"{order} > lora(steps=40, rank=2, rate=0.005)", progress=False)
    original = learning.make()
    assert learning.divergence(after.model, original) < learning.divergence(before.model, original)
    for name, state in after.layers.items():
        assert state.adapter.rank == (4 if ".mlp." in name else 2), name
        if ".mlp." in name:
            start, end = before.layers[name].adapter.product(), state.adapter.product()
            assert (end - start).norm() < start.norm(), "a part of the way from where it was"
            assert not torch.equal(start, end)


def test_the_first_loss_is_that_of_the_model_as_it_computes(learning):
    """Neither is the adapter of eora added twice, nor left out."""
    losses = {}
    mine = learning.compressor()
    for order in ("rtn(bits=2, group_size=32)", "rtn(bits=2, group_size=32) > eora:8"):
        compressed = mine.compress(f"{order} > lora(steps=10, rate=0.002)", progress=False)
        note = next(iter(compressed.layers.values())).notes[-1]
        losses[order] = float(note.split("loss ")[1].split(" to ")[0])
    plain, with_eora = losses.values()
    assert with_eora < 0.9 * plain


def test_what_is_saved_is_what_was_learned(tmp_path, learning):
    mine = learning.compressor(dtype=torch.bfloat16)
    compressed = mine.compress(
        "rtn(bits=4, group_size=32) > lora(steps=20, rate=0.005)", progress=False
    )
    compressed.save_pretrained(tmp_path / "out")
    assert verify(tmp_path / "out") == []
    again = CompressedModel.from_pretrained(tmp_path / "out", device="cpu")
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, compressed.model(ids).logits)
    assert all(state.adapter.a.dtype == torch.bfloat16 for state in again.layers.values())


def test_experts_have_no_place_for_an_adapter(learning):
    compressed = learning.compressor(experts=True).compress(
        "rtn(bits=3, group_size=32) > lora(steps=10, rate=0.002)", progress=False
    )
    adapted = {name for name, state in compressed.layers.items() if state.adapter is not None}
    assert adapted == {name for name in compressed.layers if ".self_attn." in name}


def test_the_same_seed_starts_the_same(learning):
    def learned(seed):
        stage = f"lora(steps=5, rate=0.002, seed={seed})"
        made = learning.compressor().compress(
            f"rtn(bits=3, group_size=32) > {stage}", progress=False
        )
        return next(iter(made.layers.values())).adapter.a

    assert torch.equal(learned(0), learned(0))
    assert not torch.equal(learned(0), learned(1))


def test_what_is_not_allowed_is_one_line(tmp_path, learning):
    with pytest.raises(OrderError, match="must give 'steps'"):
        method(Stage.parse("lora"))
    mine = learning.compressor()
    with pytest.raises(OrderError, match="is not less than 32"):
        mine.compress("rtn(bits=4, group_size=32) > lora(steps=5, rank=32)", progress=False)


def test_its_bytes_are_foreseen(tmp_path, learning):
    mine = learning.compressor()
    order = "rtn(bits=4, group_size=32) > lora(steps=5, rank=3)"
    compressed = mine.compress(order, progress=False)
    compressed.save_pretrained(tmp_path / "out", format="compressed-tensors")
    assert compressed.manifest["bytes"]["after"] == mine.result_bytes(order, "compressed-tensors")


def test_what_is_tried_has_the_rank_and_keeps_an_adapter():
    lora = method(Stage.parse("lora(steps=5, rank=3)"))
    assert isinstance(lora, Lora)
    tried = lora.tried(LayerState(gaussian(16, 32)))
    assert tried.adapter.a.shape == (3, 32) and tried.adapter.b.shape == (16, 3)
    adapter = LowRank.rounded(gaussian(5, 32), gaussian(16, 5), torch.float16)
    state = LayerState(gaussian(16, 32), adapter=adapter)
    assert lora.tried(state) is state


def test_a_model_without_linear_layers_is_told_so():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)).eval()
    for stage in ("eora:4", "lora:4"):
        with pytest.raises(OrderError, match="treats no layer of this model: .* conv1d. Leave"):
            JointCompressor(model, calibration=torch.zeros(2, 1024, dtype=torch.long)).compress(
                f"rtn:4 > {stage}", progress=False
            )
