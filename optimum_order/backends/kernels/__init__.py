"""Kernels for GPUs in Triton, which comes with the builds of PyTorch for GPUs.

A module of this folder imports Triton, so import the module only where `available` says so.
"""

from __future__ import annotations

import logging
import subprocess
from functools import cache
from importlib.util import find_spec

import torch

logger = logging.getLogger(__name__)

_CAPABILITY = (8, 0)
"""The least compute capability that Triton supports, of NVIDIA's GPUs: no other was tried."""


def available(device: torch.device) -> bool:
    """Return whether kernels run on a device."""
    if device.type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _CAPABILITY and _has_driver()


@cache
def _has_driver() -> bool:
    """Return whether Triton can build its driver; that takes a C compiler and Python's headers."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("Triton does not work here, so sweeps on the GPU are slower: %s", error)
        return False
    return True
