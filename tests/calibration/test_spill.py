"""What lies on disk is what lay in memory, and is not in memory."""

import errno
import gc
import mmap
import os

import pytest
import torch

from optimum_order.calibration.spill import Spill, drop
from optimum_order.calibration.walk import walk
from optimum_order.errors import OutputError
from optimum_order.layers.statistics import Gram
from optimum_order.models.memory import trim
from optimum_order.models.units import find_units

MB = 2**20


def resident(kind: str) -> int:
    """Bytes of this process that are in memory: "RssAnon" its own, "RssFile" and "RssShmem" of files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_a_tensor_stays_the_object_and_the_bits_that_it_is(tmp_path, dtype):
    tensor = torch.randn(33, 65).mul(3).to(dtype)
    same, before = tensor, tensor.clone()
    spill = Spill(tmp_path, limit=0)
    maps = spill.rest([tensor])
    assert len(maps) == 1 and spill.spilled == tensor.nbytes and spill.held == 0
    assert same is tensor and torch.equal(tensor, before) and tensor.is_contiguous()
    drop(maps)
    assert torch.equal(tensor, before), "its pages come back from the file"
    tensor.neg_() if dtype is torch.float32 else tensor.zero_()
    drop(maps)
    assert torch.equal(tensor, -before if dtype is torch.float32 else torch.zeros_like(before)), (
        "as they were left"
    )
    assert spill.rest([tensor]) == maps and spill.spilled == tensor.nbytes, "once is enough"
    assert list(tmp_path.iterdir()) == [], "no file has a name"


def test_below_the_limit_it_stays_in_memory(tmp_path):
    spill = Spill(tmp_path, limit=1000)
    one, other, third = (torch.zeros(100) for _ in range(3))
    assert spill.rest([one, other]) == [] and spill.held == 800
    assert len(spill.rest([third])) == 1 and (spill.held, spill.spilled) == (800, 400)
    del one, third
    gc.collect()
    assert (spill.held, spill.spilled) == (400, 0)
    fourth, empty, strided = torch.zeros(100), torch.zeros(0), torch.zeros(300, 2).T
    assert spill.rest([fourth, empty, strided]) == [] and spill.held == 800


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_DONTNEED"), reason="only Linux says how much is resident"
)
def test_it_is_not_in_memory(tmp_path):
    spill, tensors = Spill(tmp_path, limit=0), [torch.ones(16 * MB // 4) for _ in range(4)]
    trim()
    own, files = resident("RssAnon"), resident("RssFile") + resident("RssShmem")
    maps = spill.rest(tensors)
    trim()  # or the C library keeps it, if it has seen such sizes before
    assert resident("RssAnon") < own - 56 * MB
    assert resident("RssFile") + resident("RssShmem") < files + 8 * MB
    assert all(bool((tensor == 1).all()) for tensor in tensors)
    assert resident("RssFile") + resident("RssShmem") > files + 56 * MB
    drop(maps)
    assert resident("RssFile") + resident("RssShmem") < files + 8 * MB


def test_no_room_is_an_error_and_no_signal(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        OutputError, match=r"cannot be kept in .*: No space left on device\. Make room"
    ):
        Spill(tmp_path, limit=0).rest([torch.zeros(3)])


@pytest.mark.parametrize("limit", [0, 5000, 10**9])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_a_walk_sees_the_same_bits(make_model, batches, architecture, limit, tmp_path):
    found, spilled = {}, []
    for spill in (None, Spill(tmp_path, limit)):
        model, seen = make_model(architecture), {}

        def visit(at, seen=seen, spill=spill):
            seen.update(at.statistics)
            if spill:
                spilled.append(spill.spilled)
            for target in at.unit.targets:
                target.write(target.read() * 0.5)

        walk(model, find_units(model), batches, visit, gram=True, spill=spill)
        found[spill] = seen
    plain, other = found.values()
    assert plain.keys() == other.keys()
    for name, statistics in plain.items():
        assert (
            torch.equal(statistics[Gram], other[name].gram)
            and statistics.tokens == other[name].tokens
        )
    assert any(spilled) == (limit < 10**9)
    assert spill.spilled == spill.held == 0, "nothing is alive after the walk"
