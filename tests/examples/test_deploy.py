"""The files of examples/deploy and what docs/deploy.md says of them: flags, metrics and paths are the server's, and the programs that
they are for accept them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.cli import main as cli
from shoal.engine.engine import EngineStats
from shoal.params import EngineConfig
from shoal.server.app import create_app
from shoal.server.metrics import Metrics
from shoal.server.service import Service
from shoal.server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "examples" / "deploy"
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("deploy.md", "gpu.md", "server.md"))]

# Files in which every flag is one of `shoal serve`: other programs of theirs have none.
OURS_ALONE = ["shoal.service", "nginx.conf", "Caddyfile", "prometheus.yml", "alerts.yml"]

_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def text(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")


def command(verb: str) -> click.Command:
    """That of "serve", or of "bench sweep"."""
    found: click.Command = cli.shoal
    for name in verb.split():
        assert isinstance(found, click.Group)
        inner = found.get_command(click.Context(found), name)
        assert inner is not None, f"shoal {verb}: no such verb"
        found = inner
    return found


def flags_of(verb: str) -> set[str]:
    params = command(verb).params
    return {"--help", *(name for param in params for name in (*param.opts, *param.secondary_opts))}


# Flags ----------------------------------------------------------------------------------------------------------------


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """The verb and the flags of each command of ours in a text, with lines that a backslash continues."""
    for line in page.replace("\\\n", " ").splitlines():
        for found in re.finditer(r"(?<![\w./-])(?:/opt/shoal/bin/)?shoal ((?:bench |job )?[a-z-]+)([^|&;`#]*)", line):
            if found[1].split()[0] in cli.VERBS:
                yield found[1], _FLAG.findall(found[2])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_have_flags_that_exist(page: Path) -> None:
    found = list(commands(page.read_text(encoding="utf-8")))
    assert any(verb == "serve" for verb, _ in found)
    for verb, flags in found:
        assert set(flags) <= flags_of(verb), f"shoal {verb}"


def test_flags_named_in_the_text_are_flags_of_serve() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    named = {words.split()[0] for words in re.findall(r"`(--[^`]+)`", page)}
    assert "--drain-timeout" in named
    others = {"--stop-timeout", "--cpuset-cpus", "--volume"}  # of podman
    assert named - others <= flags_of("serve")


@pytest.mark.parametrize("name", OURS_ALONE)
def test_flags_in_files_are_flags_of_serve(name: str) -> None:
    assert set(_FLAG.findall(text(name))) <= flags_of("serve")


def test_the_container_starts_a_server_with_flags_that_exist() -> None:
    commands = re.findall(r"^(?:CMD|ENTRYPOINT) (\[.*\])$", text("Containerfile"), re.MULTILINE)
    program, *arguments = [word for part in commands for word in json.loads(part)]
    assert (program, arguments[0]) == ("shoal", "serve")
    assert {word for word in arguments if word.startswith("--")} <= flags_of("serve")


def test_a_stop_waits_longer_than_a_drain() -> None:
    drain = next(param.default for param in command("serve").params if param.name == "drain_timeout")
    assert isinstance(drain, float)
    unit = re.search(r"^TimeoutStopSec=(\d+)$", text("shoal.service"), re.MULTILINE)
    assert unit is not None
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    times = [unit[1], *re.findall(r"--stop-timeout (\d+)", page), *re.findall(r"GracePeriodSeconds: (\d+)", page)]
    assert len(times) == 3
    assert min(map(float, times)) > drain + 5


# Paths ----------------------------------------------------------------------------------------------------------------


def test_probes_ask_for_paths_that_exist() -> None:
    config = EngineConfig(device="reference")
    app = create_app(Service(lambda: pytest.fail("nothing is loaded"), ServerSettings(engine=config, served=("m",))))
    routes = {getattr(route, "path", None) for route in app.routes}
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    everything = "\n".join([page, *(file.read_text(encoding="utf-8") for file in FILES.iterdir())])
    found = re.findall(r"127\.0\.0\.1:8000(/[a-z]+)|path: (/[a-z]+), port", everything)
    asked = {path for pair in found for path in pair if path}
    assert {"/live", "/health"} <= asked <= routes


def test_the_page_names_every_file() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(\.\./examples/deploy/([^)]+)\)", page)) == {file.name for file in FILES.iterdir()}


# Metrics --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exposed() -> set[str]:
    """The names of all samples at /metrics."""
    fields: dict[str, Any] = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
    stats = EngineStats(**{**fields, "free_pages": (1,), "num_pages": (2,)})
    exposition = Metrics("m", lambda: stats, lambda: 0).exposition().decode()
    return {sample.name for family in text_string_to_metric_families(exposition) for sample in family.samples}


@pytest.mark.parametrize("file", [FILES / "grafana.json", FILES / "alerts.yml", ROOT / "docs" / "deploy.md"])
def test_metrics_are_those_of_the_server(file: Path, exposed: set[str]) -> None:
    named = set(re.findall(r"shoal:[a-z0-9_]+", file.read_text(encoding="utf-8")))
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exposed}
    assert named
    # A page may name a histogram as a whole, an expression only what is there.
    assert named <= (exposed | families if file.suffix == ".md" else exposed)


# The dashboard --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(text("grafana.json"))
    return content


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_asks_the_data_source_that_is_chosen(dashboard: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    asking = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    asking += [target for panel in asking for target in panel["targets"]]
    asking += [variable for variable in variables.values() if variable["type"] == "query"]
    assert all(part["datasource"]["uid"] == "${datasource}" for part in asking)
    named = {name for expression in expressions(dashboard) for name in re.findall(r"\$(\w+)", expression)}
    assert named == {*variables, "__rate_interval"} - {"datasource"}


def test_panels_lie_side_by_side(dashboard: dict[str, Any]) -> None:
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells, panel["title"]
        assert max(x for x, _ in own) < 24, panel["title"]
        cells |= own
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


# The programs that read them ------------------------------------------------------------------------------------------


def program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, stdin=subprocess.DEVNULL
    )


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    verifier = program("systemd-analyze")
    for name in ("shoal.service", "shoal-live.service", "shoal-live.timer"):
        (tmp_path / name).write_text(text(name).replace("/opt/shoal/bin/shoal", sys.executable))
    units = [str(tmp_path / name) for name in ("shoal.service", "shoal-live.service", "shoal-live.timer")]
    done = run(verifier, "verify", "--man=no", *units)
    assert [line for line in done.stderr.splitlines() if "shoal" in line] == []
    if done.returncode:
        pytest.skip(f"systemd-analyze cannot verify units here: {done.stderr.strip()[-200:]}")


def test_the_stuck_server_is_looked_for_in_valid_shell() -> None:
    unit = text("shoal-live.service").replace("\\\n", " ")
    start = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert start is not None
    shell, option, script = shlex.split(start[1])
    assert (shell, option) == ("/bin/sh", "-c")
    assert run("/bin/sh", "-n", "-c", script).returncode == 0


def test_nginx_accepts_the_site(tmp_path: Path) -> None:
    nginx, openssl = program("nginx"), program("openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = run(
        *f"{openssl} req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost".split(),
        *("-keyout", str(key), "-out", str(certificate)),
    )
    assert made.returncode == 0, made.stderr
    site = re.sub(r"^ *listen \[::\].*\n", "", text("nginx.conf"), flags=re.MULTILINE)  # there may be no IPv6
    for old, new in {
        "listen 80": f"listen unix:{tmp_path}/80",
        "listen 443": f"listen unix:{tmp_path}/443",
        "/etc/ssl/shoal/fullchain.pem": str(certificate),
        "/etc/ssl/shoal/privkey.pem": str(key),
        "/var/log/nginx/": f"{tmp_path}/",
    }.items():
        assert old in site
        site = site.replace(old, new)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
    whole = (
        f"pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}} http {{ access_log off; {temporary} {site} }}"
    )
    (tmp_path / "nginx.conf").write_text(whole)
    done = run(nginx, "-t", "-c", str(tmp_path / "nginx.conf"))
    assert done.returncode == 0, done.stderr


def test_caddy_accepts_its_file(tmp_path: Path) -> None:
    caddy = program("caddy")
    done = run(
        *(caddy, "validate", "--adapter", "caddyfile", "--config", str(FILES / "Caddyfile")),
        XDG_DATA_HOME=str(tmp_path),
        XDG_CONFIG_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr


def test_prometheus_accepts_its_files_and_the_expressions_of_the_dashboard(
    tmp_path: Path, dashboard: dict[str, Any]
) -> None:
    promtool = program("promtool")
    done = run(promtool, "check", "config", "--syntax-only", str(FILES / "prometheus.yml"))
    assert done.returncode == 0, done.stderr
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, expression in enumerate(expressions(dashboard))
    ]
    asked = tmp_path / "dashboard.yml"
    asked.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    done = run(promtool, "check", "rules", str(FILES / "alerts.yml"), str(asked))
    assert done.returncode == 0, done.stderr
