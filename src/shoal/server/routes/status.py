"""How the server is: /health, /live, /metrics, /slots, /v1/models, /version and what the page shows."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from shoal.openai.schema import APIError
from shoal.server.bodies import json_response, service_of
from shoal.server.replies import Health, Model, ModelList, ModelMeta, Slot, Version
from shoal.server.service import Service
from shoal.server.store.batches import Batch
from shoal.version import __version__


def routes() -> list[Route]:
    """Those of this file."""
    return [
        Route("/health", health),
        Route("/live", live),
        Route("/metrics", metrics),
        Route("/slots", slots),
        Route("/version", version),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]


async def health(request: Request) -> Response:
    """200 only while the engine's loop comes round and new requests are taken."""
    service = service_of(request)
    status, broken = service.health, service.worker.broken
    if status == "ok" and broken is not None:
        return json_response(Health("failed", broken), 503)
    told = Health(status)
    if service.worker.error is not None:
        told.error = str(service.worker.error)
    return json_response(told, 200 if status == "ok" else 503)


async def live(request: Request) -> Response:
    """200 while the process can still finish its work."""
    status = service_of(request).health
    return json_response(Health(status), 503 if status in ("wedged", "failed") else 200)


async def metrics(request: Request) -> Response:
    """What Prometheus reads."""
    return Response(service_of(request).metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})


async def slots(request: Request) -> Response:
    """Where each sequence is; of prompts the lengths alone."""
    return json_response(slots_of(service_of(request)))


async def version(request: Request) -> Response:
    """Of shoal."""
    return json_response(Version(__version__))


async def models(request: Request) -> Response:
    """All names of the model."""
    service = service_of(request)
    return json_response(ModelList([_model(service, name) for name in service.settings.served]))


async def model(request: Request) -> Response:
    """One of the names of the model."""
    service, name = service_of(request), request.path_params["name"]
    if name not in service.settings.served:
        raise APIError(f"model: {name!r} is not served here", "model", status=404, code="model_not_found")
    return json_response(_model(service, name))


def slots_of(service: Service) -> list[Slot]:
    """As the page and /slots show them."""
    now, owners = time.monotonic(), service.worker.owners
    return [
        Slot(
            id=name if not slot.sample else f"{name}.{slot.sample}",
            state=slot.state,
            prompt_tokens=slot.num_prompt,
            computed_tokens=slot.num_computed,
            output_tokens=slot.num_output,
            max_tokens=slot.max_tokens,
            age_seconds=round(now - slot.arrival_time, 3),
            rows=slot.rows,
            owner=owners.get(name, "batch" if slot.request_id.startswith("batch") else ""),
        )
        for slot in service.worker.slots
        for name in (slot.request_id.removeprefix("http:"),)
    ]


def page_state(service: Service) -> dict[str, Any]:
    """Everything that the page shows, once a second."""
    metrics, config = service.metrics, service.settings.engine
    llm = service.worker.llm
    state: dict[str, Any] = {
        "model": service.settings.served[0],
        "version": __version__,
        "health": service.health,
        "uptime_seconds": round(time.time() - service.started, 1),
        "slots": msgspec.to_builtins(slots_of(service)),
        "max_num_seqs": config.max_num_seqs,
        "waiting_tokens": service.room.waiting_tokens,
        "latency": {
            name: {"p50": recent.percentile(0.5), "p95": recent.percentile(0.95)}
            for name, recent in metrics.recent.items()
        },
        "history": [list(moment) for moment in tuple(metrics.history)],
        "batches": [_progress(batch) for batch in service.unfinished_batches()],
    }
    if llm is None:
        return state
    stats = llm.engine.stats()
    target = config.target_step_ms
    return state | {
        "step": {
            "number": stats.steps,
            "seconds": metrics.step_seconds,
            "rows": stats.batch_rows,
            "target_seconds": None if target is None else target / 1000,
        },
        "running": stats.running,
        "waiting": stats.waiting,
        "kv_pages": {"used": sum(stats.num_pages) - sum(stats.free_pages), "total": sum(stats.num_pages)},
        "preemptions": stats.preemptions,
        "totals": {
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "generation_tokens": stats.generation_tokens,
            "requests": dict(metrics.ended),
        },
    }


def _progress(batch: Batch) -> dict[str, Any]:
    counts = batch.request_counts
    return {
        "id": batch.id,
        "status": batch.status,
        "completed": counts.completed,
        "failed": counts.failed,
        "total": counts.total,
        "created_at": batch.created_at,
    }


def _model(service: Service, name: str) -> Model:
    llm = service.worker.llm
    found = Model(name, int(service.started), service.settings.served[0], None)
    if llm is not None:
        found.max_model_len, found.meta = llm.engine.max_model_len, ModelMeta(llm.vocab_size)
    return found
