"""`optimum-order env`: what a bug report needs to know of this machine."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

from optimum_order.cli.base import Command
from optimum_order.cli.tables import console
from optimum_order.files import size

_ENGINES = {
    "transformers": "transformers",
    "peft": "peft",
    "vllm": "vllm",
    "llama.cpp": "llama-cpp-python",
    "GPTQModel": "gptqmodel",
}
"""The packages of the engines that load what is saved."""
_NOT_FOR_USERS = ("all", "dev", "docs")
_UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "sve", "bf16")
"""Units of a processor that decide how fast a run is, as Linux calls them."""


class EnvCommand(Command):
    """Prints versions and hardware, and nothing that names a person or a path."""

    name = "env"
    summary = "show versions, devices and what is installed, for a bug report"
    description = """\
Show what a bug report needs: versions, processor, memory, devices, installed
extras and engines. No path and no name of a user is among them.
"""

    def work(self) -> dict[str, Any]:
        import psutil
        import torch

        from optimum_order.artifact import manifest

        cuda = torch.cuda
        return {
            "versions": manifest.versions(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "processor": {
                "name": _processor(),
                "units": _units(),
                "torch": torch.backends.cpu.get_cpu_capability(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
            },
            "memory": {
                "total": psutil.virtual_memory().total,
                "available": psutil.virtual_memory().available,
            },
            "devices": [
                {
                    "name": f"cuda:{index} {cuda.get_device_name(index)}",
                    "memory": cuda.get_device_properties(index).total_memory,
                }
                for index in range(cuda.device_count())
            ],
            "extras": _extras(),
            "engines": {name: _version(package) for name, package in _ENGINES.items()},
        }

    def show(self, result: dict[str, Any]) -> None:
        from rich.table import Table

        processor = result["processor"]
        units = ", ".join(processor["units"]) or "none that matter"
        devices = [f"{device['name']}, {size(device['memory'])}" for device in result["devices"]]
        missing = [name for name, is_there in result["extras"].items() if not is_there]
        extras = ", ".join(name for name, is_there in result["extras"].items() if is_there)
        engines = [f"{name} {number}" for name, number in result["engines"].items() if number]
        memory = result["memory"]
        table = Table(show_header=False)
        for name, text in (
            ("versions", ", ".join(f"{k} {v}" for k, v in result["versions"].items())),
            ("system", result["system"]),
            ("processor", f"{processor['name']}, {processor['cores']} cores"),
            ("units", f"{units}; torch uses {processor['torch']}"),
            ("threads", str(processor["threads"])),
            ("memory", f"{size(memory['available'])} of {size(memory['total'])} available"),
            ("devices", ", ".join(devices) or "none but the processor"),
            ("extras", (extras or "none") + (f"; not: {', '.join(missing)}" if missing else "")),
            ("engines", ", ".join(engines)),
        ):
            table.add_row(name, text)
        console().print(table)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _units() -> list[str]:
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            return [unit for unit in _UNITS if unit in flags]
    return []


def _cpuinfo() -> list[str]:
    if sys.platform != "linux":
        return []
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _extras() -> dict[str, bool]:
    """Return each extra of this package, and whether all that it brings is installed."""
    from packaging.requirements import Requirement

    try:
        facts = metadata("optimum-order")
    except PackageNotFoundError:  # a clone that was not installed
        return {}
    names = [name for name in facts.get_all("Provides-Extra") or [] if name not in _NOT_FOR_USERS]
    extras = dict.fromkeys(sorted(names), True)
    for requirement in map(Requirement, facts.get_all("Requires-Dist") or []):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            continue
        for name in names:
            if marker.evaluate({"extra": name}) and requirement.name != "optimum-order":
                extras[name] &= _version(requirement.name) is not None
    return extras
