"""Which recipes are carried out, which is recommended, and what is refused before the work."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_order import estimate
from optimum_order.engine.recipe import canonical
from optimum_order.errors import DataError, FormatError, OrderError, OutputError
from optimum_order.estimate.options import Demand, Sizes
from optimum_order.files import weight_bytes
from optimum_order.models.units import find_units
from optimum_order.order import Order
from optimum_order.search.budget import Budget
from optimum_order.search.menu import Candidate, Menu, rate_of
from optimum_order.search.recipes import (
    MOST_ATTEMPTS,
    Carrying,
    Facts,
    LossModel,
    Search,
    agenda,
    best_within_bytes,
    best_within_loss,
    interpolated,
)
from optimum_order.search.selection import Attempt

FACTS = Facts("perplexity", "window")
ORIGINAL = torch.zeros(16, dtype=torch.float64)
NOISE = torch.linspace(-1, 1, 16, dtype=torch.float64)


@pytest.fixture(scope="module")
def sizes(make_compressor):
    source = make_compressor().source
    empty = estimate.empty(source)
    return Sizes(empty, find_units(empty), {}, Demand())


@pytest.fixture(scope="module")
def menu(sizes):
    return Menu(sizes)


def candidate(order, error, bits=3.0):
    bytes_ = 200_056 + int(bits * 73_728 / 8)  # as in the tiny model
    return Candidate(canonical(Order.parse(order)), "coded", bytes_, bits, False, error)


def attempt(order, loss, bytes_=3000, noise=0.01):
    performances = ORIGINAL - loss + noise * NOISE
    return Attempt(candidate(order, loss), bytes_, bytes_ / 1000, performances, model=order)


ECSQ = candidate("ecsq:3", 0.01)
GPTQ = candidate("gptq:3", 0.02)
MIXED = candidate("mixed_precision:3", 0.015)
JOINT = candidate("wanda:0.5 > ecsq:3", 0.005)
BEHIND = candidate("ecsq:4 > wanda:0.5", 0.03)


# What is carried out


def test_the_best_single_method_is_always_first():
    assert agenda([JOINT, ECSQ, GPTQ, MIXED, BEHIND])[:3] == [ECSQ, JOINT, MIXED]


def test_a_hopeless_recipe_of_two_methods_is_last():
    assert agenda([BEHIND, GPTQ, ECSQ])[:3] == [ECSQ, GPTQ, BEHIND]


@given(st.permutations([ECSQ, GPTQ, MIXED, JOINT, BEHIND]), st.integers(0, 5))
def test_the_agenda_is_a_permutation_that_starts_with_the_best_single(listed, count):
    listed = listed[:count]
    queue = agenda(listed)
    assert sorted(map(str, queue)) == sorted(map(str, listed))
    singles = [c for c in listed if c.is_single]
    if singles:
        assert queue[0] == min(singles, key=lambda c: c.error)


def test_what_turns_out_too_large_is_made_smaller_within_three_compressions(menu):
    search = Search(menu, Budget(3.0, bits=True))
    made = []

    def make(candidate, number):
        made.append(str(candidate.order))
        assert number == len(made) - 1
        bits = 3.02 if candidate.order == ECSQ.order else 2.9
        return Attempt(candidate, 3000, bits, ORIGINAL - candidate.error + 0.01 * NOISE)

    attempts = search.run([ECSQ, GPTQ, BEHIND], ORIGINAL, make)
    assert made[0] == "ecsq:3.0"
    assert made[1].startswith("ecsq:2.97") and made[2] == "gptq:3"
    assert len(attempts) == MOST_ATTEMPTS
    chosen = search.selection(attempts, [ECSQ, GPTQ, BEHIND], ORIGINAL, FACTS)
    assert str(chosen.order) == made[1] and chosen.met
    assert [row.fits for row in chosen.rows] == [True, False, True, True]
    assert [row.made for row in chosen.rows] == [True, True, True, False]
    assert chosen.cost["compressions"] == 3


def test_what_leaves_much_over_is_made_larger_once(menu):
    search = Search(menu, Budget(3.0, bits=True))
    made = []

    def make(candidate, number):
        made.append(str(candidate.order))
        bits = rate_of(candidate) - 0.1 if rate_of(candidate) else 2.5
        return Attempt(candidate, 3000, bits, ORIGINAL - candidate.error + 0.01 * NOISE)

    attempts = search.run([candidate("ecsq:2.8", 0.01), GPTQ, BEHIND], ORIGINAL, make)
    assert made == ["ecsq:2.8", "ecsq:3.082", "gptq:3"]
    assert attempts[1].bits == pytest.approx(2.982)
    made.clear()
    search.run([candidate("ecsq:3.05", 0.01), GPTQ, BEHIND], ORIGINAL, make)
    assert made == ["ecsq:3.05", "gptq:3", str(BEHIND.order)], "too little is left"

    def jump(candidate, number):
        made.append(str(candidate.order))
        bits = 3.1 if rate_of(candidate) == 3.082 else 2.7
        return Attempt(candidate, 3000, bits, ORIGINAL - candidate.error + 0.01 * NOISE)

    made.clear()
    search.run([candidate("ecsq:2.8", 0.01), GPTQ, BEHIND], ORIGINAL, jump)
    assert made == ["ecsq:2.8", "ecsq:3.082", "gptq:3"], "not made smaller than the first"


def test_what_is_too_large_and_worse_is_not_tried_again(menu):
    search = Search(menu, Budget(3.0, bits=True))

    def make(candidate, number):
        bits = 3.02 if candidate.order == JOINT.order else 2.95
        loss = 0.1 if candidate.order == ECSQ.order else 0.2
        return Attempt(candidate, 3000, bits, ORIGINAL - loss + 0.01 * NOISE)

    attempts = search.run([ECSQ, MIXED, JOINT], ORIGINAL, make)
    assert [a.candidate for a in attempts] == [ECSQ, JOINT, MIXED]


def test_nothing_that_is_too_large_is_returned(menu):
    search = Search(menu, Budget(3.0, bits=True))
    large = [attempt("ecsq:3", 0.1, 3200)]
    with pytest.raises(OrderError, match="None of 1 compressions fits in 3 bits"):
        search.selection(large, [ECSQ], ORIGINAL, FACTS)


# What is recommended


def test_two_methods_are_recommended_only_if_surely_better_than_one():
    single = attempt("ecsq:3", 0.1)
    surely = attempt("wanda:0.5 > ecsq:3", 0.05)
    perhaps = attempt("wanda:0.5 > ecsq:3", 0.0999, noise=-0.5)
    assert best_within_bytes([single, surely]) is surely
    assert best_within_bytes([single, perhaps]) is single
    assert best_within_bytes([perhaps]) is perhaps


def test_of_single_methods_the_one_of_the_least_loss_is_recommended(menu):
    search = Search(menu, Budget(3.0, bits=True))
    attempts = [attempt("ecsq:3", 0.2), attempt("gptq:3", 0.1), attempt("rtn:3", 0.3)]
    chosen = search.selection(attempts, [], ORIGINAL, FACTS)
    assert str(chosen.order) == "gptq:3" and chosen.model == "gptq:3"
    losses = [row.loss for row in chosen.rows]
    assert losses == sorted(losses)
    gaps = [row.difference for row in chosen.rows]
    assert gaps[0] is None and [gap.mean for gap in gaps[1:]] == pytest.approx([0.1, 0.2])
    assert "is better than 'ecsq:3.0'" in chosen.reason and "16 windows" in chosen.reason


def test_a_tie_is_called_one(menu):
    search = Search(menu, Budget(3.0, bits=True))
    attempts = [attempt("ecsq:3", 0.1), attempt("gptq:3", 0.1001, noise=-0.5)]
    assert "no difference" in search.selection(attempts, [], ORIGINAL, FACTS).reason


# The loss is limited


@given(st.floats(0.1, 30), st.floats(0.5, 2.5), st.floats(1e-4, 0.5), st.floats(1e-4, 0.5))
def test_a_power_law_is_recovered_from_two_points(factor, power, first, second):
    if abs(math.log(first / second)) < 0.1:
        return
    losses = [factor * error**power for error in (first, second)]
    model = LossModel.fitted([first, second], losses, min(losses))
    for error, loss in zip((first, second), losses, strict=True):
        assert model.loss(error) == pytest.approx(max(loss, min(losses) / 50), rel=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-1, 10)), max_size=3), st.floats(1e-3, 1))
def test_more_error_is_never_less_loss(points, target):
    model = LossModel.fitted([e for e, _ in points], [loss for _, loss in points], target)
    assert 0 < model.loss(1e-6) < model.loss(1e-3) < model.loss(1.0)


def test_the_fewest_bytes_that_meet_the_limit_are_returned():
    met = [attempt("ecsq:3", 0.01, 3000), attempt("ecsq:2.5", 0.02, 2500)]
    unmet = attempt("ecsq:2", 0.05, 2000)
    assert best_within_loss([*met, unmet], ORIGINAL, 0.03) is met[1]
    assert best_within_loss([unmet], ORIGINAL, 0.03) is unmet


@pytest.mark.parametrize("factor", [0.3, 3.0, 30.0])
def test_a_search_over_rates_finds_the_rate_that_meets_the_limit(menu, factor):
    """On a power law that is not the usual one the third compression is near the limit."""
    search = Search(menu, None, 0.05)
    errors = {rate: 4.0**-rate for rate in (1, 1.5, 2, 2.5, 3, 4, 6, 8)}
    seen = [candidate(f"ecsq:{rate}", error, rate) for rate, error in errors.items()]

    def make(chosen, number):
        performances = ORIGINAL - factor * chosen.error**0.9 + 1e-4 * NOISE
        return Attempt(chosen, chosen.bytes, chosen.bits, performances)

    attempts = search.run(seen, ORIGINAL, make)
    assert 1 <= len(attempts) <= MOST_ATTEMPTS
    chosen = search.selection(attempts, seen, ORIGINAL, FACTS)
    assert chosen.met and 0.5 * 0.05 <= chosen.rows[0].loss <= 0.05
    assert f"{chosen.rows[0].loss:.4f}" in chosen.reason


def test_a_limit_that_nothing_meets_is_said_to_be_unmet(menu):
    search = Search(menu, Budget(3.0, bits=True), 0.001)
    seen = [candidate(f"ecsq:{rate}", 4.0**-rate, rate) for rate in (2, 3, 4)]

    def make(chosen, number):
        return Attempt(chosen, chosen.bytes, chosen.bits, ORIGINAL - 1 + 0.01 * NOISE)

    attempts = search.run(seen, ORIGINAL, make)
    assert all(attempt.bits <= 3 for attempt in attempts)
    chosen = search.selection(attempts, seen, ORIGINAL, FACTS)
    assert not chosen.met and "not met in 3 bits" in chosen.reason


def test_rates_between_two_have_errors_between_theirs(menu):
    seen = [candidate("ecsq:2", 0.1, 2.0), candidate("ecsq:3", 0.001, 3.0), GPTQ]
    steps = interpolated(menu, seen)
    rates = {str(c.order): c for c in steps}
    assert rates["ecsq:2.5"].error == pytest.approx(0.01)
    assert rates["ecsq:2.5"].bits == pytest.approx(2.5)
    assert {"ecsq:2.0", "ecsq:3.0", "gptq:3"} <= set(rates) and len(rates) == len(steps) == 22


# What is refused


def test_budgets_that_nothing_or_everything_meets_are_refused_before_the_work(menu, sizes):
    with pytest.raises(OrderError, match="nothing needs compressing"):
        Search(menu, Budget(sizes.dense))
    with pytest.raises(OrderError, match="nothing needs compressing"):
        Search(menu, Budget(32.0, bits=True))
    least = menu.least()
    with pytest.raises(OrderError, match=f"the smallest is '{least.order}' as '{least.format}'"):
        Search(menu, Budget(0.5, bits=True))
    with pytest.raises(OrderError, match="are not compressed"):
        Search(menu, Budget(sizes.rest))
    Search(menu, Budget(least.bytes + 1000))


def test_a_format_that_holds_no_recipe_is_refused(make_compressor):
    with pytest.raises(FormatError, match="as 'bitsandbytes'"):
        make_compressor().search("3 bits", format="bitsandbytes")


def test_a_search_needs_calibration_data_and_an_order_excludes_a_budget(make_compressor):
    compressor = make_compressor()
    for options, message in [
        ({"order": "gptq:4", "budget": "3 bits"}, "in place of an order"),
        ({"max_loss": 0.1, "low_memory": True}, "in place of an order"),
        ({"budget": "3 tons"}, "A budget is bytes"),
        ({"max_loss": -1}, "must be above 0"),
        ({}, "Say what is to be done"),
    ]:
        with pytest.raises(OrderError, match=message):
            compressor.compress(**options)
    with pytest.raises(DataError, match="held back"):
        make_compressor(calibration=None).search("3 bits")
    with pytest.raises(DataError, match="two at least"):
        make_compressor(calibration_samples=1).search("3 bits")
    with pytest.raises(FormatError, match="Unknown engine 'vlm'"):
        compressor.search("3 bits", engine="vlm")
    with pytest.raises(FormatError, match="Unknown format 'zip'"):
        compressor.search("3 bits", format="zip")


def test_work_dirs_of_a_search_lie_beside_each_other(tmp_path):
    carrying = Carrying(work_dir=tmp_path / "work", resume=True)
    assert carrying.folder(1) == tmp_path / "work-2"
    with pytest.raises(OutputError, match="nothing to resume"):
        carrying.check()
    (tmp_path / "work-1").mkdir()
    carrying.check()
    assert carrying.resumes(0) and not carrying.resumes(1)
    with pytest.raises(OutputError, match="needs a 'work_dir'"):
        Carrying(resume=True).check()


# Whole searches


def test_a_search_keeps_its_promises(make_compressor, tmp_path):
    """Bytes are those of the files, the recipe makes the same model, and nothing is better."""
    compressor = make_compressor(calibration_samples=8)
    budget = 80_000 + int(compressor.source.bytes / 2)
    work = tmp_path / "work"
    model = compressor.compress(budget=f"{budget} B", work_dir=work, progress=False)
    search = model.manifest["search"]
    rows = [row for row in search["rows"] if row["made"]]
    assert len(rows) == search["cost"]["compressions"] <= MOST_ATTEMPTS
    assert search["cost"]["single_layers"] > 0
    assert model.save_pretrained(tmp_path / "out") == search["format"]
    assert weight_bytes(tmp_path / "out") == rows[0]["bytes"] <= budget
    again = compressor.compress(search["order"], format=search["format"], progress=False)
    for name, state in model.layers.items():
        assert torch.equal(again.layers[name].weight, state.weight)
    fitting = [row for row in rows if row["fits"]]
    singles = [row["loss"] for row in fitting if ">" not in row["order"]]
    assert rows[0]["loss"] <= min(singles)
    # what was carried out is there to go on from, and leads to the same answer
    resumed = compressor.compress(
        budget=f"{budget} B", work_dir=work, resume=True, progress=False
    ).manifest["search"]
    assert {**resumed, "cost": 0} == {**search, "cost": 0}
