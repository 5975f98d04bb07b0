"""Draws share no sample, and the source is read once for all of them."""

import itertools

import pytest
import torch

from optimum_order.data.draws import Draws, choose, shortage, spread
from optimum_order.data.samples import Windows
from optimum_order.errors import DataError


def numbered(count: int, note: str = "") -> Windows:
    """Samples that are told apart by their number."""
    return Windows(torch.arange(count).view(count, 1), "made up", note=note)


def numbers(samples: Windows) -> list[int]:
    return samples.ids.flatten().tolist()


@pytest.fixture
def source():
    """30 samples in the order of a seed, and the sizes it was asked for."""
    order = choose(30, None, seed=1)

    def load(count: int) -> Windows:
        load.reads.append(count)
        return numbered(30, "a note").take(order[:count])

    load.reads = []
    return load


def test_draws_are_disjoint_and_read_once(source):
    draws = Draws(source, 10)
    last = numbers(draws.take(2))
    parts = [numbers(draws.take(draw)) for draw in range(3)]
    assert source.reads == [30]
    joined = list(itertools.chain(*parts))
    assert parts[2] == last and sorted(joined) == list(range(30))
    assert joined == choose(30, None, seed=1).tolist()


def test_a_draw_does_not_depend_on_how_many_are_read(source):
    few = Draws(source, 10)
    first = few.take(0)
    assert source.reads == [10] and first.note == "a note"
    many = Draws(source, 10)
    many.take(2)
    assert numbers(many.take(0)) == numbers(first)
    assert numbers(few.take(1)) == numbers(many.take(1)) and source.reads == [10, 30, 20]


def test_the_first_few_samples_of_a_draw(source):
    draws = Draws(source, 10)
    whole = numbers(draws.take(1))
    assert numbers(draws.take(1, 3)) == whole[:3]
    assert numbers(draws.take(1, 99)) == whole, "a draw never reaches into the next"


def test_a_short_source_is_a_draw_but_not_two(source):
    assert numbers(Draws(source, 99).take(0)) == numbers(source(30))
    message = "made up has 30 windows, enough for 2 disjoint draws of 12, and 3 are needed"
    with pytest.raises(DataError, match=message):
        Draws(source, 12).take(2)
    with pytest.raises(DataError, match="numbered from 0, got -1"):
        Draws(source, 12).take(-1)


def test_a_choice_is_a_permutation_of_the_seed_that_only_grows():
    assert choose(9, None, None).tolist() == list(range(9))
    assert choose(9, 4, None).tolist() == [0, 1, 2, 3]
    whole = choose(9, None, 3).tolist()
    assert sorted(whole) == list(range(9)) and whole != list(range(9))
    assert choose(9, 4, 3).tolist() == whole[:4] and choose(9, 99, 3).tolist() == whole
    assert choose(9, None, 4).tolist() != whole
    assert whole == torch.randperm(9, generator=torch.Generator().manual_seed(3)).tolist()


def test_a_shortage_is_noted():
    assert shortage("prose", 5, 9, "window") == "prose has 5 windows, 9 were asked for"
    assert shortage("prose", 5, 5, "window") == shortage("prose", 5, None, "window") == ""


def test_samples_are_spread_over_all():
    samples = numbered(10)
    assert numbers(spread(samples, 4)) == [0, 2, 5, 7]
    assert spread(samples, None) is spread(samples, 10) is spread(samples, 99) is samples
