"""Environment of a result: package versions, machine, code revision."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path

PACKAGES = ("diffusers", "transformers", "numpy", "safetensors", "pydantic")


def environment() -> dict[str, str]:
    """Versions and revision behind a run."""
    import torch

    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "revision": revision(),
        "torch": torch.__version__,  # with the build, such as +cu130
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


@cache
def revision() -> str:
    """Commit of this code, if it lies in a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return found or "not a git checkout"
