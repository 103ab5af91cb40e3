"""How much of a training step is spent waiting for the reader, with the tiny recipes on a preprocessed dataset.

    python benchmarks/reader.py                        # on 256 videos of the tiny world, preprocessed first
    fastvideo preprocess VIDEOS --model tiny --out DATA
    python benchmarks/reader.py DATA --steps 20        # on any that were

The last line is one JSON object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fastvideo.data.order import SampleStream, Shard
from fastvideo.demo import preprocess_world
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.training.data import build_data, open_source
from fastvideo.training.distillation import parse
from fastvideo.training.run import build_trainer

DATA, VIDEOS = Path("outputs/reader_data"), 256
RECIPES = ("examples/distillation/tiny_wan_dmd2.yaml", "examples/distillation/tiny_wan_sft.yaml")


@dataclass(frozen=True)
class Arguments:
    """Measure on this dataset."""

    data: Annotated[str, tyro.conf.Positional] = ""
    """What `fastvideo preprocess --model tiny` made; without it a dataset is made."""
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


def measure(recipe: str, data: str, steps: int) -> dict[str, float]:
    """The share of the reader in a step, and what reading costs where nothing is read ahead."""
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
    alone = SampleStream(open_source(config, adapter)[0], 0, Shard(config.data.batch_size))
    begin = time.process_time()
    for _ in range(alone.rounds):
        next(alone)
    batch = (time.process_time() - begin) / alone.rounds
    print(f"{config.distill_method}: {description}")
    print(f"  step {1000 * total / steps:.0f} ms, waiting for the reader {100 * clock.seconds / total:.2f} %")
    print(f"  reading without a thread: {1000 * batch:.2f} ms a batch")
    return {"waiting": round(clock.seconds / total, 5), "milliseconds_per_batch": round(1000 * batch, 2)}


def main() -> None:
    """All recipes."""
    arguments = tyro.cli(Arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    _, config = parse(["--config", RECIPES[0]])
    data = arguments.data or str(preprocess_world(config, DATA, VIDEOS))
    found = {Path(recipe).stem: measure(recipe, data, arguments.steps) for recipe in RECIPES}
    print(json.dumps({"benchmark": "reader", "recipes": found}))


if __name__ == "__main__":
    main()
