"""Checks: from the facts of a machine to findings, each with what follows from it and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from fastvideo.doctor.facts import Facts, Gpu, Torch
from fastvideo.errors import UserError
from fastvideo.files import gib
from fastvideo.mount import MEND, TRIALS, try_folder
from fastvideo.stopping import GRACE_SINCE, GRACE_VARIABLE
from fastvideo.storage import place

Level = Literal["ok", "warning", "error"]
DRIVERS = {11: 450, 12: 525, 13: 580}
"""Oldest driver on Linux for each major version of CUDA (NVIDIA's table of minor version compatibility)."""
ROOMY = 20 * 2**30
"""Free bytes below which a disk is called nearly full."""
ENOUGH_SHARED = 2**30
"""Bytes of ``/dev/shm`` that NCCL and readers of data need; a container has 64 MiB unless told otherwise."""
TORCH = "torch"


@dataclass(frozen=True)
class Wishes:
    """Demands of a run on the machine.

    Attributes:
        cuda: a config asks for it.
        compiled: a config compiles blocks.
        models: hub ids, folders and files of a config's models, by the key that names them.
        out: folder to write to.
        urls: at which a config reads or writes, such as ``s3://bucket/run``.
    """

    out: Path
    cuda: bool = False
    compiled: bool = False
    models: Mapping[str, str] = field(default_factory=dict)
    urls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One line: subject, level, what is so, and what to do (empty if nothing)."""

    subject: str
    level: Level
    text: str
    mend: str = ""


def examine(facts: Facts, wishes: Wishes) -> list[Finding]:
    """All findings, in the order in which one would mend them."""
    checks = (packages(facts), cuda(facts, wishes), several(facts), compiler(facts, wishes))
    places = (memory(facts), disk(wishes.out), storage(wishes), hub(facts, wishes))
    return [finding for check in (*checks, *places) for finding in check]


def packages(facts: Facts) -> Iterator[Finding]:
    """Versions against the declared ranges."""
    yield Finding("python", "ok", f"{facts.python} on {facts.system}")
    if not facts.requirements:
        text = "this package is not installed, so its ranges of versions are unknown"
        yield Finding("packages", "warning", text, "pip install -e . -c constraints/gpu.txt")
        return
    wrong = dict(_out_of_range(facts))
    for name, text in wrong.items():
        yield Finding(name, "error", text, f"pip install '{name}{_range_of(facts, name)}'")
    if not wrong:
        shown = ", ".join(f"{n} {facts.installed[n]}" for n in ("torch", "diffusers", "transformers", "peft"))
        yield Finding("packages", "ok", f"all {len(facts.requirements)} in their ranges: {shown}")


def _out_of_range(facts: Facts) -> Iterator[tuple[str, str]]:
    for line in facts.requirements:
        wanted = Requirement(line)
        version = facts.installed.get(wanted.name)
        if version is None:
            yield wanted.name, f"not installed; {wanted.specifier} is needed"
        elif not wanted.specifier.contains(version, prereleases=True):
            yield wanted.name, f"{version} is outside {wanted.specifier}, in which this version was tested"


def _range_of(facts: Facts, name: str) -> str:
    return next(str(found.specifier) for found in map(Requirement, facts.requirements) if found.name == name)


def cuda(facts: Facts, wishes: Wishes) -> Iterator[Finding]:
    """Driver, torch's build and the devices that it sees."""
    if facts.torch is None:
        return
    if not facts.gpus:
        text = f"no GPU: {facts.smi_error}; runs are on the CPU"
        mend = "take a machine with an NVIDIA GPU, or --device cpu" if wishes.cuda else ""
        yield Finding("GPU", "error" if wishes.cuda else "ok", text, mend)
        return
    kinds = {gpu.name: [g for g in facts.gpus if g.name == gpu.name] for gpu in facts.gpus}
    shown = ", ".join(f"{len(of)} x {name} ({of[0].memory / 1024:.1f} GiB)" for name, of in kinds.items())
    yield Finding("GPU", "ok", f"{shown}, driver {facts.gpus[0].driver}")
    yield _torch_sees(facts.torch, facts)


def _torch_sees(torch: Torch, facts: Facts) -> Finding:
    if torch.cuda is None:
        text = f"torch {torch.version} is built for the CPU: it does not see the GPUs"
        return Finding(TORCH, "error", text, "pip install --force-reinstall torch -c constraints/gpu.txt")
    needed, driver = DRIVERS.get(int(torch.cuda.split(".")[0])), facts.gpus[0].driver
    if needed and int(driver.split(".")[0]) < needed:
        text = (
            f"driver {driver} is too old for torch {torch.version}, which is built for CUDA {torch.cuda} and needs "
            f"driver {needed} or newer: torch sees no GPU"
        )
        older = "a torch for the driver's CUDA (https://pytorch.org/get-started/previous-versions)"
        return Finding(
            TORCH, "error", text, f"take a machine or image with driver {needed} or newer, or install {older}"
        )
    if torch.devices < len(facts.gpus):
        text = f"torch {torch.version} sees {torch.devices} of {len(facts.gpus)} GPUs. {torch.complaint}".strip()
        level: Level = "warning" if torch.devices else "error"
        return Finding(TORCH, level, text, "look at CUDA_VISIBLE_DEVICES, at nvidia-smi for errors, and at MIG")
    if unknown := [gpu.capability for gpu in facts.gpus if not _compiled_for(torch, gpu)]:
        text = f"torch {torch.version} has no kernels for compute capability {unknown[0]}"
        return Finding(TORCH, "error", text, "install a newer torch")
    return Finding(TORCH, "ok", f"{torch.version} for CUDA {torch.cuda} sees {torch.devices} GPUs, NCCL {torch.nccl}")


def _compiled_for(torch: Torch, gpu: Gpu) -> bool:
    """True if a kernel of the same major version, not newer, is in torch, or code that the driver compiles."""
    major, minor = map(int, gpu.capability.split("."))
    known = [name.rstrip("af").split("_") for name in torch.architectures]
    own = [int(number) for kind, number in known if kind == "sm" and int(number) // 10 == major]
    return any(number % 10 <= minor for number in own) or any(kind == "compute" for kind, _ in known)


def several(facts: Facts) -> Iterator[Finding]:
    """Several processes: shared memory, network interfaces, and the time that torchrun leaves after a signal."""
    if len(facts.gpus) > 1 and facts.shared_memory < ENOUGH_SHARED:
        text = f"/dev/shm has {gib(facts.shared_memory)}: NCCL fails between the GPUs of this machine"
        yield Finding("shared memory", "error", text, "docker run --shm-size 16g; Kubernetes: see examples/launch")
    named = facts.environment.get("GLOO_SOCKET_IFNAME")
    if named and named not in facts.interfaces:
        text = f"GLOO_SOCKET_IFNAME is {named}, and the interfaces are {', '.join(facts.interfaces) or 'none'}"
        yield Finding("network", "error", f"{text}: several nodes do not find each other", "set it to one of them")
    elif not named and len(facts.interfaces) > 1 and facts.gpus:
        text = f"several interfaces ({', '.join(facts.interfaces)}): gloo may take one that other nodes do not reach"
        yield Finding("network", "warning", text, "for several nodes: export GLOO_SOCKET_IFNAME=NAME, and NCCL's")
    if facts.torch and tuple(int(n) for n in facts.torch.version.split(".")[:2]) < GRACE_SINCE:
        since = ".".join(map(str, GRACE_SINCE))
        text = f"torchrun of torch {facts.torch.version} kills 30 s after SIGTERM: a longer step is lost"
        yield Finding("torchrun", "warning", text, f"torch {since} or newer reads {GRACE_VARIABLE}")


def compiler(facts: Facts, wishes: Wishes) -> Iterator[Finding]:
    """The C compiler that compiled blocks need."""
    if facts.compiler and facts.python_headers:
        yield Finding("compiler", "ok", facts.compiler)
        return
    lacking = "no C compiler" if not facts.compiler else "no Python.h"
    text = f"{lacking}: model.compile_blocks does not work"
    yield Finding("compiler", "error" if wishes.compiled else "warning", text, "apt-get install gcc python3-dev")


def memory(facts: Facts) -> Iterator[Finding]:
    """Memory of the host, in which models are loaded before they go to a GPU."""
    devices = sum(gpu.memory for gpu in facts.gpus) * 2**20
    if devices > facts.memory:
        text = f"{gib(facts.memory)} of memory beside {gib(devices)} on GPUs: loading a large model may not fit"
        yield Finding("memory", "warning", text, "load one model at a time, or take a machine with more")
    else:
        yield Finding("memory", "ok", gib(facts.memory))


def disk(out: Path) -> Iterator[Finding]:
    """Space and abilities of the disk below an output folder."""
    try:
        lacking = try_folder(out.absolute())
    except OSError as error:
        text = f"{out} cannot be written: {error.strerror}"
        yield Finding("output", "error", text, "give another folder: --out here, --output of a run")
        return
    yield _space("output", out)
    if not lacking:
        yield Finding("output", "ok", f"{out}: {', '.join(trial.name for trial in TRIALS)}")
    for trial in TRIALS:
        if trial.name in lacking:
            text = f"{out}: cannot {trial.name} ({lacking[trial.name]}), which a run needs for {trial.use}"
            yield Finding("output", "error", text, f"a folder on a disk; {MEND}")


def _space(subject: str, folder: Path) -> Finding:
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < ROOMY:
        text = f"{gib(free)} free on the disk of {folder}: a checkpoint or a model may not fit"
        return Finding(subject, "warning", text, "make room; `fastvideo plan` says what a run stores")
    return Finding(subject, "ok", f"{gib(free)} free on the disk of {folder}")


def storage(wishes: Wishes) -> Iterator[Finding]:
    """Packages for the URLs of a config; no bucket is asked."""
    for protocol, url in sorted({url.partition("://")[0]: url for url in wishes.urls}.items()):
        try:
            place(url)
        except UserError as error:
            yield Finding("storage", "error", str(error))
        else:
            yield Finding("storage", "ok", f"{protocol}:// has its package; a run asks the bucket when it starts")


def hub(facts: Facts, wishes: Wishes) -> Iterator[Finding]:
    """Hugging Face's cache, token, and the models of the config: in the cache, or in folders."""
    from huggingface_hub import constants, get_token

    yield _space("hub cache", Path(constants.HF_HUB_CACHE))
    for path, keys in _by_path(wishes.models).items():
        if Path(path).exists():
            yield Finding("model", "ok", f"{path} ({keys}) is on this machine")
        elif path.count("/") == 1 and not path.startswith((".", "/", "~")):
            yield _cached(path, keys)
        else:
            yield Finding("model", "error", f"{path} ({keys}) does not exist", "give a folder, a file or a hub id")
    token = "a token is set" if get_token() else "no token: models that ask for consent cannot be downloaded"
    yield Finding("hub", "ok", token)


def _by_path(models: Mapping[str, str]) -> dict[str, str]:
    """The keys of a config that name each path, for people."""
    return {path: ", ".join(key for key, own in models.items() if own == path) for path in models.values()}


def _cached(hub_id: str, keys: str) -> Finding:
    """A hub id in Hugging Face's cache, or not."""
    from huggingface_hub import constants, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(hub_id, "model_index.json"), str)
    offline = constants.HF_HUB_OFFLINE and not cached
    level: Level = "ok" if cached else "error" if offline else "warning"
    text = f"{hub_id} ({keys}) is {'in' if cached else 'not in'} the cache"
    text += ", and HF_HUB_OFFLINE is set" if offline else ""
    mend = f"hf download {hub_id}, on every node or into a folder that all see (HF_HOME)"
    return Finding("model", level, text, "" if cached else mend)
