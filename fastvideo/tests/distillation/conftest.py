"""One thread, no denormals, no leaking randomness, and the toy fixtures that several files share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.nn import functional as F

from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.rng import RandomStreams
from fastvideo.tests.distillation.tiny import wan_folder
from fastvideo.tests.distillation.toys import SpyAdapter, gaussian, spy

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
torch.set_num_threads(1)
torch.set_flush_denormal(True)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Networks that a test initialises are the same in every order of tests, and nothing leaks out of it."""
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    with torch.random.fork_rng(devices=[]):
        seed(0)  # torch.manual_seed keeps the stack of each call for a CUDA that might start: milliseconds
        yield


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator of the test's own."""
    return torch.Generator().manual_seed(11)


@pytest.fixture
def streams() -> RandomStreams:
    """Seeded streams of a run."""
    return RandomStreams(3)


@pytest.fixture
def adapter() -> SpyAdapter:
    """The recording analytic family."""
    return spy()


@pytest.fixture
def bundle(adapter: SpyAdapter) -> ModelBundle:
    """Student (a consistency function), frozen teacher and critic (denoisers), all at the truth."""
    kinds = {"student": "consistency", "teacher": "denoiser", "critic": "denoiser"}
    return ModelBundle(
        [RoleHandle(n, adapter, gaussian(adapter, kind), trainable=n != "teacher") for n, kind in kinds.items()]
    )


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete Wan pipeline folder with random weights."""
    return wan_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def cuda_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let autocast compute norms in float32 and leave their output so, as on CUDA since torch 2.12.

    Source: ``AT_FORALL_FP32`` in torch's ``ATen/autocast_mode.h``; the CPU has neither operation on its list.
    """
    for name in ("rms_norm", "layer_norm"):
        monkeypatch.setattr(F, name, partial(_in_float32, getattr(F, name)))


def _in_float32(norm: Any, *args: Any, **kwargs: Any) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
        kwargs = {name: a.float() if isinstance(a, Tensor) else a for name, a in kwargs.items()}
    found: Tensor = norm(*args, **kwargs)
    return found
