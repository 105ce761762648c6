"""What lists are asked for in a query string."""

from __future__ import annotations

from collections.abc import Collection

from starlette.requests import Request

from shoal.openai.fields import did_you_mean
from shoal.openai.schema import APIError
from shoal.server.store.paging import PageQuery


def page_query(request: Request, most: int, default: int, *, others: Collection[str] = ()) -> PageQuery:
    """``after``, ``limit`` and ``order``. Raises APIError for wrong ones, and for names that are neither these nor ``others``."""
    given = request.query_params
    known = ("after", "limit", "order", *others)
    for name in given:
        if name not in known:
            raise APIError(f"{name}: no such parameter{did_you_mean(name, known)}", name)
    limit, order = given.get("limit", str(default)), given.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 1 <= int(limit) <= most):
        raise APIError(f"limit: got {limit!r}, must be a number from 1 to {most}", "limit")
    if order not in ("asc", "desc"):
        raise APIError(f"order: got {order!r}, must be 'asc' or 'desc'", "order")
    return PageQuery(int(limit), given.get("after") or None, order == "asc")
