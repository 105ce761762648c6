from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shoal.ray.exposition import Totals


def text(answers: int, share: float, seconds: float) -> str:
    """What a replica says after some requests."""
    registry = CollectorRegistry()
    Counter("shoal:request_success", "Ended.", ["reason"], registry=registry).labels('s"t op').inc(answers)
    Gauge("shoal:num_requests_running", "Running.", registry=registry).set(answers)
    Gauge("shoal:kv_cache_usage_perc", "Share.", ["model_name"], registry=registry).labels("a b").set(share)
    Histogram("shoal:step_seconds", "Steps.", buckets=(0.1, 1.0), registry=registry).observe(seconds)
    return generate_latest(registry).decode()


def samples(exposition: str) -> dict[str, float]:
    """Values by name, of a histogram also by bucket."""
    return {
        sample.name + sample.labels.get("le", ""): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


def test_replicas_are_summed_and_shares_are_means() -> None:
    found = samples(Totals().exposition({"a": text(2, 0.2, 0.05), "b": text(5, 0.6, 0.5)}))
    assert found["shoal:request_success_total"] == found["shoal:num_requests_running"] == 7
    assert found["shoal:kv_cache_usage_perc"] == 0.4
    assert (found["shoal:step_seconds_bucket0.1"], found["shoal:step_seconds_bucket1.0"]) == (1, 2)
    assert (found["shoal:step_seconds_count"], found["shoal:step_seconds_sum"]) == (2, 0.55)


def test_one_replica_is_told_as_it_is() -> None:
    told = text(2, 0.2, 0.05)
    assert samples(Totals().exposition({"a": told})) == samples(told)


def test_what_replicas_counted_stays_when_they_are_gone() -> None:
    totals = Totals()
    totals.exposition({"a": text(2, 0.2, 0.05), "b": text(5, 0.6, 0.5)})
    for _ in range(2):
        found = samples(totals.exposition({"a": text(3, 0.2, 0.05)}))
        assert (found["shoal:request_success_total"], found["shoal:step_seconds_count"]) == (8, 2)
        assert (found["shoal:num_requests_running"], found["shoal:kv_cache_usage_perc"]) == (3, 0.2)
    assert samples(totals.exposition({}))["shoal:request_success_total"] == 8


def test_a_replica_that_comes_back_counts_once() -> None:
    totals = Totals()
    told = {"a": text(2, 0.2, 0.05), "b": text(5, 0.6, 0.5)}
    totals.exposition(told)
    assert samples(totals.exposition({"a": text(2, 0.2, 0.05)}))["shoal:request_success_total"] == 7
    for _ in range(2):
        found = samples(totals.exposition(told | {"b": text(6, 0.6, 0.5)}))
        assert (found["shoal:request_success_total"], found["shoal:step_seconds_count"]) == (8, 2)
    totals.exposition({})
    assert samples(totals.exposition(told))["shoal:request_success_total"] == 7


def test_of_many_that_are_gone_the_sum_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.ray.exposition._MAY_RETURN", 2)
    totals = Totals()
    for number in range(1, 6):
        found = samples(totals.exposition({f"{number}": text(number, 0.2, 0.05)}))
        assert found["shoal:request_success_total"] == sum(range(number + 1))
    assert samples(totals.exposition({"4": text(40, 0.2, 0.05)}))["shoal:request_success_total"] == 51
    assert samples(totals.exposition({}))["shoal:step_seconds_count"] == 5


def test_nothing_is_nothing() -> None:
    assert Totals().exposition({}) == ""
