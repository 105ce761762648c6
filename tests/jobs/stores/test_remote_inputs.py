"""Inputs in S3 (moto's server) and on a web server, over real connections."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shoal import jobs
from shoal.errors import JobError, ParameterError
from shoal.jobs.input import remote
from shoal.jobs.input.inputs import Inputs
from shoal.jobs.input.source import open_inputs
from tests.support.tiny_model import write_tiny_model

s3fs = pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")

ROWS = [json.dumps({"prompt": f"{number} " * 50}).encode() + b"\n" for number in range(50_000)]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The file system of a server with a bucket, as a user's environment names it."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # those of other tests know another server
    system = s3fs.S3FileSystem(use_listings_cache=False)
    system.mkdir("bucket")
    yield system
    system.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def lines(given: str) -> list[bytes]:
    with open_inputs(Inputs.of(given)) as source:
        return [line.data or b"" for line in source]


def test_files_in_s3_are_found_and_read(s3: Any) -> None:
    s3.pipe(
        {"bucket/in/a.jsonl": b"".join(ROWS[:40_000]), "bucket/in/b.jsonl.gz": gzip.compress(b"".join(ROWS[40_000:]))}
    )
    s3.pipe({"bucket/in/c.txt": b"{}", "bucket/in/deeper/d.jsonl": b"{}"})
    assert s3.info("bucket/in/a.jsonl")["size"] > remote._BLOCK_BYTES
    for given in ("s3://bucket/in/", "s3://bucket/in", "s3://bucket/in/*.jsonl*"):
        assert Inputs.of(given).names() == ["a.jsonl", "b.jsonl.gz"]
    assert lines("s3://bucket/in/") == ROWS
    before = Inputs.of("s3://bucket/in/").fingerprint()
    assert Inputs.of("s3://bucket/in/").fingerprint() == before
    s3.pipe("bucket/in/b.jsonl.gz", gzip.compress(b"".join(ROWS[40_000:]), 1))
    assert Inputs.of("s3://bucket/in/").fingerprint() != before


@pytest.mark.parametrize("url", ["s3://bucket/in/absent", "s3://bucket/in/*", "s3://no-bucket/in/"])
def test_what_is_not_there_is_refused(s3: Any, url: str) -> None:
    with pytest.raises(ParameterError, match=r"input file: got 's3:.*', must be a file, a folder or a glob of files"):
        Inputs.of(url)


def test_an_object_that_is_replaced_while_it_is_read_stops_the_read(s3: Any) -> None:
    s3.pipe("bucket/a.jsonl", b"".join(ROWS))
    with open_inputs(Inputs.of("s3://bucket/a.jsonl")) as source:
        rows = iter(source)
        next(rows)
        s3.pipe("bucket/a.jsonl", b"".join(reversed(ROWS)))
        with pytest.raises(JobError, match=r"s3://bucket/a.jsonl: was changed after this run began"):
            list(rows)


def test_a_table_in_s3(s3: Any) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    with s3.open("bucket/a.parquet", "wb") as file:
        pq.write_table(pa.table({"prompt": [f"{number}" for number in range(1000)]}), file)
    assert [json.loads(line)["prompt"] for line in lines("s3://bucket/a.parquet")] == [f"{n}" for n in range(1000)]


def test_a_job_from_s3_to_s3(s3: Any, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", context=128)
    rows = [json.dumps({"prompt": f"row {number}", "max_tokens": 2}).encode() + b"\n" for number in range(10)]
    s3.pipe({"bucket/in/a.jsonl": b"".join(rows[:4]), "bucket/in/b.jsonl.gz": gzip.compress(b"".join(rows[4:]))})
    arguments = (model, "s3://bucket/in/*", "s3://bucket/out/")
    summary = jobs.run(*arguments, device="reference", show_progress=False)
    assert (summary.state, summary.rows, summary.done) == ("finished", 10, 10)
    parts = [s3.cat(path) for path in s3.ls("bucket/out/results")]
    names = [json.loads(line)["custom_id"] for line in b"".join(parts).splitlines()]
    assert sorted(names) == sorted(f"row-{number}" for number in range(1, 11))
    assert jobs.run(*arguments, device="reference", show_progress=False) == summary
    with pytest.raises(ParameterError, match="folder results/: got 's3://bucket/out/results', must be another file"):
        jobs.run(model, ["s3://bucket/in/", "s3://bucket/out/results/"], "s3://bucket/out/")
    s3.pipe("bucket/in/c.jsonl", rows[0])
    with pytest.raises(JobError, match=r"input.files: was 2, is 3"):
        jobs.run(*arguments, device="reference", show_progress=False)


class Ranges(SimpleHTTPRequestHandler):
    """Serves parts of files, and drops every third connection half way. With ``?bare`` it says no more of a file than its size."""

    protocol_version = "HTTP/1.1"
    requests = 0

    def do_HEAD(self) -> None:
        if self.path.startswith("/private/"):
            self.send_error(403)
        else:
            super().do_HEAD()

    def do_GET(self) -> None:
        path = Path(self.directory) / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(403 if self.path.startswith("/private/") else 404)
            return
        content = path.read_bytes()
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last or len(content)) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.end_headers()
        Ranges.requests += 1
        if Ranges.requests % 3 == 0:
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
        else:
            self.wfile.write(part)

    def send_header(self, keyword: str, value: str) -> None:
        if not (keyword == "Last-Modified" and self.path.endswith("?bare")):
            super().send_header(keyword, value)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a server of ``tmp_path``."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_file_on_a_web_server(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PAUSES", (0.0,) * 5)
    (tmp_path / "a.jsonl").write_bytes(b"".join(ROWS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(ROWS)))
    assert lines(f"{web}/a.jsonl") == ROWS
    assert lines(f"{web}/b.jsonl.gz?token=secret") == ROWS
    with pytest.raises(ParameterError, match="must be a file, a folder or a glob"):
        Inputs.of(f"{web}/absent.jsonl")


def test_a_web_server_that_refuses_is_not_told_as_a_file_that_is_absent(web: str) -> None:
    host = web.removeprefix("http://")
    with pytest.raises(JobError, match=rf"^{web}/private/a.jsonl: cannot be looked up: 403") as refused:
        Inputs.of(f"http://me:secret@{host}/private/a.jsonl?sig=secret")
    assert "secret" not in str(refused.value)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/a.jsonl"
        with pytest.raises(JobError, match=rf"^{url}: cannot be looked up: Cannot connect to host 127.0.0.1"):
            Inputs.of(f"{url}?sig=secret")


def test_a_file_of_which_a_web_server_says_the_size_only_is_known_by_that(web: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(ROWS[0])
    known = Inputs.of(f"{web}/a.jsonl?bare")
    assert known.files == (remote.RemoteFile(f"{web}/a.jsonl?bare", len(ROWS[0]), ""),)
    (tmp_path / "a.jsonl").write_bytes(ROWS[0] + ROWS[1])
    with pytest.raises(JobError, match=r"a.jsonl: was changed after this run began"), open_inputs(known):
        pass
