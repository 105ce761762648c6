"""The simulation: what is known without one comes out of it."""

from __future__ import annotations

import pytest

from shoal.bench.scale.cluster import DriverCosts, capacity, rows_a_call, simulate

COSTS = DriverCosts(row=40e-6, call=200e-6, worker=3e-6)


@pytest.mark.parametrize(("rate", "rows"), [(1, 0.5), (20, 10), (48, 24), (200, 24)])
def test_a_worker_answers_after_half_a_second_or_a_quarter_of_its_rows(rate: float, rows: float) -> None:
    assert rows_a_call(rate) == rows


@pytest.mark.parametrize("workers", [1, 7, 40])
@pytest.mark.parametrize("rate", [2, 20, 200])
def test_workers_whose_driver_has_time_do_all_they_can(workers: int, rate: float) -> None:
    found = simulate(COSTS, workers, rate)
    assert found.rows == pytest.approx(workers * rate, rel=0.02)
    calls = found.rows / rows_a_call(rate)
    at_least = found.rows * COSTS.row + calls * COSTS.call
    looks = calls * workers * COSTS.worker  # one for each answer, if no two come at a time
    assert at_least < found.busy <= (at_least + looks) * 1.02 < 1


@pytest.mark.parametrize("rate", [20, 200])
def test_a_driver_without_time_serves_what_arithmetic_says(rate: float) -> None:
    most = capacity(COSTS, rate)
    found = simulate(COSTS, int(5 * most / rate), rate)
    assert found.rows == pytest.approx(most, rel=0.02)
    assert found.busy == pytest.approx(1, rel=0.001)


def test_throughput_grows_with_workers_up_to_the_capacity() -> None:
    found = [simulate(COSTS, workers, 200).rows for workers in (1, 10, 50, 100, 200, 400)]
    assert found == sorted(found)
    assert found[-1] <= capacity(COSTS, 200) * 1.02


def test_a_driver_that_costs_nothing_is_never_busy() -> None:
    found = simulate(DriverCosts(0, 0, 0), 100, 200)
    assert found.rows == pytest.approx(20_000, rel=0.02)
    assert found.busy == 0


def test_the_same_figures_give_the_same_answer() -> None:
    assert simulate(COSTS, 333, 77) == simulate(COSTS, 333, 77)
