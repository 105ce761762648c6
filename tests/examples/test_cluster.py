"""The files of examples/cluster and what docs/scale.md says: flags and links exist, and the files are what they should be."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.examples.test_deploy import ROOT, commands, flags_of

yaml = pytest.importorskip("yaml")

FILES = ROOT / "examples" / "cluster"
PAGE = ROOT / "docs" / "scale.md"

# Those of KubeRay's RayJob, RayCluster and worker group that are used.
_JOB = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
_CLUSTER = {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}
_WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


@pytest.mark.parametrize("path", [PAGE, FILES / "shoal.sbatch", FILES / "rayjob.yaml"], ids=lambda path: path.name)
def test_commands_have_flags_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        text = yaml.safe_load(text)["spec"]["entrypoint"]
    found = list(commands(text))
    assert any(verb == "run-batch" for verb, _ in found)
    for verb, flags in found:
        assert set(flags) <= flags_of(verb), f"shoal {verb}"


def test_files_that_the_page_leads_to_are_there() -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE.read_text(encoding="utf-8")):
        assert link.startswith("http") or (PAGE.parent / link).is_file(), link


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_for_slurm_is_one() -> None:
    path = FILES / "shoal.sbatch"
    subprocess.run(["bash", "-n", path], check=True, timeout=60)
    text = path.read_text(encoding="utf-8")
    head, _, body = text.partition("set -euo pipefail")
    assert "#SBATCH" in head
    assert "#SBATCH" not in body  # SLURM reads none after the first command


def test_the_job_for_kubernetes_is_one() -> None:
    job: dict[str, Any] = yaml.safe_load((FILES / "rayjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"].keys() == _JOB
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster.keys() == _CLUSTER
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(group.keys() == _WORKERS for group in cluster["workerGroupSpecs"])
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    assert len(images) == 1  # the same shoal everywhere
    workers = int(re.findall(r"--workers (\d+)", job["spec"]["entrypoint"])[0])
    threads = int(re.findall(r"--threads-per-worker (\d+)", job["spec"]["entrypoint"])[0])
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert workers * threads == group["maxReplicas"] * int(limits["cpu"])


def test_the_image_has_the_version_of_ray_that_the_job_names() -> None:
    job = yaml.safe_load((FILES / "rayjob.yaml").read_text(encoding="utf-8"))
    version = job["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"'ray[default]=={version}'" in (FILES / "Containerfile").read_text(encoding="utf-8")
