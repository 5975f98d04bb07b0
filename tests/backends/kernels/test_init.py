import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from optimum_order.backends import kernels

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU and with Triton: `gpu(capability, error)`."""

    def make(capability=(9, 0), error=None):
        def target():
            if error:
                raise error

        runtime = ModuleType("triton.runtime")
        runtime.driver = SimpleNamespace(active=SimpleNamespace(get_current_target=target))
        monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
        monkeypatch.setitem(sys.modules, "triton.runtime", runtime)
        monkeypatch.setattr(kernels, "find_spec", lambda name: object())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        kernels._has_driver.cache_clear()

    yield make
    kernels._has_driver.cache_clear()


def test_kernels_run_on_gpus_that_triton_supports(gpu):
    gpu()
    assert kernels.available(CUDA)
    assert not kernels.available(torch.device("cpu"))
    gpu(capability=(7, 5))
    assert not kernels.available(CUDA)


def test_kernels_run_on_no_other_gpu_than_those_of_nvidia(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert not kernels.available(CUDA)


def test_kernels_do_not_run_without_triton(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert not kernels.available(CUDA)


def test_a_machine_without_a_compiler_is_told_once(gpu, caplog):
    gpu(error=RuntimeError("Failed to find C compiler"))
    with caplog.at_level(logging.WARNING):
        assert not kernels.available(CUDA)
        assert not kernels.available(CUDA)
    (record,) = caplog.records
    assert "Failed to find C compiler" in record.getMessage()
