"""Workers run each trial once, whoever dies, and find what one process finds."""

import functools
import os
import signal
from concurrent.futures import Future

import pytest

from optimum_order import compressor as front
from optimum_order.errors import ModelError, OptimumOrderError, RankError
from optimum_order.order import Order
from optimum_order.study.crew import TRIES, Crew, Processes, Spec
from optimum_order.study.crew import Cluster as RayCrew
from optimum_order.study.trials import Trials
from optimum_order.study.worker import Task

ORDERS = ["wanda:0.5 > rtn:4", "rtn:4 > wanda:0.5", "magnitude:0.5 > rtn:4"]
SMALL = {"evaluation_samples": 4, "draws": 2, "progress": False}


class Died(Exception):
    pass


class Scripted(Crew):
    """Runs tasks at once; `deaths` says how often each order is lost."""

    lost = (Died,)

    def __init__(self, size, deaths=()):
        super().__init__(None, size)
        self.deaths = dict(deaths)
        self.ran = []
        self.replaced = []

    def submit(self, number, task):
        future = Future()
        name = str(task.orders[0])
        self.ran.append((number, name))
        if self.deaths.get(name, 0) > 0:
            self.deaths[name] -= 1
            future.set_exception(Died())
        else:
            future.set_result({("trials", name, task.draw): {"performance": 1.0}})
        return future

    def replace(self, number):
        self.replaced.append(number)

    def close(self):
        pass


def tasks(*orders):
    return [Task((Order.parse(order),), 0) for order in orders]


class TestQueue:
    def test_every_task_is_run_once(self):
        for size in (1, 2, 5):
            crew = Scripted(size)
            ended = list(crew.run(tasks("rtn:2", "rtn:3", "rtn:4")))
            names = sorted(str(task.orders[0]) for task, rows in ended)
            assert names == sorted(name for _, name in crew.ran) == ["rtn:2", "rtn:3", "rtn:4"]
            assert all(rows for _, rows in ended) and not crew.replaced

    def test_workers_have_work_while_a_finished_task_is_stored(self):
        crew = Scripted(1)
        run = crew.run(tasks("rtn:2", "rtn:3", "rtn:4"))
        next(run)
        assert [name for _, name in crew.ran] == ["rtn:2", "rtn:3"]
        next(run)
        assert [name for _, name in crew.ran] == ["rtn:2", "rtn:3", "rtn:4"]
        assert len(list(run)) == 1

    def test_a_worker_prefers_tasks_that_begin_like_its_last(self):
        crew = Scripted(1)
        names = ["rtn:2 > wanda:0.5", "rtn:3 > wanda:0.5", "rtn:2 > wanda:0.4"]
        assert len(list(crew.run(tasks(*names)))) == 3
        assert [name for _, name in crew.ran] == [names[0], names[2], names[1]]

    def test_a_worker_that_dies_loses_its_task_alone(self):
        crew = Scripted(2, {"rtn:3": TRIES - 1})
        ended = {str(task.orders[0]): rows for task, rows in crew.run(tasks("rtn:2", "rtn:3"))}
        assert set(ended) == {"rtn:2", "rtn:3"} and all(ended.values())
        assert len(crew.replaced) == TRIES - 1
        assert [name for _, name in crew.ran].count("rtn:3") == TRIES
        assert [name for _, name in crew.ran].count("rtn:2") == 1

    def test_a_task_that_is_lost_again_and_again_is_given_up(self):
        crew = Scripted(1, {"rtn:3": 99})
        ended = dict.fromkeys(["rtn:2", "rtn:3", "rtn:4"])
        for task, rows in crew.run(tasks("rtn:2", "rtn:3", "rtn:4")):
            ended[str(task.orders[0])] = rows
        assert ended["rtn:3"] is None and ended["rtn:2"] and ended["rtn:4"]

    def test_workers_that_never_finish_anything_end_the_study(self):
        crew = Scripted(1, {"rtn:3": 99})
        with pytest.raises(RankError, match=r"end before they finish 'rtn:3', 3 times.*--workers"):
            list(crew.run(tasks("rtn:3")))

    def test_a_worker_goes_on_with_what_begins_alike(self):
        crew = Scripted(1)
        list(crew.run(tasks("wanda:0.5 > rtn:2", "rtn:2", "wanda:0.5 > rtn:3", "rtn:2 > rtn:3")))
        names = [name for _, name in crew.ran]
        assert names == ["wanda:0.5 > rtn:2", "wanda:0.5 > rtn:3", "rtn:2", "rtn:2 > rtn:3"]

    def test_an_error_of_a_trial_ends_the_study(self):
        class Failing(Scripted):
            def submit(self, number, task):
                future = Future()
                future.set_exception(ModelError("no such layer"))
                return future

        with pytest.raises(ModelError, match="no such layer"):
            list(Failing(1).run(tasks("rtn:3")))

    def test_no_worker_is_too_few(self):
        with pytest.raises(ModelError, match=r"a worker or more \(--workers\), got 0"):
            Scripted(0)


@pytest.fixture
def compressor(make_compressor):
    return make_compressor(calibration_samples=2)


@pytest.fixture
def rows(compressor, text_file, tmp_path, monkeypatch):
    """`rows("name", workers=2)`: what a study stores, but for times."""
    monkeypatch.setattr("optimum_order.study.report.write", lambda trials, folder: {})

    def run(name, **options):
        evaluation = {"evaluation": str(text_file)}
        compressor.study(ORDERS, tmp_path / name, **evaluation, **SMALL | options)
        trials = Trials.open(tmp_path / name)
        return {
            (table, *key): {k: v for k, v in row.items() if "seconds" not in k}
            for table in ("trials", "pairs")
            for key, row in trials.rows(table).items()
        }

    return run


@pytest.mark.slow
def test_processes_find_what_one_finds_and_one_that_is_killed_is_replaced(rows, monkeypatch):
    alone = rows("alone")
    assert rows("shared", workers=2) == alone
    killed = []

    class Mortal(Processes):
        def submit(self, number, task):
            future = super().submit(number, task)
            if not killed:
                killed.append(self._processes[number].result())
                os.kill(killed[0], signal.SIGKILL)
            return future

    monkeypatch.setattr(front, "crew", lambda spec, size, address: Mortal(spec, size))
    assert rows("killed", workers=2) == alone and len(killed) == 1


def test_without_ray_a_cluster_is_refused_in_one_line(rows, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptimumOrderError, match=r"pip install 'optimum-order\[ray\]'"):
        rows("refused", cluster="auto")


@pytest.mark.client
@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_finds_what_one_process_finds(rows, monkeypatch):
    """Also where one of its workers is killed."""
    ray = pytest.importorskip("ray", reason="run by make clients")
    killed = []

    class Mortal(RayCrew):
        def submit(self, number, task):
            future = super().submit(number, task)
            if not killed:
                killed.append(number)
                ray.kill(self._actors[number])
            return future

    monkeypatch.setattr(front, "crew", Mortal)
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=small | {"include_dashboard": False})
    cluster.add_node(**small)
    try:
        shared = rows("ray", workers=2, cluster=cluster.address)
    finally:
        cluster.shutdown()
    assert shared == rows("alone") and len(killed) == 1


def test_a_worker_can_be_pickled(compressor, text_file):
    """What a process gets is data and the name of a function."""
    import pickle

    samples = compressor.evaluation_samples(str(text_file), 4)
    orders = (Order.parse("rtn:4"),)
    make = functools.partial(front._worker, compressor, orders, "auto", samples, "group")
    spec = pickle.loads(pickle.dumps(Spec(make, 1, 10**9)))
    task = pickle.loads(pickle.dumps(Task((Order.parse("rtn:4"),), 0)))
    rows = spec.make().run(task)
    assert rows["trials", "rtn:4", 0]["bits"] == 4
