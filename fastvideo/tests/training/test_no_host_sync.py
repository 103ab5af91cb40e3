"""A step leaves the device alone: what reads a value back to the host waits for every kernel before it.

On a CPU nothing waits, but the same calls are made: ``.item()``, ``float(tensor)``, ``bool(tensor)`` and ``if tensor``
all end in one operator, which a dispatch mode sees; ``.tolist()`` and ``.cpu()`` are seen by a function mode.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastvideo
from fastvideo.data.order import MemorySource, SampleStream, Shard
from fastvideo.distillation.builder import build_method
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.config.sections import TrainerConfig
from fastvideo.distillation.engine.runtime import Runtime
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.registry import run_schema
from fastvideo.distillation.trainer import DistillTrainer
from fastvideo.distillation.types import Batch, RawBatch
from fastvideo.tests.distillation.tiny import FAMILIES, wan_config, wan_family, wan_folder
from fastvideo.tests.preparing import preparer

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default)
"""Operators whose result the host needs before it can go on."""
PACKAGE = Path(fastvideo.__file__).parent
ON_THE_HOST = {"shared_index", "_read", "_single_tensor_adam"}
"""Functions that read what is on the CPU on every device: shared decisions, rows of a batch, step counters."""


def place() -> str | None:
    """The line of this package that reads; ``None`` where what is read is on the CPU on every device."""
    frames = [
        f for f in traceback.extract_stack() if f.name not in ("place", "__torch_dispatch__", "__torch_function__")
    ]
    if ON_THE_HOST & {frame.name for frame in frames}:
        return None
    own = next(f for f in reversed(frames) if PACKAGE in Path(f.filename).parents)
    return f"{Path(own.filename).name}:{own.lineno} {own.line}"


class Operators(TorchDispatchMode):
    """Collects where an operator reads a value back."""

    def __init__(self, found: list[str | None]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.found.append(place())
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Collects where a tensor is copied to the host as a whole."""

    def __init__(self, found: list[str | None]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.cpu):
            self.found.append(place())
        return func(*args, **(kwargs or {}))


@contextmanager
def reads() -> Iterator[list[str]]:
    """The places that read a value back inside the block, once it is left."""
    found: list[str | None] = []
    places: list[str] = []
    with Functions(found), Operators(found):
        yield places
    places += [entry for entry in found if entry is not None]


def trainer_of(folder: Path, **method: Any) -> tuple[DistillTrainer, SampleStream]:
    """The real trainer over DMD2 on the tiny Wan, logging every eighth step."""
    values = {
        "distill_model": "wan", "distill_method": "dmd2", "output": "unused",
        "method": {"generator_update_interval": 2, **method},
        "model": wan_config(wan_folder(folder)).model_dump(),
        "roles": {"student": {"trainable": True}, "teacher": {"trainable": False}, "critic": {"trainable": True}},
    }  # fmt: skip
    config = validate(run_schema("wan", "dmd2"), values, "the test")
    adapter = wan_family(folder)
    built = build_method(config, adapter)
    latents = torch.randn(4, *adapter.codec.latent_shape)
    data = SampleStream(MemorySource(FAMILIES["wan"].prompts * 2, latents), 0, Shard(2))
    silent = Tracker(folder, enabled=False)
    options = TrainerConfig(max_steps=100, log_every=8)
    return DistillTrainer(built, preparer(adapter), options, Runtime(built, options, silent)), data


@pytest.mark.parametrize("options", [{}, {"rollout": "data"}], ids=["simulate", "data"])
def test_no_step_reads_a_value_back(options: dict[str, Any], tmp_path: Path) -> None:
    trainer, data = trainer_of(tmp_path, **options)
    trainer.train_step(data)  # prompts are encoded when they are first met
    trainer.step = 1
    trainer.train_step(data)
    with reads() as found:
        for trainer.step in (2, 3, 4, 5):
            trainer.train_step(data)
    assert not found


def test_of_prompts_that_are_not_kept_the_encoder_alone_reads(tmp_path: Path) -> None:
    """transformers asks if a mask has padding; the copies to the host and back do not wait."""
    trainer, data = trainer_of(tmp_path)
    trainer.train_step(data)
    (conditioner,) = trainer.prepare.conditioners
    conditioner._prompts.limit = 0
    for trainer.step in (1, 2):
        trainer.train_step(data)
    assert not len(conditioner._prompts)
    with reads() as found:
        for trainer.step in (3, 4):
            trainer.train_step(data)
    assert {line.split(" ", 1)[1].split("(")[0] for line in found} == {"hidden = self.text_encoder"}


def test_a_read_is_found(tmp_path: Path) -> None:
    """The mode sees every way to read a value, through a method that does it."""
    trainer, data = trainer_of(tmp_path)
    trainer.train_step(data)
    plain = trainer.prepare

    def nosy(raw: RawBatch) -> Batch:
        batch = plain(raw)
        value = next(iter(batch.condition.tensors.values()))["prompt_embeds"].sum()
        assert value.item() == float(value)
        assert value.cpu().tolist() != 0
        assert len(value.new_ones(2).nonzero()) == 2
        if value:
            return batch
        raise AssertionError("the tiny text encoder answers zero")

    trainer.prepare = nosy
    with reads() as found:
        trainer.train_step(data)
    lines = [line.split(" ", 1)[1] for line in found]
    item, host, count = "assert value.item() == float(value)", "assert value.cpu().tolist() != 0", "nonzero"
    assert lines[:4] == [item, item, host, host]
    assert count in lines[4]
    assert lines[5:] == ["if value:"]
