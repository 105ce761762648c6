"""Figures against values worked out by hand."""

from __future__ import annotations

import pytest

from shoal.bench.serve.client import Outcome
from shoal.bench.serve.load import Health, Run
from shoal.bench.serve.report import Selection, ServeResult, comparison, comparison_table
from shoal.errors import ParameterError

# TPOT: (1.1 - 0.1) / 10 = 0.1, (2.3 - 0.3) / 4 = 0.5, none.
FIRST = Outcome(10.0, 1.1, status=200, prompt_len=8, output_len=11, ttft=0.1, itls=[0.1] * 9 + [0.05])
SECOND = Outcome(10.5, 2.3, status=200, prompt_len=4, output_len=5, ttft=0.3, itls=[0.5, 0.5, 0.5, 0.4])
SHORT = Outcome(12.0, 0.2, status=200, prompt_len=2, output_len=1, ttft=0.2)
FAILED = Outcome(10.0, 9.0, error="HTTP 500: oh", status=500)


def result(*outcomes: Outcome, selection: Selection | None = None, health: Health | None = None) -> ServeResult:
    return ServeResult(Run(list(outcomes), 4.0, 0.2, health), selection or Selection())


def test_counts_and_rates() -> None:
    found = result(FIRST, FAILED, SECOND, SHORT).as_json()
    assert (found["duration"], found["completed"], found["failed"]) == (4.0, 3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (14, 17)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (
        0.75,
        4.25,
        7.75,
    )
    assert found["request_goodput"] is None
    assert found["client_cpu_share"] == pytest.approx(0.05)


def test_latencies() -> None:
    found = result(FIRST, FAILED, SECOND, SHORT, selection=Selection(percentiles=(50, 99.9))).as_json()
    assert found["mean_ttft_ms"] == pytest.approx(200.0)
    assert found["median_ttft_ms"] == found["p50_ttft_ms"] == pytest.approx(200.0)
    assert found["std_ttft_ms"] == pytest.approx(100 * (2 / 3) ** 0.5)
    assert found["p99.9_ttft_ms"] == pytest.approx(299.8)
    assert found["mean_tpot_ms"] == pytest.approx(300.0)  # of the two that have one
    assert found["mean_itl_ms"] == pytest.approx(1e3 * (0.95 + 1.9) / 14)
    assert found["mean_e2el_ms"] == pytest.approx(1200.0)


def test_only_what_is_chosen_is_reported() -> None:
    found = result(FIRST, selection=Selection(metrics=("itl",), percentiles=(90,)))
    assert {key for key in found.as_json() if key.endswith("_ms")} == {
        "mean_itl_ms",
        "median_itl_ms",
        "std_itl_ms",
        "p90_itl_ms",
    }
    assert "TTFT" not in found.table({})


@pytest.mark.parametrize(
    ("goals", "good"),
    [
        ({"ttft": 200.0}, 2),
        ({"ttft": 199.0}, 1),
        ({"tpot": 100.1}, 2),  # SHORT has a TPOT of 0
        ({"tpot": 100.1, "ttft": 150.0}, 1),
        ({"e2el": 2300.0}, 3),
        ({"e2el": 1100.0, "tpot": 99.0}, 1),
        ({"e2el": 0.0}, 0),
    ],
)
def test_goodput(goals: dict[str, float], good: int) -> None:
    found = result(FIRST, FAILED, SECOND, SHORT, selection=Selection(goals=goals))
    assert found.good == good
    assert found.as_json()["request_goodput"] == good / 4
    assert f"Request goodput (req/s):                 {good / 4:.2f}\n" in found.table({})


def test_peaks() -> None:
    """Events at 0.25, 0.5, 0.75, 1.25 and at 1.25, 1.5, 1.75 seconds: three in the first, four in the second."""
    one = Outcome(10.0, 1.5, status=200, output_len=4, ttft=0.25, itls=[0.25, 0.25, 0.5])
    other = Outcome(11.0, 0.75, status=200, output_len=3, ttft=0.25, itls=[0.25, 0.25])
    later = Outcome(13.0, 0.5, status=200, output_len=1, ttft=0.5)
    found = result(one, other, later).as_json()
    assert (found["max_output_tokens_per_s"], found["max_concurrent_requests"]) == (4.0, 2)


def test_one_after_the_other_is_one_at_once() -> None:
    after = Outcome(11.1, 1.0, status=200, output_len=1)
    before = Outcome(10.1, 1.0, status=200, output_len=1)
    assert result(after, before).as_json()["max_concurrent_requests"] == 1


def test_details_are_of_all_requests_in_order() -> None:
    found = result(FIRST, FAILED).as_json(detailed=True)
    assert found["input_lens"] == [8, 0]
    assert found["output_lens"] == [11, 0]
    assert found["ttfts"] == [0.1, 0.0]
    assert found["itls"] == [FIRST.itls, []]
    assert found["latencies"] == [1.1, 9.0]
    assert found["errors"] == ["", "HTTP 500: oh"]
    assert "errors" not in result(FIRST, FAILED).as_json(detailed=False)


def test_the_table_is_vllm_s() -> None:
    lines = (
        result(FIRST, FAILED, health=Health([0.001, 0.003], 1)).table({"Maximum request concurrency:": 8}).splitlines()
    )
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[1:5] == [
        "Successful requests:                     1",
        "Failed requests:                         1",
        "Maximum request concurrency:             8",
        "Benchmark duration (s):                  4.00",
    ]
    assert "---------------Time to First Token----------------" in lines
    assert "P99 E2EL (ms):                           1100.00" in lines
    assert "Failed of 2 probes:                      1" in lines
    assert "Median /health (ms):                     2.00" in lines
    assert lines[-1] == "=" * 50


def test_health_in_json() -> None:
    found = result(FIRST, health=Health([0.001] * 99 + [0.1], 0)).as_json()
    assert (found["health_probes"], found["health_failed"]) == (100, 0)
    assert found["median_health_ms"] == pytest.approx(1.0)
    assert found["max_health_ms"] == pytest.approx(100.0)


def test_errors_are_counted_by_kind() -> None:
    assert result(FAILED, FIRST, FAILED).errors() == ["2 failed: HTTP 500: oh"]


def test_nothing_answered_is_all_zero() -> None:
    found = result(FAILED).as_json()
    assert (found["completed"], found["p99_ttft_ms"], found["max_concurrent_requests"]) == (0, 0.0, 0)


def test_servers_are_compared_round_by_round() -> None:
    ours = [result(FIRST, SECOND), result(FIRST)]
    theirs = [result(FIRST), result(SECOND)]
    ratios = comparison({"ours": ours, "theirs": theirs})["theirs"]
    assert ratios["output_throughput"] == pytest.approx([16 / 11, 11 / 5])
    assert ratios["median_ttft_ms"] == pytest.approx([2.0, 1 / 3])
    head, _, first, *_ = comparison_table({"ours": ours, "theirs": theirs}).splitlines()
    assert head == "|  | ours | theirs | ours over theirs |"
    assert first == "| output_throughput | 3.38 (2.75-4.00) | 2.00 (1.25-2.75) | 1.83 (1.45-2.20) |"


def test_what_was_not_measured_has_no_ratio() -> None:
    found = {"ours": [result(FIRST)], "theirs": [result(SHORT)]}
    assert comparison(found)["theirs"]["median_itl_ms"] == []
    assert (
        comparison_table(found).splitlines()[-4] == "| median_itl_ms | 100.00 (100.00-100.00) | 0.00 (0.00-0.00) | - |"
    )


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"metrics": ("ttft", "speed")}, "percentile_metrics"),
        ({"percentiles": (101.0,)}, "metric_percentiles"),
        ({"percentiles": (float("nan"),)}, "metric_percentiles"),
        ({"goals": {"itl": 5.0}}, "goodput"),
        ({"goals": {"ttft": -1.0}}, "goodput"),
    ],
)
def test_what_cannot_be_reported(wrong: dict[str, object], field: str) -> None:
    with pytest.raises(ParameterError, match=field):
        Selection(**wrong)  # type: ignore[arg-type]
