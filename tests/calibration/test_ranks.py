"""Processes that share the samples see the statistics of all of them, and the same ones."""

import contextlib
import itertools
import os
import subprocess
import sys

import pytest
import torch

from optimum_order.calibration.execution import PAUSES
from optimum_order.calibration.ranks import Ranks
from optimum_order.errors import ModelError, RankError
from optimum_order.layers.statistics import Drift, ExpertNorms, Gram, SquaredNorms
from optimum_order.layers.statistics.base import Accumulator
from optimum_order.models.units import find_units

UNIT_ROUNDOFF = 2.0**-24


def summation_bound(gram, tokens):
    """Return how far two float32 sums over the same tokens may be apart, entry by entry.

    A sum of T products in any order is off by at most gamma(T) sum |x_i x_j|, gamma(T) =
    T u / (1 - T u) (Higham 2002, "Accuracy and Stability of Numerical Algorithms", 3.1), and by
    Cauchy and Schwarz sum |x_i x_j| <= sqrt(H_ii H_jj). Two such sums are twice as far apart. The
    inputs of later layers differ by rounding too, which the first block does not have: a forward on
    fewer samples at a time multiplies matrices of other shapes.
    """
    gamma = tokens * UNIT_ROUNDOFF / (1 - tokens * UNIT_ROUNDOFF)
    sizes = gram.diagonal().double().sqrt()
    return 2 * gamma * sizes[:, None] * sizes


class TestAlone:
    def test_everything_is_what_was_given(self, batches):
        ranks = Ranks()
        assert (ranks.rank, ranks.size, ranks.device("cuda:7")) == (0, 1, "cuda:7")
        for one, other in zip(ranks.shard(batches), batches, strict=True):
            assert torch.equal(one["input_ids"], other["input_ids"])
        assert ranks.deal({"a": 2, "b": 1}) == {"a": 0, "b": 0}
        assert ranks.gather({"some": [1]}) == [{"some": [1]}]
        assert ranks.total(7) == 7
        assert ranks.first_to_fail()
        text, tensors = ranks.broadcast(("text", {"a": torch.ones(2)}), 0)
        assert text == "text" and torch.equal(tensors["a"], torch.ones(2))
        gram = Gram(3, torch.device("cpu"))
        gram.update(torch.ones(2, 3))
        ranks.merge(gram)
        assert torch.equal(gram.result(), torch.full((3, 3), 2.0))
        assert ranks.moved == 0

    def test_no_group_is_joined_without_a_launcher(self, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        with Ranks.joined() as ranks:
            assert ranks.size == 1
            assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_no_thread_of_the_group_outlives_it(free_port):
    """A thread of gloo that frees a tensor while Python ends aborts the process."""
    code = (
        "import pathlib\n"
        "from optimum_order.calibration.ranks import Ranks\n"
        "def threads():\n"
        "    names = [file.read_text() for file in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "    return sum('gloo' in name for name in names)\n"
        "with Ranks.joined() as ranks:\n"
        "    import torch._dynamo  # as transformers does\n"
        "    ranks.wait()\n"
        "    print(threads() > 0)\n"
        "print(threads())"
    )
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | variables | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [process.communicate()[0] for process in processes] == ["True\n0\n"] * 2


class TestShard:
    def test_samples_are_shared_evenly_and_in_order(self):
        batches = [{"input_ids": torch.arange(first, last)[:, None]} for first, last in
                   [(0, 3), (3, 4), (4, 9)]]  # fmt: skip
        for size in range(1, 12):
            shares = []
            for rank in range(size):
                share = [b["input_ids"] for b in Ranks(rank, size).shard(batches)]
                assert all(len(part) for part in share)
                shares.append(torch.cat(share).flatten().tolist() if share else [])
            assert list(itertools.chain(*shares)) == list(range(9))
            counts = [len(share) for share in shares]
            assert max(counts) - min(counts) <= 1

    def test_every_tensor_of_a_batch_is_cut_alike(self):
        batch = {"input_ids": torch.arange(6).view(3, 2), "attention_mask": torch.eye(3)[:, :2]}
        (mine,) = Ranks(2, 3).shard([batch])
        assert mine["input_ids"].tolist() == [[4, 5]]
        assert mine["attention_mask"].tolist() == [[0, 0]]


def test_layers_are_dealt_by_cost():
    costs = {"q": 4.0, "k": 1.0, "v": 1.0, "o": 4.0, "up": 11.0, "down": 12.0}
    owners = Ranks(0, 2).deal(costs)
    assert list(owners) == list(costs) and owners == Ranks(1, 2).deal(costs)
    loads = [sum(costs[name] for name in costs if owners[name] == rank) for rank in (0, 1)]
    assert sorted(loads) == [16, 17]
    assert set(Ranks(0, 7).deal(costs).values()) == set(range(6))


class AbsMax(Accumulator):
    """The largest size of an input."""

    merges = {"largest": "max", "least": "min"}

    def __init__(self, inputs, device):
        super().__init__(inputs, device)
        self.largest = torch.zeros(inputs)
        self.least = torch.full((inputs,), torch.inf)

    def update(self, rows):
        self.largest = torch.maximum(self.largest, rows.abs().amax(0))
        self.least = torch.minimum(self.least, rows.abs().amin(0))

    def result(self):
        return torch.stack([self.largest, self.least])

    @classmethod
    def isotropic(cls, result):
        return torch.ones_like(result)


def test_messages_reach_all_ranks(in_ranks):
    X = torch.randn(30, 700, generator=torch.Generator().manual_seed(0))

    def talk(ranks):
        results = {"gathered": ranks.gather({"rank": ranks.rank, "text": "ä" * ranks.rank})}
        results["total"] = ranks.total(ranks.rank + 1)
        for accumulator in (Gram, SquaredNorms, ExpertNorms, AbsMax, Drift):
            with torch.inference_mode():
                sums = accumulator(700, torch.device("cpu"))
                mine = X[10 * ranks.rank : 10 * (ranks.rank + 1)]
                sums.compare(mine, 2 * mine) if accumulator.compares else sums.update(mine)
                ranks.merge(sums)
                results[accumulator.__name__] = sums.result().clone()
        message = None
        if ranks.rank == 1:
            message = ("header", {"bool": torch.tensor([[True], [False]]), "none": torch.ones(0)})
            message[1].update(half=torch.arange(3).bfloat16(), one=torch.tensor(5))
        results["text"], results["tensors"] = ranks.broadcast(message, 1)
        own = torch.full((2, 3), float(ranks.rank)).T
        ranks.spread([own])
        results["spread"] = own
        ranks.wait()
        results["first to fail"] = ranks.first_to_fail()
        results["moved"] = ranks.moved
        return results

    ends = in_ranks(3, talk)
    first = ends[0]
    assert first["gathered"] == [{"rank": n, "text": "ä" * n} for n in range(3)]
    assert first["total"] == 6
    gram = X.double().T @ X.double()
    assert ((first["Gram"] - gram).abs() <= summation_bound(gram, 30)).all()
    assert ((first["Drift"] - gram).abs() <= summation_bound(gram, 30)).all()
    assert torch.allclose(first["SquaredNorms"].double(), gram.diagonal(), rtol=1e-6)
    assert torch.equal(first["AbsMax"], torch.stack([X.abs().amax(0), X.abs().amin(0)]))
    positive = X.clamp(min=0).double()
    means = X.double().sum(0) / (positive > 0).sum(0)
    assert torch.allclose(first["ExpertNorms"].double(), means, atol=1e-5)
    assert first["text"] == "header"
    assert first["tensors"]["bool"].tolist() == [[True], [False]]
    assert first["tensors"]["half"].dtype == torch.bfloat16
    assert first["tensors"]["none"].shape == (0,) and first["tensors"]["one"].item() == 5
    assert sorted(end["first to fail"] for end in ends) == [False, False, True]
    for end in ends:
        assert not end["spread"].any()
        for key, value in first.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(end[key], value), key


WALKED = [("llama", "block", 2), ("llama", "group", 3), ("mixtral", "block", 3)]
WALKED += [
    ("mixtral", "group", 2),
    ("gpt_oss", "group", 3),
    ("bert", "block", 7),
    ("mixtral", "group", 7),
]


def test_all_ranks_see_the_statistics_of_all_samples(in_ranks, make_model, collect, batches):
    """Also where a rank has no sample, or none of its tokens reaches an expert."""
    for architecture, pause, size in WALKED:
        model = make_model(architecture)
        units = find_units(model)
        first = {target.name for target in units[0].targets}
        compares = {Drift} if pause == "group" else set()
        needs = {Gram} | compares

        def walk(ranks, model=model, units=units, pause=pause, needs=needs, **options):
            walked = collect(model, units, batches, pause=pause, needs=needs, ranks=ranks)
            return {
                name: (one.tokens, {kind.__name__: r for kind, r in one.results.items()})
                for name, one in walked.statistics.items()
            }, {visit.unit.name: dict(visit.leaders) for visit in walked.visits}, walked.blocks  # fmt: skip

        with torch.inference_mode():
            alone, leaders, blocks = walk(Ranks())
        ends = in_ranks(size, walk)
        for statistics, theirs, visited in ends:
            assert (theirs, visited) == (leaders, blocks)
            assert statistics.keys() == alone.keys()
            for name, (tokens, results) in statistics.items():
                assert tokens == alone[name][0], (architecture, pause, name)
                for kind, result in results.items():
                    assert torch.equal(result, ends[0][0][name][1][kind]), "identical on all ranks"
                gram = alone[name][1]["Gram"]
                bound = summation_bound(gram, tokens)
                if name not in first:  # what earlier layers were rounded to
                    bound = bound + 1e-5 * gram.diagonal().max()
                apart = (results["Gram"].double() - gram.double()).abs()
                assert (apart <= bound + 1e-12).all(), (architecture, pause, name, apart.max())


def test_an_expert_that_one_rank_alone_reaches_is_seen_by_all(in_ranks, make_model, collect):
    """One token at a time goes to two of four experts: most experts are idle on some rank."""
    batches = [{"input_ids": torch.tensor([[token]])} for token in (5, 17)]
    model = make_model("mixtral")
    units = find_units(model)
    for pause in PAUSES:

        def walk(ranks, pause=pause):
            walked = collect(model, units, batches, pause=pause, needs={SquaredNorms}, ranks=ranks)
            return {name: one.tokens for name, one in walked.statistics.items()}

        alone = walk(Ranks())
        experts = {name: tokens for name, tokens in alone.items() if ".experts." in name}
        assert {0, 1} <= set(experts.values()), "some are idle, and some are idle on one rank"
        assert in_ranks(2, walk) == [alone, alone]


def test_a_rank_that_ends_is_noticed_by_the_others(in_ranks):
    def leave(ranks):
        if ranks.rank == 1:
            os._exit(1)
        with pytest.raises(RankError, match=r"Another process of this run has ended"):
            ranks.wait()
        return True

    with contextlib.suppress(EOFError):
        in_ranks(2, leave)
        pytest.fail("rank 1 has no result")


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    ranks = Ranks(1, 2)
    assert ranks.device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ranks.device("auto") == ranks.device("cuda") == "cuda:1" and chosen == [1, 1]
    with pytest.raises(ModelError, match="cannot share the device 'cuda:0'"):
        ranks.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ModelError, match="there is none among 1"):
        ranks.device("auto")
