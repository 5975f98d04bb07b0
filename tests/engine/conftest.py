"""What the tests of a run share: a run of an order in text, and three tiny plug-ins."""

import dataclasses

import pytest
import torch

from optimum_order.backends import Recovery, Reshaper, Transform, option
from optimum_order.backends.base import Cut
from optimum_order.calibration.execution import Execution
from optimum_order.engine import recipe as recipes
from optimum_order.engine import snapshot
from optimum_order.engine.recipe import Recipe
from optimum_order.engine.run import Subject
from optimum_order.engine.run import run as run_recipe
from optimum_order.layers.statistics import SquaredNorms
from optimum_order.models.units import find_units
from optimum_order.order import Order


@pytest.fixture(scope="session")
def run():
    """`run(model, "wanda:0.5 > gptq:4", batches, "block", pause="group", ignore=[...])`."""

    def run_order(model, order, batches=(), schedule="stage", **options):
        chosen = {key: options.pop(key) for key in ("targets", "ignore") if key in options}
        passed = {key: options.pop(key) for key in ("start", "work") if key in options}
        original = options.pop("original", None)
        units = find_units(model, **chosen)
        recipe = Recipe.of(Order.of(order), schedule)
        recipe.check(units, calibrated=bool(batches))
        subject = Subject(model, units, batches, original)
        return run_recipe(subject, recipe, Execution(**options), **passed)

    return run_order


@pytest.fixture(scope="session")
def weights_of():
    """`weights_of(model)`: the weights of all layers by name."""

    def read(model):
        return {t.name: t.read() for unit in find_units(model) for t in unit.targets}

    return read


@pytest.fixture(scope="session")
def equal():
    """`equal(weights, others)`: whether two mappings hold the same bits."""

    def compare(one, other):
        return one.keys() == other.keys() and all(
            torch.equal(one[name], other[name]) for name in one
        )

    return compare


def mlp(block, part):
    return f"{block}.mlp.{part}_proj"


class NarrowMLP(Reshaper):
    """Keeps the channels of an MLP whose inputs of `down_proj` are the largest."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        fraction: float = option(0.5, "fraction of the channels that remain")

    name = "narrow"
    summary = "make the MLPs narrower"
    needs = frozenset({SquaredNorms})

    def sizes(self, roles, config):
        return {"intermediate_size": int(self.options.fraction * config.intermediate_size)}

    def cuts(self, block, states, statistics):
        block = block.name
        norms = statistics[mlp(block, "down")][SquaredNorms]
        count = int(self.options.fraction * len(norms))
        index = norms.topk(count).indices.sort().values
        return [
            Cut(mlp(block, "gate"), 0, index),
            Cut(mlp(block, "up"), 0, index),
            Cut(mlp(block, "down"), 1, index),
        ]


class NarrowMLPBlindly(NarrowMLP):
    """Keeps the first channels, and needs no data."""

    name = "narrow_blindly"
    summary = "make the MLPs narrower without data"
    needs = frozenset()

    def cuts(self, block, states, statistics):
        assert not statistics
        block = block.name
        rows = len(states[mlp(block, "up")].weight)
        index = torch.arange(int(self.options.fraction * rows))
        return [
            Cut(mlp(block, "gate"), 0, index),
            Cut(mlp(block, "up"), 0, index),
            Cut(mlp(block, "down"), 1, index),
        ]


class PermuteMLP(Transform):
    """Reverses the channels between two layers of an MLP, and scales one side if told so."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        scale: float = option(1.0, "what the rows are multiplied with")

    name = "permute"
    summary = "permute the channels of the MLPs"
    needs = frozenset()

    def transform(self, model):
        for layer in model.model.layers:
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight.copy_(part.weight.flip(0) * self.options.scale)
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight.flip(1))


class RefitRows(Recovery):
    """Scales each row of a layer so that it is nearest to the original row."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        spoil: str = option("nothing", "the promise that is broken")

    name = "mend"
    summary = "fit a scale of each row"
    needs = frozenset()
    needs_data = False

    def recover(self, model, states, batches, teacher):
        originals = {t.name: t.read() for unit in find_units(teacher) for t in unit.targets}
        return {name: self._fitted(state, originals[name]) for name, state in states.items()}

    def _fitted(self, state, original):
        weight = state.weight
        size = weight.square().sum(1, keepdim=True)
        scale = ((weight * original).sum(1, keepdim=True) / size.clamp(min=1e-12)).abs()
        grid = state.grid
        pruned = state.pruned
        if grid is None:
            weight = weight * scale
        else:
            codes = grid.quantize(weight)
            grid = dataclasses.replace(grid, scale=grid.scale * scale)
            if self.options.spoil == "codes":
                codes = codes.roll(1, 0)
            weight = grid.dequantize(codes)
        if self.options.spoil == "mask":
            pruned = torch.zeros_like(weight, dtype=torch.bool)
        if self.options.spoil == "grid":
            grid = None
        return dataclasses.replace(state, weight=weight, pruned=pruned, grid=grid)


@pytest.fixture
def plugins(monkeypatch):
    """The three plug-ins as if they were installed, by name."""
    ours = [NarrowMLP, NarrowMLPBlindly, PermuteMLP, RefitRows]
    methods = {**recipes.available(), **{cls.name: cls for cls in ours}}
    monkeypatch.setattr(recipes, "available", lambda: methods)
    return {cls.name: cls for cls in ours}


@pytest.fixture
def killed_after(monkeypatch):
    """`killed_after(2)`: let two more files be written, then raise; gives the names of all files.

    What is raised is `killed_after.Killed`.
    """

    class Killed(BaseException):
        pass

    save = snapshot.save
    saved = []
    remaining = 0

    def write(value, file, **options):
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            raise Killed
        saved.append(file.name)
        return save(value, file, **options)

    def allow(files):
        nonlocal remaining
        remaining = files
        return saved

    monkeypatch.setattr(snapshot, "save", write)
    allow.Killed = Killed
    return allow
