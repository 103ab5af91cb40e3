"""Declared ranges, the constraints that are installed, and the image agree."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ENDS = ("lowest", "newest", "cpu", "gpu")
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


@cache
def declared(*extras: str) -> dict[str, Requirement]:
    """Ranges of the dependencies and of some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return {canonicalize_name(one.name): one for one in map(Requirement, lines)}


@cache
def pinned(name: str) -> dict[str, str]:
    text = (ROOT / "constraints" / f"{name}.txt").read_text()
    pins = re.findall(r"^([\w.-]+)==(\S+)$", text, re.M)
    assert len(pins) == sum(bool(line) and line[0] != "#" for line in text.splitlines())
    return {canonicalize_name(package): version for package, version in pins}


@pytest.mark.parametrize("name", ENDS)
def test_every_set_keeps_to_the_declared_ranges(name: str) -> None:
    ranges = declared() if name == "gpu" else declared("live")  # the image has no extras
    wrong = [str(one) for key, one in ranges.items() if not one.specifier.contains(pinned(name)[key])]
    assert not wrong


def test_the_lowest_set_is_the_lower_bound_of_every_range() -> None:
    """Otherwise the lower bound is one that nothing has been tested with."""
    ranges = declared("live")
    bounds = {key: next(s.version for s in one.specifier if s.operator == ">=") for key, one in ranges.items()}
    lower = {key: Requirement(f"{key}=={bound}").specifier for key, bound in bounds.items()}
    assert not {key: pinned("lowest")[key] for key, exact in lower.items() if not exact.contains(pinned("lowest")[key])}


def test_versions_that_are_known_to_be_wrong_are_outside() -> None:
    """An untied text encoder (transformers 5.0 to 5.2), and BT.709 read as BT.601 (av before 17)."""
    wrong = {"transformers": ("4.57.6", "5.0.0", "5.1.0", "5.2.0"), "av": ("15.1.0", "16.1.0")}
    for package, versions in wrong.items():
        assert not [version for version in versions if declared()[package].specifier.contains(version)]


def test_the_set_for_gpus_is_that_for_cpus_with_cuda() -> None:
    gpu, cpu = pinned("gpu"), pinned("cpu")
    assert {name: version for name, version in gpu.items() if cpu.get(name, version) != version} == {}
    cuda = re.compile(r"nvidia-|cuda-|triton|setuptools")
    assert all(cuda.match(name) for name in gpu.keys() - cpu.keys())
    assert {"nvidia-nccl-cu13", "nvidia-cudnn-cu13", "triton"} <= gpu.keys()


def test_the_image_copies_what_is_there_and_let_in() -> None:
    """No Docker runs in the tests: what a build would miss first is a file."""
    sources = [word for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M) for word in line.split()[:-1]]
    let_in = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.M)
    for source in sources:
        assert (ROOT / source).exists()
        assert any(source == one or source.startswith(f"{one}/") for one in let_in), source
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for name in wheel["force-include"]:
        assert any(name == one or name.startswith(f"{one}/") for one in sources), name


def test_the_image_installs_what_is_declared_by_constraints_that_it_has() -> None:
    """Every install names a constraints file that was copied before, and extras that there are."""
    copied, optional = list[str](), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs = 0
    for line in DOCKERFILE.splitlines():
        if line.startswith("COPY"):
            copied += line.split()[1:-1]
        if line.startswith("RUN pip install"):
            installs += 1
            (constraints,) = re.findall(r"-c (\S+)", line)
            assert constraints in copied
            for extra in re.findall(r"\[([\w,]+)\]", line):
                assert set(extra.split(",")) <= optional["optional-dependencies"].keys()
    assert installs == 2


def test_the_image_runs_without_rights_and_with_an_allowed_python() -> None:
    *stages, last = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    assert re.search(r"^USER (?!root)", last, re.M)
    assert len(stages) == 1
    python = {re.match(r"python:(3\.\d+)", stage)[1] for stage in (*stages, last)}  # type: ignore[index]
    assert len(python) == 1
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"Programming Language :: Python :: {python.pop()}" in wanted["classifiers"]
