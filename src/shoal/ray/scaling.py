"""How many replicas there should be: Ray Serve's autoscaler asks, and sees to its delays and bounds itself."""

from __future__ import annotations

from typing import Any


def by_requests(context: Any) -> tuple[float, dict[str, Any]]:
    """So many that each has ``target_ongoing_requests`` on the mean. Ray Serve's own policy counts the calls that it carries itself;
    requests go to replicas directly, which count them."""
    counted = (context.aggregated_metrics or {}).get("requests", {})
    if not counted:
        return context.target_num_replicas, {}
    mean = sum(counted.values()) / len(counted)
    return context.current_num_replicas * mean / context.config.get_target_ongoing_requests(), {}
