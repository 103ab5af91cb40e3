"""Facts of this machine: what its programs and libraries answer, unjudged."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import runpy
import shutil
import socket
import subprocess
import sysconfig
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "fastvideo-distillation"
SMI = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader,nounits")
"""Asks for every GPU's name, driver, memory in MiB and compute capability."""
SMI_SECONDS = 20.0
LOOPBACK = "lo"


@dataclass(frozen=True)
class Gpu:
    """One GPU as ``nvidia-smi`` lists it: memory in MiB, capability such as ``9.0``."""

    name: str
    driver: str
    memory: int
    capability: str


@dataclass(frozen=True)
class Torch:
    """Torch as it is built, and what it sees.

    Attributes:
        cuda: version of CUDA that it is built for; ``None`` for a CPU build.
        devices: CUDA devices that it can use; 0 if it was not asked, because it is a CPU build.
        architectures: that its kernels are compiled for, such as ``sm_90``.
        complaint: its warning about CUDA, if any.
    """

    version: str
    cuda: str | None
    devices: int = 0
    architectures: tuple[str, ...] = ()
    nccl: str | None = None
    complaint: str = ""


@dataclass(frozen=True)
class Facts:
    """Everything that the checks read.

    Attributes:
        gpus: listed by ``nvidia-smi``; ``smi_error`` says why there are none.
        requirements: of the package's metadata, such as ``torch>=2.9``; empty if it is not installed.
        installed: versions by package; a missing one is absent.
        memory: of the host, in bytes.
        shared_memory: size of ``/dev/shm`` in bytes.
    """

    python: str
    system: str
    torch: Torch | None
    gpus: tuple[Gpu, ...]
    smi_error: str
    requirements: tuple[str, ...]
    installed: Mapping[str, str]
    compiler: str | None
    python_headers: bool
    memory: int
    shared_memory: int
    interfaces: tuple[str, ...]
    environment: Mapping[str, str]


def gather() -> Facts:
    """Ask this machine."""
    gpus, smi_error = read_gpus(*run_smi())
    requirements = declared()
    names = {name_of(line) for line in requirements}
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        torch=ask_torch(),
        gpus=gpus,
        smi_error=smi_error,
        requirements=requirements,
        installed={name: version for name in names if (version := version_of(name))},
        compiler=next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None),
        python_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        shared_memory=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        interfaces=tuple(name for _, name in socket.if_nameindex() if name != LOOPBACK),
        environment=dict(os.environ),
    )


def run_smi() -> tuple[int, str]:
    """Exit code and output of :data:`SMI`; 127 where it is not installed."""
    try:
        done = subprocess.run(SMI, capture_output=True, text=True, check=False, timeout=SMI_SECONDS)
    except FileNotFoundError:
        return 127, "nvidia-smi is not installed"
    except subprocess.TimeoutExpired:
        return 1, f"nvidia-smi gave no answer in {SMI_SECONDS:g} s"
    return done.returncode, done.stdout + done.stderr


def read_gpus(code: int, output: str) -> tuple[tuple[Gpu, ...], str]:
    """GPUs from the output of :data:`SMI`, or the reason why there are none."""
    if code:
        return (), output.strip().splitlines()[0] if output.strip() else f"nvidia-smi ended with {code}"
    rows = [[field.strip() for field in line.split(",")] for line in output.splitlines() if line.count(",") == 3]
    found = tuple(Gpu(name, driver, int(float(memory)), cap) for name, driver, memory, cap in rows)
    return found, "" if found else output.strip() or "nvidia-smi lists none"


def ask_torch() -> Torch | None:
    """Torch's build from its version file; a CUDA build is imported and asked. ``None`` without torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    built = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    version, cuda = str(built["__version__"]), built["cuda"]
    return Torch(version, None) if cuda is None else _ask_cuda(version, cuda)


def _ask_cuda(version: str, cuda: str) -> Torch:
    import torch

    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    complaint = " ".join(str(complaints[0].message).split()) if complaints else ""
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if devices else None
    return Torch(version, cuda, devices, tuple(torch.cuda.get_arch_list()), nccl, complaint)


def declared() -> tuple[str, ...]:
    """Requirements of the installed package, without those of extras."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(line for line in lines if "extra ==" not in line)


def name_of(requirement: str) -> str:
    """Name of the package in a requirement."""
    from packaging.requirements import Requirement

    return Requirement(requirement).name


def version_of(package: str) -> str | None:
    """Installed version; ``None`` if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
