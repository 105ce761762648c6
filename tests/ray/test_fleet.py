"""Workers that cannot start, that break, that do not answer, and that are not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import EngineError, JobError, MemoryLimitError
from shoal.jobs.running.files import JobFiles
from shoal.jobs.running.progress import JobProgress
from shoal.jobs.running.summary import Summary
from shoal.jobs.running.task import JobOptions
from shoal.params import EngineConfig
from shoal.ray import fleet
from shoal.ray.launch import Cluster, run_job
from shoal.ray.worker import Load, nature_of
from tests.jobs.kills import records_of
from tests.ray.fake import LoadBroken, LoadStuck, load_fake, load_nothing
from tests.ray.machines import Machines
from tests.support.tiny_model import write_tiny_model

RESUME = "finished rows are safe, resume with the same command"


@dataclass
class Place:
    """A folder with a job in it, and what is said and noted while it runs."""

    folder: Path
    model: Path
    address: str
    said: list[str] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)
    on_say: Callable[[str], None] = lambda text: None

    def write(self, *custom_ids: str) -> None:
        rows = [{"custom_id": name, "prompt": f"say {name}", "max_tokens": 1 + len(name)} for name in custom_ids]
        (self.folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, load: Load = load_fake, *, options: JobOptions | None = None, **cluster: Any) -> Summary:
        files = JobFiles.named(self.folder / "in.jsonl", self.folder / "out.jsonl")
        config = EngineConfig(device="cpu", max_num_seqs=2)
        there = Cluster(address=self.address, **{"workers": 2, **cluster})
        say, report, options = self._say, self._report, options or JobOptions()
        return run_job(self.model, files, options, config, there, say=say, report=report, load=load)

    def _say(self, text: str) -> None:
        self.said.append(text)
        self.on_say(text)

    def _report(self, progress: JobProgress) -> None:
        self.notes.add(progress.note)

    def records(self) -> dict[str, Any]:
        """By name, without the file's."""
        outputs = self.folder / "out.jsonl", self.folder / "out.jsonl.errors.jsonl"
        return {name: json.loads(record.partition(b": ")[2]) for name, record in records_of(outputs)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def place(tmp_path: Path, model: Path, cluster: Machines, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(fleet, "_PAUSES", (0.0,))
    monkeypatch.setattr(fleet, "_MOST_FAILED_STARTS", 2)
    found = Place(tmp_path, model, cluster.address)
    found.write(*(f"row {number}" for number in range(20)))
    return found


def test_engines_that_all_break_end_the_job_and_fail_no_row(place: Place) -> None:
    with pytest.raises(EngineError, match=f"out of luck; {RESUME}"):
        place.run(LoadBroken(), workers=1)
    assert place.records() == {}
    summary = place.run()
    assert (summary.done, summary.failed) == (20, 0)


def test_a_row_that_breaks_engines_fails_alone(place: Place) -> None:
    place.write("bad", *(f"row {number}" for number in range(20)))
    summary = place.run(LoadBroken("bad"))
    assert (summary.done, summary.failed) == (20, 1)
    assert place.records()["bad"]["error"]["code"] == "server_error"
    lost = [text for text in place.said if "out of luck" in text]
    assert len(lost) == 5, "two in company, three alone"


def test_a_row_that_breaks_engines_fails_though_no_row_is_done_after_it(place: Place) -> None:
    place.write("row 1", "bad")
    with (place.folder / "in.jsonl").open("a") as file:
        file.writelines(json.dumps({"prompt": "x", "temperature": -number}) + "\n" for number in range(1, 21))
    summary = place.run(LoadBroken("bad"))
    assert (summary.done, summary.failed) == (1, 21)
    assert place.records()["bad"]["error"]["code"] == "server_error"


def test_rows_that_alone_are_left_and_break_engines_are_not_failed(place: Place) -> None:
    place.write("bad")
    with pytest.raises(EngineError, match="out of luck"):
        place.run(LoadBroken("bad"))
    assert place.records() == {}


def test_workers_that_cannot_start_end_the_job_with_the_reason(place: Place) -> None:
    with pytest.raises(MemoryLimitError, match="needs 7 GiB, 1 GiB is there"):
        place.run(load_nothing)
    assert sum("could not start" in text for text in place.said) == 1, "one reason, said once"
    assert list(place.folder.iterdir()) == [place.folder / "in.jsonl"], "no job was begun"


def test_a_worker_of_another_nature_is_refused_by_name(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "shoal.ray.launch.nature_of", lambda task: nature_of(task)._replace(model="0123", shoal="0.0.1")
    )
    refusal = r"/\d+ cannot work on this job: shoal is .*, the job's is 0.0.1, model is .*, the job's is 0123"
    with pytest.raises(JobError, match=refusal):
        place.run()


def test_a_worker_that_does_not_answer_is_given_up(place: Place) -> None:
    summary = place.run(LoadStuck(place.folder / "mark"), stalled_after=4.0, workers=1)
    assert summary.done == 20
    assert any("no answer within 4 s; 3 rows go back in line" in text for text in place.said)


def test_more_workers_than_there_is_room_for(place: Place) -> None:
    summary = place.run(workers=6)
    assert summary.done == 20
    assert all(int(note.split()[0]) <= 4 for note in place.notes if note)


def test_a_job_waits_for_a_machine_that_has_room(
    place: Place, cluster: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes: list[Any] = []

    def join(text: str) -> None:
        if "no worker is there: the job waits until the cluster has 3 CPUs free for one" in text:
            nodes.append(cluster.add(cpus=3))

    monkeypatch.setattr(fleet, "_PATIENCE", 0.1)
    place = replace(place, on_say=join)
    try:
        assert place.run(workers=1, threads_per_worker=3).done == 20
    finally:
        for node in nodes:
            cluster.remove(node)


def test_no_room_for_even_one(place: Place) -> None:
    with pytest.raises(JobError, match="no room for a worker with 5 CPUs; give the number of workers to wait for it"):
        place.run(workers=None, threads_per_worker=5)
    with pytest.raises(JobError, match="no room for a worker with 1 CPU and 1 GPU"):
        place.run(workers=None, gpus_per_worker=1)


def test_too_many_errors_stop_a_job_and_the_same_command_goes_on(place: Place) -> None:
    place.write(*(f"row {number}" for number in range(40)))
    text = (place.folder / "in.jsonl").read_text().replace('"say row 2', '"broken row 2')  # 11 rows
    (place.folder / "in.jsonl").write_text(text)
    assert place.run(options=JobOptions(max_errors=3)).state == "stopped"
    summary = place.run(options=JobOptions(max_errors=11))
    assert (summary.state, summary.done, summary.failed) == ("finished", 29, 11)


def test_what_is_not_finished_expires(place: Place) -> None:
    rows = [{"custom_id": f"row {number}", "prompt": "x", "max_tokens": 10**6} for number in range(20)]
    (place.folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = place.run(options=JobOptions(deadline=1.0))
    assert (summary.state, summary.failed) == ("expired", 20)
    assert {record["error"]["code"] for record in place.records().values()} == {"batch_expired"}
