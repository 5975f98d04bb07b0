"""Discovery of plug-ins: ours by walking a folder, other packages' by entry point.

An exception that a plug-in raises while it is imported is not hidden.
"""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from optimum_order.errors import OptimumOrderError


def discover(package: ModuleType, base: type[Any], group: str) -> dict[str, Any]:
    """Return every plug-in of one kind by its `name`.

    A plug-in is a subclass of `base` that sets `name` in its own body; a class without one is a
    base of others.

    Args:
        package: The folder whose modules are searched.
        base: The class that every plug-in derives from.
        group: The entry-point group in which other packages declare theirs.

    Raises:
        OptimumOrderError: If an entry point is not a subclass of `base` with a name, or two classes
            share a name.
    """
    plugins: list[type[Any]] = []
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for member in vars(import_module(info.name)).values():
            own = inspect.isclass(member) and member.__module__ == info.name
            if own and issubclass(member, base) and "name" in vars(member):
                plugins.append(member)
    for point in entry_points(group=group):
        plugin = point.load()
        named = isinstance(getattr(plugin, "name", None), str)
        if not (inspect.isclass(plugin) and issubclass(plugin, base) and named):
            raise OptimumOrderError(
                f"Entry point '{point.name}' of '{group}' must be a {base.__name__} with a 'name', "
                f"got {plugin!r}."
            )
        plugins.append(plugin)
    by_name: dict[str, Any] = {}
    for plugin in plugins:
        first = by_name.setdefault(plugin.name, plugin)
        if first is not plugin:
            raise OptimumOrderError(
                f"Two plug-ins are called '{plugin.name}': {first.__module__} and "
                f"{plugin.__module__}. Uninstall one."
            )
    return dict(sorted(by_name.items()))
