"""Running a job on a Ray cluster: the driver holds its lock, journal and files, workers compute."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from shoal.errors import EngineError, JobError, ParameterError, ShoalError
from shoal.jobs.input.inputs import Given
from shoal.jobs.running.files import JobFiles
from shoal.jobs.running.job import Report
from shoal.jobs.running.launch import Host, Say, run_here, settings_of
from shoal.jobs.running.progress import ProgressDisplay
from shoal.jobs.running.summary import Summary
from shoal.jobs.running.task import JobOptions, Task
from shoal.params import EngineConfig
from shoal.ray.connection import connected
from shoal.ray.fleet import Fleet, FleetOptions, needs_of
from shoal.ray.worker import Load, Nature, load_llm, nature_of
from shoal.system import streams

_PATIENCE = 15.0  # seconds for a machine with a GPU until that is said


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Where a job runs: ``address`` of a Ray cluster ("auto": the one that this machine belongs to, "local": one that is started here
    and ends with the job). ``workers`` None: as many as the cluster has room for when the job starts. Each has ``threads_per_worker``
    CPUs and ``gpus_per_worker`` GPUs. One that does not answer for ``stalled_after`` seconds is given up."""

    address: str = "auto"
    workers: int | None = None
    threads_per_worker: int = 1
    gpus_per_worker: float = 0
    stalled_after: float = 600.0

    def __post_init__(self) -> None:
        for name in ("workers", "threads_per_worker"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 100_000:
                raise ParameterError(name, value, "1 to 100000")
        if not 0 <= self.gpus_per_worker <= 64:
            raise ParameterError("gpus_per_worker", self.gpus_per_worker, "0 to 64")
        if not self.stalled_after > 0:
            raise ParameterError("stalled_after", self.stalled_after, "a positive number of seconds")


def run(
    model: str | Path,
    input: Given,
    output: str | Path,
    *,
    address: str = "auto",
    workers: int | None = None,
    threads_per_worker: int = 1,
    gpus_per_worker: float = 0,
    error_file: str | Path | None = None,
    show_progress: bool = True,
    **settings: Any,
) -> Summary:
    """As ``shoal.jobs.run``, on the workers of a Ray cluster (see Cluster).

        summary = shoal.ray.run("smollm2:135m", "requests.jsonl", "results.jsonl", address="auto", workers=8)

    This process is the driver: it reads and writes the files, and a job whose driver ends goes on with the same call, here or without
    Ray. Raises what ``shoal.jobs.run`` raises, and JobError where the cluster cannot be reached.
    """
    cluster = Cluster(
        address=address,
        workers=workers,
        threads_per_worker=threads_per_worker,
        gpus_per_worker=gpus_per_worker,
    )
    options, config = settings_of(settings)
    files = JobFiles.named(input, output, error_file)
    if not show_progress:
        return run_job(model, files, options, config, cluster, say=lambda text: None, report=lambda progress: None)
    with ProgressDisplay(sys.stderr) as display:
        return run_job(model, files, options, config, cluster, say=streams.say, report=display.update)


def run_job(
    model: str | Path,
    files: JobFiles,
    options: JobOptions,
    config: EngineConfig,
    cluster: Cluster,
    *,
    say: Say,
    report: Report,
    load: Load = load_llm,
) -> Summary:
    """As ``run``; ``say`` hears what a user should know, ``report`` how far the job is. ``load`` makes the engine half of a worker."""
    if config.threads not in (None, cluster.threads_per_worker):
        raise ParameterError("threads", config.threads, "left out: threads_per_worker says it")
    if config.device == "cuda" and not cluster.gpus_per_worker:
        raise ParameterError("device", config.device, "used with gpus_per_worker")
    config = replace(config, threads=cluster.threads_per_worker)
    files.check()
    with connected(cluster.address, say):
        count = cluster.workers or _room(cluster)
        task, nature = _task_and_nature(model, files, options, config, cluster, say)
        fleet = FleetOptions(count, cluster.threads_per_worker, cluster.gpus_per_worker, cluster.stalled_after)

        def workers(task: Task) -> Fleet:
            found = Fleet(_everywhere(model), task, fleet, load=load, nature=nature, say=say)
            found.open()
            return found

        return run_here(task, Host(workers, say, report))


def _task_and_nature(
    model: str | Path, files: JobFiles, options: JobOptions, config: EngineConfig, cluster: Cluster, say: Say
) -> tuple[Task, Nature]:
    """What the job is. Where workers have GPUs, one such machine says what a GPU computes: this one may have none."""
    on_cpu = cluster.gpus_per_worker or config.device == "auto"
    task = Task.of(model, files, options, replace(config, device="cpu") if on_cpu else config)
    if not cluster.gpus_per_worker:
        return task, nature_of(task)
    name = _everywhere(model)

    def there() -> tuple[EngineConfig, Nature]:
        settled = Task.of(name, files, options, config)
        return settled.config, nature_of(settled)

    asked = ray.remote(there).options(num_cpus=cluster.threads_per_worker, num_gpus=cluster.gpus_per_worker).remote()
    if not ray.wait([asked], timeout=_PATIENCE)[0]:
        needs = needs_of(cluster.threads_per_worker, cluster.gpus_per_worker)
        say(f"the job waits for a machine with {needs} to say what a GPU computes")
    try:
        found, nature = ray.get(asked)
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else None
        raise cause if isinstance(cause, ShoalError) else EngineError(f"no GPU could be asked: {error}") from error
    return replace(task, config=found), nature


def _room(cluster: Cluster) -> int:
    """How many workers the nodes of the cluster have room for."""
    room = sum(_room_on(node["Resources"], cluster) for node in ray.nodes() if node["Alive"])
    if room < 1:
        needs = needs_of(cluster.threads_per_worker, cluster.gpus_per_worker)
        raise JobError(f"the cluster has no room for a worker with {needs}; give the number of workers to wait for it")
    return room


def _room_on(node: dict[str, float], cluster: Cluster) -> int:
    rooms = [node.get("CPU", 0) // cluster.threads_per_worker]
    if cluster.gpus_per_worker:
        rooms.append(node.get("GPU", 0) // cluster.gpus_per_worker)
    return int(min(rooms))


def _everywhere(model: str | Path) -> str:
    """The name of a model for other machines: paths are not those of a folder that only this process is in."""
    return os.path.abspath(model) if os.path.exists(model) else str(model)
