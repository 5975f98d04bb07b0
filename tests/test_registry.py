import importlib
import sys
import textwrap

import pytest

from optimum_order.backends import Method
from optimum_order.engine.recipe import available
from optimum_order.errors import OptimumOrderError
from optimum_order.registry import discover

GROUP = "optimum_order_test.plugins"


class Plugin:
    """What the packages below plug in."""


def write_package(folder, name, modules):
    package = folder / name
    package.mkdir()
    for module, code in {"__init__": "", **modules}.items():
        (package / f"{module}.py").write_text(textwrap.dedent(code))
    return package


def write_entry_point(folder, name, target, group=GROUP):
    """What pip leaves behind when it installs a package that declares an entry point."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that packages can be imported from; what was imported is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


HERE = f"from {__name__} import Plugin"


def test_a_file_in_the_folder_is_enough(site):
    write_package(
        site,
        "registry_folder",
        {
            "base": f"{HERE}\nclass Unnamed(Plugin): pass",
            "two": "from registry_folder.base import Unnamed\nclass Two(Unnamed): name = 'two'",
            "one": "from registry_folder.two import Two\nclass One(Two): name = 'one'\n"
            "class Other: name = 'other'",
        },
    )
    plugins = discover(importlib.import_module("registry_folder"), Plugin, GROUP)
    assert {name: cls.__name__ for name, cls in plugins.items()} == {"one": "One", "two": "Two"}
    assert list(plugins) == sorted(plugins)


def test_an_entry_point_is_enough(site):
    write_package(site, "registry_empty", {})
    write_package(site, "registry_guest", {"guest": f"{HERE}\nclass Guest(Plugin): name = 'guest'"})
    write_entry_point(site, "guest", "registry_guest.guest:Guest")
    plugins = discover(importlib.import_module("registry_empty"), Plugin, GROUP)
    assert {name: cls.__name__ for name, cls in plugins.items()} == {"guest": "Guest"}


def test_an_import_that_fails_is_not_hidden(site):
    write_package(site, "registry_broken", {"bad": "import a_module_that_is_not_there"})
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        discover(importlib.import_module("registry_broken"), Plugin, GROUP)


def test_an_entry_point_that_cannot_be_loaded_is_not_hidden(site):
    write_package(site, "registry_empty", {})
    write_entry_point(site, "lost", "registry_lost:Lost")
    with pytest.raises(ModuleNotFoundError, match="registry_lost"):
        discover(importlib.import_module("registry_empty"), Plugin, GROUP)


def test_an_entry_point_of_the_wrong_kind_is_named(site):
    write_package(site, "registry_empty", {})
    code = f"{HERE}\nclass Wrong: name = 'wrong'\nclass Nameless(Plugin): pass"
    write_package(site, "registry_wrong", {"wrong": code})
    for target in ("Wrong", "Nameless"):
        write_entry_point(site, target, f"registry_wrong.wrong:{target}", f"{GROUP}.{target}")
        error = f"'{target}' of '.*' must be a Plugin with a 'name', got <class .*{target}"
        with pytest.raises(OptimumOrderError, match=error):
            discover(importlib.import_module("registry_empty"), Plugin, f"{GROUP}.{target}")


def test_two_of_one_name_are_named(site):
    write_package(site, "registry_twins", {"a": f"{HERE}\nclass A(Plugin): name = 'twin'"})
    write_package(site, "registry_guest", {"guest": f"{HERE}\nclass Guest(Plugin): name = 'twin'"})
    write_entry_point(site, "guest", "registry_guest.guest:Guest")
    with pytest.raises(
        OptimumOrderError, match=r"called 'twin': registry_twins\.a and registry_guest\.guest"
    ):
        discover(importlib.import_module("registry_twins"), Plugin, GROUP)


def test_every_method_of_this_package_is_discovered():
    methods = available()
    assert {"magnitude", "wanda", "sparsegpt", "rtn", "gptq", "mixed_precision"} <= set(methods)
    for name, cls in methods.items():
        assert cls.name == name
        assert issubclass(cls, Method)
        assert cls.summary
