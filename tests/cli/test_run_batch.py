"""``shoal run-batch`` as a user runs it: a process, a small random model, files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Shoal, environment
from tests.support.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=256)


@pytest.fixture
def batch(shoal: Shoal, model: Path) -> Shoal:
    """``batch("in.jsonl", "out.jsonl", "--strict")`` runs the verb on the small model."""

    def run(source: str | Path, target: str | Path, *flags: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return shoal("run-batch", model, "--device", "reference", "-i", source, "-o", target, *flags, stdin=stdin)

    return run


def chat(custom_id: str, text: str, **fields: Any) -> dict[str, Any]:
    return _row(custom_id, "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})


def completion(custom_id: str, prompt: Any, **fields: Any) -> dict[str, Any]:
    return _row(custom_id, "/v1/completions", {"prompt": prompt, **fields})


def _row(custom_id: str, url: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
    return path


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Records by custom_id."""
    return parse(path.read_text(encoding="utf-8"))


def parse(text: str) -> dict[str, dict[str, Any]]:
    records = [json.loads(item) for item in text.splitlines()]
    found = {record["custom_id"]: record for record in records}
    assert len(found) == len(records)
    return found


def tokens(record: dict[str, Any]) -> Any:
    """What was generated, whatever the moment, the ids, and what others left in the prefix cache."""
    body = record["response"]["body"]
    return body["choices"], {name: count for name, count in body["usage"].items() if name != "prompt_tokens_details"}


MIXED = [
    chat("chat", "Hello", max_tokens=12, temperature=0),
    chat("seedless", "Hello again", max_completion_tokens=20),
    chat("seeded", "Hi", max_tokens=9, seed=4, logprobs=True, top_logprobs=3),
    completion("text", "Once upon a time", max_tokens=15, temperature=0.7, top_k=20, logprobs=2),
    completion("ids", [72, 105], max_tokens=5, temperature=0),
    completion("twin", "Once", max_tokens=8),
    completion("other twin", "Once", max_tokens=8),
    chat("no limit", "Hi", temperature=0, model="tiny"),
]


def test_rows_in_results_out(batch: Shoal, tmp_path: Path) -> None:
    done = batch(write(tmp_path / "in.jsonl", *MIXED), "out.jsonl")
    assert (done.returncode, done.stdout) == (0, "")
    assert "8 rows done, 0 failed" in done.stderr
    assert not (tmp_path / "out.jsonl.errors.jsonl").exists()
    records = read(tmp_path / "out.jsonl")
    assert records.keys() == {row["custom_id"] for row in MIXED}
    for record in records.values():
        assert record["error"] is None
        assert record["response"]["status_code"] == 200
        assert record["response"]["body"]["choices"][0]["finish_reason"] in ("stop", "length")
    usage = records["ids"]["response"]["body"]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (2, 5, 7)
    whole = records["no limit"]["response"]["body"]
    assert whole["usage"]["total_tokens"] == 256 or whole["choices"][0]["finish_reason"] == "stop"
    assert len(records["seeded"]["response"]["body"]["choices"][0]["logprobs"]["content"]) == 9
    assert tokens(records["twin"])[0] != tokens(records["other twin"])[0]


def test_answers_do_not_depend_on_order_or_on_who_else_is_there(batch: Shoal, tmp_path: Path) -> None:
    first = batch(write(tmp_path / "a.jsonl", *MIXED), "a.out", "--seed", "3")
    second = batch(write(tmp_path / "b.jsonl", *MIXED[::-1]), "b.out", "--seed", "3", "--max-num-seqs", "2")
    alone = batch(write(tmp_path / "c.jsonl", MIXED[1]), "c.out", "--seed", "3")
    other = batch(write(tmp_path / "d.jsonl", MIXED[1]), "d.out", "--seed", "4")
    assert [done.returncode for done in (first, second, alone, other)] == [0] * 4
    a, b, c, d = (read(tmp_path / f"{name}.out") for name in "abcd")
    assert {key: tokens(record) for key, record in a.items()} == {key: tokens(record) for key, record in b.items()}
    assert tokens(a["seedless"]) == tokens(c["seedless"])
    assert tokens(a["seedless"]) != tokens(d["seedless"])


def test_bad_rows_go_to_the_error_file_and_harm_nobody(batch: Shoal, tmp_path: Path) -> None:
    rows: list[dict[str, Any] | str] = [
        "this is no json",
        chat("good", "Hello", max_tokens=3),
        chat("too long", "x" * 300),
        chat("no messages", "x", messages=[]),
        completion("too many", "x", n=17),
        completion("nan", "x", temperature=float("nan")),
        completion("vocabulary", [5, 100_000]),
        chat("other model", "x", model="gpt-4o"),
        '{"custom_id": "deep", "body": ' + "[" * 100_000,
        {**chat("method", "x"), "method": "GET"},
        {**chat("url", "x"), "url": "/v1/images"},
        chat("also good", "<|im_end|> is text here", max_tokens=3),
    ]
    done = batch(write(tmp_path / "in.jsonl", *rows), "out.jsonl")
    assert done.returncode == 0
    assert "2 rows done, 10 failed" in done.stderr
    assert "failures are in out.jsonl.errors.jsonl" in done.stderr
    assert read(tmp_path / "out.jsonl").keys() == {"good", "also good"}
    errors = [json.loads(line) for line in (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()]
    found = {
        record["response"]["body"]["error"]["line"]: (
            record["custom_id"],
            record["response"]["status_code"],
            record["response"]["body"]["error"]["param"],
        )
        for record in errors
    }
    assert found == {
        1: (None, 400, None),
        3: ("too long", 400, "messages"),
        4: ("no messages", 400, "messages"),
        5: ("too many", 400, "n"),
        6: ("nan", 400, "temperature"),
        7: ("vocabulary", 400, "prompt"),
        8: ("other model", 404, "model"),
        9: (None, 400, None),
        10: ("method", 400, "method"),
        11: ("url", 400, "url"),
    }


def test_prompts_are_echoed_and_scored(batch: Shoal, tmp_path: Path) -> None:
    rows = [
        completion("score", "Once upon a time", echo=True, logprobs=1, max_tokens=0),
        completion("echo", "Once upon a time", echo=True, logprobs=1, max_tokens=3, temperature=0, ignore_eos=True),
        completion("plain", "Once upon a time", logprobs=1, max_tokens=3, temperature=0, ignore_eos=True),
        completion("field", "Once upon a time", prompt_logprobs=1, max_tokens=1),
        completion("nothing", "x", max_tokens=0),
    ]
    done = batch(write(tmp_path / "in.jsonl", *rows), "out.jsonl")
    assert "4 rows done, 1 failed" in done.stderr
    records = read(tmp_path / "out.jsonl")
    score, echo, plain, field = (tokens(records[name]) for name in ("score", "echo", "plain", "field"))
    assert (score[0][0]["text"], score[1]["completion_tokens"]) == ("Once upon a time", 0)
    assert echo[0][0]["text"] == "Once upon a time" + plain[0][0]["text"]
    for name, values in echo[0][0]["logprobs"].items():
        answer = plain[0][0]["logprobs"][name]
        shifted = [offset + 16 for offset in answer] if name == "text_offset" else answer
        assert values == score[0][0]["logprobs"][name] + shifted
    scored = [None if place is None else next(iter(place.values())) for place in field[0][0]["prompt_logprobs"]]
    assert [place and place["logprob"] for place in scored] == score[0][0]["logprobs"]["token_logprobs"]


def test_fail_on_errors_and_another_error_file(batch: Shoal, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", "bad", completion("a", "x", max_tokens=1))
    done = batch(source, "out.jsonl", "--fail-on-errors", "--error-file", "bad.jsonl")
    assert done.returncode == 1
    assert len(read(tmp_path / "bad.jsonl")) == 1
    done = batch(write(tmp_path / "good.jsonl", completion("a", "x", max_tokens=1)), "good.out", "--fail-on-errors")
    assert done.returncode == 0


def test_one_file_may_take_results_and_failures(batch: Shoal, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", completion("a", "x", max_tokens=1), completion("b", ""))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "out.jsonl")
    assert batch(source, "out.jsonl", "--error-file", "link.jsonl").returncode == 0
    assert read(tmp_path / "out.jsonl").keys() == {"a", "b"}


def test_strict_refuses_the_whole_file_before_anything_is_run(batch: Shoal, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", completion("a", "x", max_tokens=1), "bad", completion("b", "x", n=17))
    done = batch(source, "out.jsonl", "--strict")
    assert done.returncode == 2
    assert (
        done.stderr == "shoal: 2 bad lines, nothing was run; line 2: not valid JSON: Expecting value at character 0\n"
    )
    assert not (tmp_path / "out.jsonl").exists()
    good = write(tmp_path / "good.jsonl", completion("a", "x", max_tokens=1))
    assert batch(good, "out.jsonl", "--strict").returncode == 0
    assert batch("-", "-", "--strict").returncode == 2


def test_standard_streams_carry_requests_results_and_failures(batch: Shoal, tmp_path: Path) -> None:
    rows = "\n".join([json.dumps(completion("a", "x", max_tokens=2)), json.dumps(completion("b", ""))])
    done = batch("-", "-", stdin=rows)
    assert done.returncode == 0
    records = parse(done.stdout)
    assert records["a"]["response"]["status_code"] == 200
    assert records["b"]["response"]["status_code"] == 400
    apart = batch("-", "-", "--error-file", "bad.jsonl", stdin=rows)
    assert parse(apart.stdout).keys() == {"a"}
    assert read(tmp_path / "bad.jsonl").keys() == {"b"}


def test_what_is_there_is_not_written_over(batch: Shoal, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", completion("a", "x", max_tokens=2))
    (tmp_path / "out.jsonl").write_text("precious\n")
    done = batch(source, "out.jsonl")
    assert done.returncode == 2
    assert "out.jsonl" in done.stderr
    assert "--restart" in done.stderr
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"
    (tmp_path / "out.jsonl.errors.jsonl").write_text("old\n")
    assert batch(source, "out.jsonl", "--restart").returncode == 0
    assert read(tmp_path / "out.jsonl").keys() == {"a"}
    assert (tmp_path / "out.jsonl.errors.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["-i", "nosuch.jsonl", "-o", "out"], "input file"),
        (["-i", ".", "-o", "out"], "input file"),
        (["-i", "in.jsonl", "-o", "in.jsonl"], "another file than the input"),
        (["-i", "in.jsonl", "-o", "./link.jsonl", "--restart"], "another file than the input"),
        (["-i", "in.jsonl", "-o", "out", "--error-file", "in.jsonl"], "another file than the input"),
        (["-i", "in.jsonl", "-o", "nosuch/out"], "in a folder that exists"),
        (["-i", "in.jsonl", "-o", "out", "--model", "nosuch.gguf"], "nosuch.gguf"),
        (["-i", "in.jsonl", "-o", "out", "--max-num-seqs", "0"], "max_num_seqs"),
        (["-o", "out"], "--input-file"),
        (["-i", "in.jsonl"], "--output-file"),
        (["-i", "in.jsonl", "-o", "out", "--workers", "2"], "--workers is used with --ray"),
    ],
)
def test_files_and_flags_that_are_refused(shoal: Shoal, tmp_path: Path, flags: list[str], says: str) -> None:
    source = write(tmp_path / "in.jsonl", completion("a", "x"))
    (tmp_path / "link.jsonl").symlink_to(source)
    before = source.read_bytes()
    done = shoal("run-batch", *flags)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert source.read_bytes() == before


def test_a_model_may_be_called_by_any_of_its_names_or_by_those_given(batch: Shoal, model: Path, tmp_path: Path) -> None:
    names = [str(model), "tiny.gguf", "tiny"]
    rows = [completion(name, "x", max_tokens=1, model=name) for name in names]
    assert batch(write(tmp_path / "in.jsonl", *rows), "out.jsonl").returncode == 0
    assert read(tmp_path / "out.jsonl").keys() == set(names)
    served = [completion(name, "x", max_tokens=1, model=name) for name in ("one", "two", "tiny")]
    flags = ("--served-model-name", "one", "--served-model-name", "two")
    assert batch(write(tmp_path / "served.jsonl", *served), "served.out", *flags).returncode == 0
    assert read(tmp_path / "served.out").keys() == {"one", "two"}
    assert read(tmp_path / "served.out.errors.jsonl").keys() == {"tiny"}


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("in.jsonl", b"", "in.jsonl: is empty: there is nothing to run"),
        ("in.jsonl", b"\xef\xbb\xbf\n \n", "in.jsonl: has no rows: there is nothing to run"),
        ("in.csv", b"", "in.csv: is empty: there is nothing to run"),
        ("in.csv", b"id,prompt\n", "in.csv: has no rows: there is nothing to run"),
        ("in.jsonl", b"\xff\xfe{\x00}\x00", "in.jsonl: this is text in UTF-16, not JSON lines: save it as UTF-8"),
        ("in.csv", b"\xff\xfei\x00d\x00", "in.csv: this is text in UTF-16, not CSV: save it as UTF-8"),
        ("in.jsonl", b'[{"prompt": "x"}]', "in.jsonl: this is a JSON array, not JSON lines"),
        ("-", b"", "-: is empty: there is nothing to run"),
        ("-", b"[\n{}\n]\n", "-: this is a JSON array, not JSON lines"),
    ],
)
def test_an_input_of_another_kind_is_one_line_and_nothing_is_written(
    batch: Shoal, tmp_path: Path, name: str, data: bytes, says: str
) -> None:
    if name != "-":
        (tmp_path / name).write_bytes(data)
    before = sorted(tmp_path.iterdir())
    stdin = data.decode() if name == "-" else ""
    for output in ("out.jsonl", "-", *(["out.csv"] if name == "in.csv" else [])):
        done = batch(name, output, "--error-file", "errors.jsonl", stdin=stdin)
        assert (done.returncode, done.stdout) == (2, "")
        said = [line for line in done.stderr.splitlines() if " stream" not in line and " stdin: " not in line]
        assert len(said) == 1
        assert said[0].startswith(f"shoal: {says}")
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_ends_the_job_in_one_line(batch: Shoal, tmp_path: Path) -> None:
    done = batch(write(tmp_path / "in.jsonl", completion("a", "x", max_tokens=1)), "/dev/full")
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_keeps_what_is_finished(model: Path, cache: Path, tmp_path: Path) -> None:
    rows = [completion(str(i), "x", max_tokens=200, ignore_eos=True) for i in range(500)]
    process = _start(write(tmp_path / "in.jsonl", *rows), model, cache, tmp_path)
    _wait_until(lambda: (tmp_path / "out.jsonl").exists() and (tmp_path / "out.jsonl").stat().st_size > 0)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted: " in stderr
    assert "Traceback" not in stderr
    assert 0 < len(read(tmp_path / "out.jsonl")) < len(rows)


@pytest.mark.parametrize("row", ["", json.dumps(completion("a", "x", max_tokens=1)) + "\n"], ids=["first", "next"])
def test_ctrl_c_while_it_waits_for_input(model: Path, cache: Path, tmp_path: Path, row: str) -> None:
    process = _start("-", model, cache, tmp_path)
    assert process.stdin is not None
    process.stdin.write(row)
    process.stdin.flush()
    output = tmp_path / "out.jsonl"
    _wait_until((output if row else tmp_path / "out.jsonl.shoal").exists)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    assert process.returncode == 130
    assert (tmp_path / "out.jsonl.shoal").exists() == output.exists() == bool(row)
    process.communicate()


def _start(source: str | Path, model: Path, cache: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "shoal.cli.main", "run-batch", "--model", str(model), "--device", "reference"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, "--max-num-seqs", "4", "-i", str(source), "-o", "out.jsonl"],
        cwd=folder,
        env=environment(cache),
        stdin=pipe,
        stderr=pipe,
        text=True,
    )


def _wait_until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not come to pass"
        time.sleep(0.02)


def test_the_examples_run_on_the_default_model(smollm2_path: Path, tmp_path: Path) -> None:
    examples = Path(__file__).parents[2] / "examples" / "requests.jsonl"
    rows = [json.loads(line) for line in examples.read_text(encoding="utf-8").splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows) >= 40
    source = write(tmp_path / "in.jsonl", *[row for row in rows if row["body"].get("max_tokens", 99) <= 40])
    done = subprocess.run(
        [sys.executable, "-m", "shoal.cli.main", "run-batch", "-i", source, "-o", "out.jsonl", "--fail-on-errors"],
        cwd=tmp_path,
        env=environment(smollm2_path.parent),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(read(tmp_path / "out.jsonl")) == len(source.read_text(encoding="utf-8").splitlines()) > 0


def test_a_folder_of_parts_is_written_looked_at_and_left_alone(batch: Shoal, shoal: Shoal, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", completion("a", "x", max_tokens=2), completion("b", "y" * 900))
    done = batch(source, f"{tmp_path}/out/")
    assert done.returncode == 0
    assert f"failures are in {tmp_path}/out/errors/" in done.stderr
    (results,) = (tmp_path / "out" / "results").iterdir()
    (errors,) = (tmp_path / "out" / "errors").iterdir()
    assert (list(read(results)), list(read(errors))) == (["a"], ["b"])
    again = batch(source, tmp_path / "out")
    assert (again.returncode, "this job is finished already" in again.stderr) == (0, True)
    status = shoal("job", "status", tmp_path / "out", "--json")
    assert json.loads(status.stdout)["state"] == "finished"
    assert shoal("job", "cancel", tmp_path / "out").returncode == 2
    refused = batch(source, f"{tmp_path}/out/", "--error-file", tmp_path / "errors.jsonl")
    assert (refused.returncode, "left out where the output is a folder" in refused.stderr) == (2, True)


def test_several_inputs_are_one(batch: Shoal, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b", "a"):
        write(tmp_path / "in" / f"{name}.jsonl", completion(f"{name}1", "x"), {"prompt": "plain"})
    write(tmp_path / "more.jsonl", completion("c", "x"))
    done = batch(tmp_path / "in" / "*.jsonl", tmp_path / "out.jsonl", "-i", str(tmp_path / "more.jsonl"))
    assert done.returncode == 0
    assert read(tmp_path / "out.jsonl").keys() == {"a1", "row-2", "b1", "row-4", "c"}
    refused = batch(tmp_path / "in" / "*.csv", tmp_path / "out2.jsonl")
    assert refused.returncode == 2
    assert "must be a file, a folder or a glob of files that exist" in refused.stderr
