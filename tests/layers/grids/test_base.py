import ast
from pathlib import Path

import pytest
import torch

import optimum_order
from optimum_order.layers.grids.base import check_alike, whole_groups
from optimum_order.layers.grids.bitsandbytes import BlockGrid, RowGrid, fit_rows
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.testing import gaussian


def test_groups_may_come_in_any_order_and_twice():
    owners = torch.tensor([2, 2, 0, 0, 2, 2])
    assert whole_groups(owners, 2).tolist() == [2, 0, 2]
    assert whole_groups(owners, 1).tolist() == owners.tolist()


def test_the_broken_group_is_named():
    for owners, name in [([0, 0, 1], 1), ([0, 0, 1, 2], 1), ([3, 1, 1, 1], 3)]:
        with pytest.raises(ValueError, match=f"breaks block {name}: the 2 weights of a block"):
            whole_groups(torch.tensor(owners), 2, "block")


def test_nothing_is_not_a_grid():
    with pytest.raises(ValueError, match="select at least one row and column"):
        whole_groups(torch.tensor([], dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="at least one grid, got none"):
        check_alike([])


def test_only_uniform_codes_are_cheap():
    assert UniformGrid.codes_are_cheap
    assert not BlockGrid.codes_are_cheap and not RowGrid.codes_are_cheap


def test_a_layout_without_groups_of_inputs_has_no_group_size():
    assert fit_rows(gaussian(4, 64))[0].group_size is None


def test_only_layers_backends_and_codecs_ask_which_grid_it_is():
    """Everything else takes any grid, a third party's too."""
    root = Path(optimum_order.__file__).parent
    imports = []
    for file in root.rglob("*.py"):
        part = file.relative_to(root).parts[0]
        if part in ("layers", "backends", "formats", "testing.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imports += [
                f"{file.relative_to(root)} imports {name}"
                for name in names
                if name.startswith("optimum_order.layers.grids.") and not name.endswith(".base")
            ]
    assert imports == []
