"""``fastvideo doctor``: what other machines answered, and this one."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastvideo.cli import main
from fastvideo.cli.doctor import wishes_of
from fastvideo.doctor.checks import Finding, Wishes, cuda, examine, packages, several, storage
from fastvideo.doctor.facts import Facts, Torch, gather, read_gpus

RECIPES = Path(__file__).parents[2] / "examples" / "distillation"
EIGHT = "NVIDIA H100 80GB HBM3, 580.95.05, 81559, 9.0\n" * 8
"""``nvidia-smi`` (:data:`SMI`) on a machine of eight GPUs."""
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running.\n"
)
TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 12040). Please update your GPU "
    "driver by downloading and installing a new version"
)
"""Torch's warning for a driver of CUDA 12.4 under a build for CUDA 13."""
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
SEEN = Torch("2.13.0+cu130", "13.0", 8, ARCHITECTURES, "2.28.9")


@pytest.fixture(scope="module")
def here() -> Facts:
    return gather()


def machine(here: Facts, torch: Torch, smi: str = EIGHT, code: int = 0, **more: Any) -> Facts:
    gpus, error = read_gpus(code, smi)
    return replace(here, torch=torch, gpus=gpus, smi_error=error, shared_memory=2**34, **more)


def wrong(findings: list[Finding]) -> list[str]:
    return [f"{f.level}: {f.text} -> {f.mend}" for f in findings if f.level != "ok"]


def test_eight_gpus_are_told_in_a_line(here: Facts) -> None:
    found = list(cuda(machine(here, SEEN), Wishes(Path())))
    assert [f.level for f in found] == ["ok", "ok"]
    assert found[0].text == "8 x NVIDIA H100 80GB HBM3 (79.6 GiB), driver 580.95.05"
    assert found[1].text == "2.13.0+cu130 for CUDA 13.0 sees 8 GPUs, NCCL 2.28.9"


def test_a_driver_that_is_too_old_is_named_with_both_versions(here: Facts) -> None:
    torch = replace(SEEN, devices=0, nccl=None, complaint=TOO_OLD)
    (said,) = wrong(list(cuda(machine(here, torch, EIGHT.replace("580.95.05", "550.54.15")), Wishes(Path()))))
    assert said.startswith("error: driver 550.54.15 is too old for torch 2.13.0+cu130, which is built for CUDA 13.0")
    assert "needs driver 580 or newer" in said
    assert "older" not in said or "previous-versions" in said


@pytest.mark.parametrize(
    ("torch", "smi", "said"),
    [
        (Torch("2.13.0+cpu", None), EIGHT, "torch 2.13.0+cpu is built for the CPU: it does not see the GPUs"),
        (replace(SEEN, devices=4), EIGHT, "torch 2.13.0+cu130 sees 4 of 8 GPUs"),
        (replace(SEEN, devices=0, complaint=TOO_OLD), EIGHT, TOO_OLD),
        (
            replace(SEEN, devices=1, architectures=("sm_90",)),
            "Tesla P100-PCIE-16GB, 580.65.06, 16384, 6.0\n",
            "no kernels for compute capability 6.0",
        ),
    ],
    ids=["CPU build", "hidden", "complaint", "too old a GPU"],
)
def test_gpus_that_torch_does_not_use(here: Facts, torch: Torch, smi: str, said: str) -> None:
    (message,) = wrong(list(cuda(machine(here, torch, smi), Wishes(Path()))))
    assert said in message


@pytest.mark.parametrize(("output", "code"), [(NO_DRIVER, 9), ("nvidia-smi is not installed", 127)])
def test_no_gpu_is_an_error_for_a_config_that_wants_cuda_alone(here: Facts, output: str, code: int) -> None:
    facts = machine(here, Torch("2.13.0+cpu", None), output, code)
    (fine,), (refused,) = cuda(facts, Wishes(Path())), cuda(facts, Wishes(Path(), cuda=True))
    assert (fine.level, refused.level) == ("ok", "error")
    assert output.strip() in fine.text


def test_a_version_outside_its_range_is_named_with_the_range(here: Facts) -> None:
    wanted = ("torch>=2.9", "transformers!=5.0.*,!=5.1.*,!=5.2.*,>=4.57", "peft>=0.17")
    installed = {"torch": "2.13.0+cu130", "transformers": "5.1.0"}
    found = wrong(list(packages(replace(here, requirements=wanted, installed=installed))))
    assert len(found) == 2
    assert "error: 5.1.0 is outside" in found[0]
    assert "!=5.1.*" in found[0]
    assert found[1].startswith("error: not installed; >=0.17 is needed -> pip install 'peft>=0.17'")


def test_what_several_processes_need(here: Facts) -> None:
    facts = machine(here, SEEN, interfaces=("eth0", "ib0"), environment={})
    assert wrong(list(several(facts)))[0].startswith("warning: several interfaces (eth0, ib0)")
    chosen = replace(facts, environment={"GLOO_SOCKET_IFNAME": "eth1"}, shared_memory=2**26)
    small, unknown = wrong(list(several(chosen)))
    assert "/dev/shm has 64.00 MiB" in small
    assert "GLOO_SOCKET_IFNAME is eth1, and the interfaces are eth0, ib0" in unknown
    assert "kills 30 s after SIGTERM" in wrong(list(several(replace(chosen, torch=replace(SEEN, version="2.9.1")))))[-1]


def test_this_machine_is_told_in_less_than_five_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.process_time()
    code = main(["doctor", "--out", str(tmp_path / "run"), "--json"])
    assert time.process_time() - begin < 5
    told = json.loads(capsys.readouterr().out)
    assert code == (0 if told["ok"] else 1)
    assert {"python", "packages", "GPU", "compiler", "memory", "output", "hub cache", "hub"} & {
        finding["subject"] for finding in told["findings"]
    } >= {"python", "output", "hub"}
    assert list(tmp_path.iterdir()) == []


def test_a_config_says_what_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str], here: Facts) -> None:
    wishes = wishes_of(Path("wan2.1_t2v_1.3b_dmd2"), tmp_path)
    assert wishes.models == {"model.path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}
    by_subject = {finding.subject: finding for finding in examine(here, wishes)}
    assert "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in by_subject["model"].mend
    assert main(["doctor", "--config", "no_such_recipe"]) == 2
    assert "no_such_recipe" in capsys.readouterr().err


def test_the_model_of_every_role_is_looked_for(tmp_path: Path, here: Facts) -> None:
    text = (RECIPES / "tiny_wan_dmd2.yaml").read_text()
    text = text.replace("teacher: {trainable: false}", "teacher: {trainable: false, path: someone/teacher}")
    text = text.replace("critic: {trainable: true}", f"critic: {{trainable: true, path: {tmp_path}/nothere}}")
    assert "someone/teacher" in text
    assert "nothere" in text
    (tmp_path / "run.yaml").write_text(text)
    findings = examine(here, wishes_of(tmp_path / "run.yaml", tmp_path))
    found = [finding for finding in findings if finding.subject == "model"]
    assert [finding.level for finding in found] == ["warning", "error"]
    assert found[0].text == "someone/teacher (roles.teacher.path) is not in the cache"
    assert found[1].text == f"{tmp_path}/nothere (roles.critic.path) does not exist"


def test_urls_of_a_config_need_their_packages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    text = (RECIPES / "tiny_wan_dmd2.yaml").read_text() + "checkpoint: {mirror: 'gs://bucket/run'}\n"
    (tmp_path / "run.yaml").write_text(text)
    assert main(["doctor", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]) == 1
    assert "pip install 'fastvideo-distillation[gcs]'" in capsys.readouterr().out
    assert [finding.level for finding in storage(Wishes(Path(), urls=("s3://bucket/a", "s3://bucket/b")))] == ["ok"]


def test_a_folder_that_cannot_be_written_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--out", "/proc/run"]) == 1
    assert "/proc/run cannot be written" in capsys.readouterr().out
