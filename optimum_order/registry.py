"""Finding plug-ins: our own by walking a folder, other people's by entry point. Swallows no exception."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from optimum_order.errors import OptimumOrderError


def discover(package: ModuleType, base: type, group: str) -> dict[str, Any]:
    """Every concrete subclass of `base` in the modules of `package` and in the entry-point group, by its `name`.

    Raises:
        OptimumOrderError: If an entry point is not a subclass of `base`, or two classes share a name.
    """
    found: list[type] = []
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        members = vars(import_module(module.name)).values()
        found += [m for m in members if inspect.isclass(m) and m.__module__ == module.name]
    found = [
        cls for cls in found if issubclass(cls, base) and "name" in vars(cls)
    ]  # a name makes it a plug-in
    for point in entry_points(group=group):
        cls = point.load()
        if not (inspect.isclass(cls) and issubclass(cls, base)):
            raise OptimumOrderError(
                f"Entry point '{point.name}' of '{group}' must be a {base.__name__}, got {cls!r}."
            )
        found.append(cls)
    by_name: dict[str, Any] = {}
    for cls in found:
        other = by_name.setdefault(cls.name, cls)
        if other is not cls:
            raise OptimumOrderError(
                f"Two plug-ins are called '{cls.name}': {other.__module__} and {cls.__module__}. Uninstall one."
            )
    return dict(sorted(by_name.items()))
