"""A tensor on disk is the tensor that was in memory, and is not in memory."""

import errno
import gc
import os

import pytest
import torch

from optimum_order.calibration.execution import InMemory
from optimum_order.calibration.spill import Spill
from optimum_order.errors import OutputError
from optimum_order.layers.statistics import Gram
from optimum_order.models.memory import trim
from optimum_order.models.units import find_units

MB = 2**20


def resident(kind: str) -> int:
    """Return the bytes of this process in memory: "RssAnon" its own, "RssFile" and "RssShmem" of files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))


def resident_of_files() -> int:
    return resident("RssFile") + resident("RssShmem")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_a_tensor_stays_the_object_and_the_bits_that_it_is(tmp_path, dtype):
    tensor = torch.randn(33, 65).mul(3).to(dtype)
    same = tensor
    before = tensor.clone()
    spill = Spill(tmp_path, limit=0)
    spill.rest([tensor])
    assert spill.spilled == tensor.nbytes
    assert spill.held == 0
    assert same is tensor
    assert torch.equal(tensor, before)
    assert tensor.is_contiguous()
    spill.wake([tensor])
    assert torch.equal(tensor, before), "its pages come back from the file"
    tensor.zero_()
    spill.wake([tensor])
    assert not tensor.any(), "as they were left"
    spill.rest([tensor])
    assert spill.spilled == tensor.nbytes, "once is enough"
    assert list(tmp_path.iterdir()) == [], "no file has a name"


def test_below_the_limit_a_tensor_stays_in_memory(tmp_path):
    spill = Spill(tmp_path, limit=1000)
    first, second, third = (torch.zeros(100) for _ in range(3))
    spill.rest([first, second])
    assert (spill.held, spill.spilled) == (800, 0)
    spill.rest([third])
    assert (spill.held, spill.spilled) == (800, 400)
    del first, third
    gc.collect()
    assert (spill.held, spill.spilled) == (400, 0)
    fourth, empty, strided = torch.zeros(100), torch.zeros(0), torch.zeros(300, 2).T
    spill.rest([fourth, empty, strided])
    assert (spill.held, spill.spilled) == (800, 0)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="only Linux says what is resident"
)
def test_a_tensor_on_disk_is_not_in_memory(tmp_path):
    spill = Spill(tmp_path, limit=0)
    tensors = [torch.ones(16 * MB // 4) for _ in range(4)]
    trim()
    own = resident("RssAnon")
    of_files = resident_of_files()
    spill.rest(tensors)
    trim()  # or the C library keeps the memory, if it has seen such sizes before
    assert resident("RssAnon") < own - 56 * MB
    assert resident_of_files() < of_files + 8 * MB
    assert all(bool((tensor == 1).all()) for tensor in tensors)
    assert resident_of_files() > of_files + 56 * MB
    spill.wake(tensors)
    assert resident_of_files() < of_files + 8 * MB


def test_no_room_is_an_error_and_no_signal(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = r"cannot be kept in .*: No space left on device\. Make room"
    with pytest.raises(OutputError, match=message):
        Spill(tmp_path, limit=0).rest([torch.zeros(3)])


class Spilling(InMemory):
    """Weights in memory, activations on disk."""

    def __init__(self, spill):
        self.rest = spill.rest
        self.wake = spill.wake


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_a_walk_sees_the_same_bits(make_model, batches, collect, halve, architecture, tmp_path):
    model = make_model(architecture)
    expected = collect(model, find_units(model), batches, halve).statistics
    for limit in (0, 5000, 10**9):
        spill = Spill(tmp_path, limit)
        model = make_model(architecture)
        spilled = []

        def change(visit, spill=spill, spilled=spilled):
            spilled.append(spill.spilled)
            halve(visit)

        units = find_units(model)
        walked = collect(model, units, batches, change, residency=Spilling(spill)).statistics
        assert walked.keys() == expected.keys()
        for name, statistics in expected.items():
            assert torch.equal(statistics[Gram], walked[name][Gram])
            assert statistics.tokens == walked[name].tokens
        assert any(spilled) == (limit < 10**9)
        assert spill.spilled == spill.held == 0, "nothing is alive after the walk"
