"""How much of a training step is spent waiting for the reader, with the tiny recipes on a preprocessed dataset.

fastvideo preprocess VIDEOS --model tiny --out DATA
python benchmarks/reader.py DATA --steps 20
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fastvideo.data.order import SampleStream, Shard
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.engine.distributed import Processes
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.training.data import build_data, open_source
from fastvideo.training.distillation import parse
from fastvideo.training.run import build_trainer

RECIPES = ("examples/distillation/tiny_wan_dmd2.yaml", "examples/distillation/tiny_wan_sft.yaml")


@dataclass(frozen=True)
class Arguments:
    """Measure on this dataset."""

    data: Annotated[str, tyro.conf.Positional]
    """What `fastvideo preprocess --model tiny` made."""
    steps: int = 20
    """Steps of each recipe."""


class Clock(Iterator[Any]):
    """A stream that measures how long it is waited for."""

    def __init__(self, stream: Iterator[Any]) -> None:
        self.stream, self.seconds = stream, 0.0

    def __next__(self) -> Any:
        begin = time.perf_counter()
        batch = next(self.stream)
        self.seconds += time.perf_counter() - begin
        return batch


def measure(recipe: str, data: str, steps: int) -> None:
    """Print the share of the reader in a step, and what reading costs where nothing is read ahead."""
    flags = ["--data.path", data, "--validation.every", "0", "--trainer.max-steps", str(steps)]
    _, config = parse(["--config", recipe, *flags])
    adapter = build_adapter(config)
    method = build_method(config, adapter)
    stream, description = build_data(config, adapter, Processes())
    trainer = build_trainer(config, adapter, method, Tracker(Path(config.output), enabled=False), Processes())
    clock = Clock(stream)
    trainer.train_step(clock)
    clock.seconds, begin = 0.0, time.perf_counter()
    for _ in range(steps):
        trainer.train_step(clock)
    total = time.perf_counter() - begin
    print(f"{config.distill_method}: {description}")
    print(f"  step {1000 * total / steps:.0f} ms, waiting for the reader {100 * clock.seconds / total:.2f} %")
    alone = SampleStream(open_source(config, adapter)[0], 0, Shard(config.data.batch_size))
    begin = time.process_time()
    for _ in range(alone.rounds):
        next(alone)
    print(f"  reading without a thread: {1000 * (time.process_time() - begin) / alone.rounds:.2f} ms a batch")


def main() -> None:
    """All recipes."""
    arguments = tyro.cli(Arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for recipe in RECIPES:
        measure(recipe, arguments.data, arguments.steps)


if __name__ == "__main__":
    main()
