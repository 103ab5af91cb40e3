"""Training steps of a recipe on ``device="cuda"`` without a GPU: fake tensors over a guard that stands for the device.

The networks keep their widths and tokens and lose most of their blocks. Everything else is a run's own: roles,
sharding, recomputation, autocast, losses, clipping, fused optimizers, averages. So a mistake of device or
dtype fails here, and what is alive at the same time can be held against ``fastvideo plan``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = HERE / "guard.cpp"


class NoGuard(Exception):
    """The guard cannot be built here, and why."""


@cache
def build_guard() -> Path:
    """Compile the guard, once for an installed torch (it is linked to that folder's libraries) and for its source.

    Raises:
        NoGuard: without a C++ compiler, or if torch has CUDA already.
    """
    import torch

    if torch.version.cuda is not None:
        raise NoGuard(f"torch {torch.__version__} has a CUDA of its own")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        raise NoGuard("no C++ compiler (set CXX, or install g++)")
    built = guard_file(torch.__version__, Path(torch.__file__).resolve().parent)
    if not built.is_file():
        _compile(compiler, built, Path(torch.__file__).resolve().parent)
    return built


def guard_file(version: str, torch_folder: Path) -> Path:
    """Name the guard of a torch: its own for each folder, as a guard of another loads no library once that is gone."""
    key = hashlib.sha256(f"{version} {torch_folder} {SOURCE.read_text()}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"fastvideo-fake-cuda-{os.getuid()}" / f"{key}.so"


def _compile(compiler: str, built: Path, torch_folder: Path) -> None:
    built.parent.mkdir(parents=True, exist_ok=True)
    partial = built.with_suffix(f".{os.getpid()}")
    libraries = torch_folder / "lib"
    command = [compiler, "-shared", "-fPIC", "-O0", "-std=c++20", f"-I{torch_folder / 'include'}", f"-L{libraries}"]
    command += [str(SOURCE), "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}", "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoGuard(f"{compiler} does not compile against torch: {done.stderr.strip().splitlines()[:3]}")
    partial.replace(built)


def take_steps(recipe: str, *flags: str, world: int = 1, blocks: int = 2, steps: int = 2) -> Mapping[str, Any]:
    """Take the first steps of a recipe, one process of ``world``, on fake CUDA tensors.

    Args:
        flags: overrides of the recipe.
        blocks: repeated blocks to keep of each network.
        steps: the first trains every role, later ones those that are due.

    Returns:
        ``live``: bytes of roles, optimizers, averages and step at once, at their most; ``plan``: the same, predicted;
        ``attention``: calls of each dtype; ``dtypes`` of a block's parts.

    Raises:
        NoGuard: as :func:`build_guard`.
        RuntimeError: with the traceback of a step that failed.
    """
    return _asked("steps", recipe=recipe, flags=flags, world=world, blocks=blocks, steps=steps)


def validate(recipe: str, prompts: int, frames: int) -> Mapping[str, Any]:
    """Sample and decode prompts as a recipe's validation does, on fake CUDA tensors, with networks of two blocks.

    Args:
        frames: of the videos; what decoding holds hardly depends on it.

    Returns:
        ``peak``: bytes on the device at once, beside what stays; ``decode``: those of decoding one video alone.

    Raises:
        NoGuard, RuntimeError: as :func:`take_steps`.
    """
    return _asked("validation", recipe=recipe, prompts=prompts, frames=frames)


def _asked(what: str, **asked: Any) -> Mapping[str, Any]:
    environment = {**os.environ, "FAKE_CUDA_GUARD": str(build_guard()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastvideo.tests.fake_cuda", what, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{what} of {asked} on fake CUDA:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
