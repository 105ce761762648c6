from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shoal.ray.scaling import by_requests


def context(replicas: int, requests: dict[str, float]) -> Any:
    """What Ray Serve's autoscaler knows."""
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 4)
    return SimpleNamespace(
        current_num_replicas=replicas,
        target_num_replicas=replicas,
        aggregated_metrics={"requests": requests},
        config=config,
    )


@pytest.mark.parametrize(
    ("replicas", "requests", "wanted"),
    [
        (2, {"a": 4.0, "b": 4.0}, 2),
        (2, {"a": 8.0, "b": 4.0}, 3),
        (2, {"a": 0.0, "b": 0.0}, 0),
        (3, {}, 3),
        (2, {"a": 8.0}, 4),
    ],
)
def test_each_gets_so_many_requests(replicas: int, requests: dict[str, float], wanted: float) -> None:
    assert by_requests(context(replicas, requests)) == (wanted, {})
