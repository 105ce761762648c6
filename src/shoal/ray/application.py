"""The server on many machines: replicas of it behind one endpoint, as an application of Ray Serve."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ray import serve

from shoal.errors import ParameterError
from shoal.params import EngineConfig, parse_size
from shoal.ray.ingress import Ingress, Routing
from shoal.ray.replica import SECRET_VARIABLE, Replica, Setup, read_secret
from shoal.ray.routing import PREFIX_BYTES
from shoal.server.app import body_of_error
from shoal.server.front import Front
from shoal.server.keys import VARIABLE, Keys, read_keys
from shoal.server.settings import ServerSettings

_ENGINE = {field.name for field in fields(EngineConfig)} - {"skip_tokenizer_init", "threads"}
_SERVER = {
    "max_waiting",
    "max_waiting_tokens",
    "request_timeout",
    "queue_timeout",
    "isolate_prefix_cache",
    "keep_alive",
    "stall_timeout",
    "drain_timeout",
}
_POLICY = "shoal.ray.scaling:by_requests"
_BESIDE = 64  # calls that generate nothing, at a time
_AFTER_DRAIN = 10.0  # seconds until Ray ends a replica that should have ended


def serve_app(
    model: str,
    *,
    replicas: int | None = None,
    autoscaling_config: Mapping[str, Any] | None = None,
    ingress_replicas: int = 1,
    threads: int = 1,
    ray_actor_options: Mapping[str, Any] | None = None,
    served_model_name: str | Sequence[str] = (),
    api_keys: str | Sequence[str] = (),
    cors_origins: str | Sequence[str] = (),
    max_body_size: int | str = "2MiB",
    spill_above: int | None = None,
    prefix_bytes: int = PREFIX_BYTES,
    **options: Any,
) -> serve.Application:
    """An application for ``serve.run``, or for ``serve run module:app``:

        app = shoal.ray.serve_app("smollm2:135m", replicas=2, threads=4)

    ``model`` is a path, a short name or ``hf:ORG/REPO:QUANT``, found on each machine. There are ``replicas`` of it (default 1), each
    with ``threads`` threads and as many of the cluster's CPUs, or as many as Ray Serve's ``autoscaling_config`` lets there be: one for
    every ``target_ongoing_requests`` (default: ``max_num_seqs``). ``ray_actor_options`` are those of a replica (``{"num_gpus": 1}``).

    Requests whose prompts have the first ``prefix_bytes`` bytes in common go to one replica, until that has ``spill_above`` requests
    (default: half of ``max_num_seqs``) and a quarter more than the mean; then to the one that has least.

    ``options`` are the keywords of LLM, and the flags of ``shoal serve`` that say who waits for how long: ``max_waiting``,
    ``max_waiting_tokens``, ``request_timeout``, ``queue_timeout``, ``isolate_prefix_cache``, ``keep_alive``, ``stall_timeout``,
    ``drain_timeout``. They hold for each replica. The environment's SHOAL_SERVE_SECRET, the same at each deployment, lets
    those of before and of now work together while one takes the place of the other. Raises ParameterError.
    """
    unknown = next((name for name in options if name not in _ENGINE | _SERVER), None)
    if unknown is not None:
        raise ParameterError(unknown, options[unknown], "left out: it is no keyword of serve_app")
    config = EngineConfig(threads=threads, **{name: value for name, value in options.items() if name in _ENGINE})
    keys = Keys(read_keys(_several(api_keys), None, os.environ.get(VARIABLE)))
    limits = {name: value for name, value in options.items() if name in _SERVER} | {"keys_given": bool(keys)}
    served = _several(served_model_name)
    settings = ServerSettings(engine=config, served=served, **limits)
    secret = read_secret(os.environ.get(SECRET_VARIABLE))
    routing = Routing(
        spill_above=_count("spill_above", max(1, config.max_num_seqs // 2) if spill_above is None else spill_above),
        prefix_bytes=_count("prefix_bytes", prefix_bytes),
        secret=secret,
    )
    front = Front(
        cors_origins=_several(cors_origins),
        keys=keys,
        body_bytes=parse_size("max_body_size", max_body_size),
        error_body=body_of_error,
    )
    scale, most = _scale(replicas, autoscaling_config, config)
    engines = _deployment(
        Replica, settings, scale | {"ray_actor_options": {"num_cpus": threads, **(ray_actor_options or {})}}
    )
    requests = most * (config.max_num_seqs + settings.max_waiting + _BESIDE)
    scale = {"num_replicas": _count("ingress_replicas", ingress_replicas), "max_ongoing_requests": requests}
    ingress = _deployment(serve.ingress()(Ingress), settings, scale | {"ray_actor_options": {"num_cpus": 0}})
    setup = Setup(model=model, config=config, served=served, settings=limits, secret=secret)
    return ingress.bind(engines.bind(setup), front, routing)


def _deployment(kind: Any, settings: ServerSettings, options: Mapping[str, Any]) -> Any:
    """``kind`` as Ray Serve starts it; one that is to end has the time that it needs for requests under way."""
    name = Ingress.__name__ if issubclass(kind, Ingress) else kind.__name__
    return serve.deployment(kind).options(
        name=name,
        graceful_shutdown_timeout_s=settings.drain_timeout + _AFTER_DRAIN,
        logging_config={"enable_access_log": issubclass(kind, Ingress)},  # each replica is asked how it is all the time
        **options,
    )


def _scale(
    replicas: int | None, autoscaling: Mapping[str, Any] | None, config: EngineConfig
) -> tuple[dict[str, Any], int]:
    """What Ray Serve is told, and how many replicas there will be at most."""
    if autoscaling is None:
        count = _count("replicas", 1 if replicas is None else replicas)
        return {"num_replicas": count}, count
    if replicas is not None:
        raise ParameterError("replicas", replicas, "left out where autoscaling_config is given")
    least, most = autoscaling.get("min_replicas", 1), autoscaling.get("max_replicas", 1)
    if least < 1:
        raise ParameterError("min_replicas", least, "at least 1: what comes while there is no replica is refused")
    own = {"target_ongoing_requests": config.max_num_seqs, "policy": {"policy_function": _POLICY}}
    return {"autoscaling_config": own | dict(autoscaling)}, most


def _count(name: str, value: int) -> int:
    if type(value) is not int or value < 1:
        raise ParameterError(name, value, "at least 1")
    return value


def _several(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
