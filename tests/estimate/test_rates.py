"""How fast the machine is."""

import torch

from optimum_order.estimate import rates


def test_operations_over_the_fastest_run(monkeypatch):
    monkeypatch.setattr(rates, "_SECONDS", 0.15)
    first, end = [0.0, 0.001], [1.0]  # the first run is not counted
    runs = [[1.0, 1.0625], [1.0625, 1.09375]]
    now = iter([*first, *end, *runs[0], 1.0625, *runs[1], 2.0])
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(now))
    assert rates.products(torch.device("cpu"), torch.float32, 10, 20) == 2 * 10 * 20 * 20 / 0.03125


def test_each_is_measured():
    result = rates.measure(torch.device("cpu"), torch.float32, torch.bfloat16, 64, 64)
    assert all(rate > 1e6 for rate in vars(result).values())
