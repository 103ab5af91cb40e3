"""Runs that train on nothing, on a part, or at rate 0: said before the first step."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fastvideo.data.order import Bucket, MemorySource, SampleStream, Shard
from fastvideo.data.schema import METADATA_KEY
from fastvideo.distillation.types import RawBatch
from fastvideo.tests.training.conftest import analytic_values
from fastvideo.tests.training.test_run import config_of, result
from fastvideo.training.notes import left_out
from fastvideo.training.run import run
from fastvideo.wording import see

__all__ = ["analytic_values"]


class Sizes(MemorySource):
    """Captions in buckets of these sizes."""

    def __init__(self, *sizes: int) -> None:
        super().__init__([str(i) for i in range(sum(sizes))])
        object.__setattr__(self, "sizes", sizes)

    @property
    def buckets(self) -> Sequence[Bucket]:
        starts = torch.arange(sum(self.sizes)).split(list(self.sizes))
        return [Bucket(f"16x3x{4 + i}x6", rows) for i, rows in enumerate(starts)]


@pytest.mark.parametrize(
    ("sizes", "shard", "notes"),
    [
        (
            (6, 1),
            Shard(2),
            [
                "1 of 7 videos is in no batch and never trained on: 1 of 16x3x5x6; a step takes 2 of one size (2 on "
                "each of 1 process). --data.batch-size 1 takes all; `fastvideo buckets show` counts them"
            ],
        ),
        (
            (9, 3, 2),
            Shard(2, 1, 4),
            [
                "5 of 14 videos are in no batch and never trained on: 3 of 16x3x5x6, 2 of 16x3x6x6; a step takes 8 of "
                "one size (2 on each of 4 processes). Fewer processes take more; `fastvideo buckets show` counts them"
            ],
        ),
        ((7, 3), Shard(2), []),
    ],
)
def test_videos_in_no_batch_are_counted(sizes: tuple[int, ...], shard: Shard, notes: list[str]) -> None:
    """The seventh of seven is not named: an incomplete last step leaves out another one each epoch."""
    stream = SampleStream(Sizes(*sizes), 0, shard)
    assert list(left_out(stream)) == [note + see("videos-are-in-no-batch") for note in notes]
    batch: RawBatch = next(stream)
    assert len(batch.captions) == shard.batch_size


@pytest.fixture
def scheduled(analytic_values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run of SFT, whose rate may decay, on 16 samples of zeros."""
    rows = 16
    zeros = np.zeros(16, "<f4").tobytes()
    columns = {"id": ["a"] * rows, "caption": ["0.0"] * rows, "vae_latent_bytes": [zeros] * rows}
    columns |= {"vae_latent_shape": [[1, 1, 4, 4]] * rows, "vae_latent_dtype": ["float32"] * rows}
    made = {METADATA_KEY: json.dumps({"latents": "normalised"})}
    pq.write_table(pa.table(columns).replace_schema_metadata(made), tmp_path / "zeros.parquet")
    return analytic_values | {
        "distill_method": "sft",
        "roles": {"student": {"trainable": True, "path": "consistency"}},
        "data": {"path": str(tmp_path / "zeros.parquet"), "batch_size": 4},
        "checkpoint": {"every": 4},
        "ema": {"enabled": False},
    }


def with_options(values: dict[str, Any], steps: int, **method: int) -> dict[str, Any]:
    return values | {"method": {"learning_rate": 0.01, **method}, "trainer": {"max_steps": steps, "log_every": 1}}


def rates(values: dict[str, Any]) -> dict[int, float]:
    lines = (Path(values["output"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["step"]: line["student/learning_rate"] for line in map(json.loads, lines)}


def test_a_decay_that_ends_before_the_run_is_named_and_extended(scheduled: dict, capsys: Any) -> None:
    """Steps 1 to 4 decay to zero, 5 to 8 change no weight, and 9 to 12 go on where a decay of 12 has them."""
    run(config_of(with_options(scheduled, 4, decay_steps=4)))
    assert "learning rate" not in capsys.readouterr().err
    weights = result(scheduled)
    run(config_of(with_options(scheduled, 8, decay_steps=4)), resume=True)
    assert "rate of student is 0 from step 5 on, its decay of 4 updates is over" in (said := capsys.readouterr().err)
    assert "--method.decay-steps 8 ends it" in said
    assert all(torch.equal(weights[name], tensor) for name, tensor in result(scheduled).items())
    run(config_of(with_options(scheduled, 12, decay_steps=12)), resume=True)
    said = capsys.readouterr().err
    assert "method.decay_steps: 4 -> 12" in said
    assert "learning rate" not in said
    fall = [0.5 * (1 + math.cos(math.pi * step / 12)) * 0.01 for step in range(8, 12)]
    found = rates(scheduled)
    assert [found[step] for step in range(5, 9)] == [0.0] * 4
    assert [found[step] for step in range(9, 13)] == pytest.approx(fall, rel=1e-5)


def test_an_unchanged_schedule_resumes_to_the_bit(scheduled: dict, tmp_path: Path) -> None:
    whole, parts = (scheduled | {"output": str(tmp_path / name)} for name in ("whole", "parts"))
    run(config_of(with_options(whole, 9, decay_steps=9, warmup_steps=2)))
    run(config_of(with_options(parts, 5, decay_steps=9, warmup_steps=2)))
    run(config_of(with_options(parts, 9, decay_steps=9, warmup_steps=2)), resume=True)
    first, second = result(whole), result(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rates(whole) == rates(parts)


def test_a_role_that_no_step_trains_is_named(analytic_values: dict, capsys: Any) -> None:
    """The student has step 1, and the next one of its steps is the fifty-first."""
    values = analytic_values | {"checkpoint": {"every": 6}}
    values["method"] = {**values["method"], "generator_update_interval": 50, "warmup_steps": 24}
    run(config_of(values | {"trainer": {"max_steps": 6}}))
    assert "student is not trained" not in capsys.readouterr().err
    run(config_of(values), resume=True)
    said = capsys.readouterr().err
    assert "student is not trained by any of the steps 7 to 12: raise --trainer.max-steps, or lower method.gen" in said
    assert "rate of critic reaches 50% of its value: its warm-up of 24 updates is not over after the last of 12" in said


def test_a_finished_run_says_that_nothing_is_left(analytic_values: dict, capsys: Any) -> None:
    values = analytic_values | {"checkpoint": {"every": 6}}
    run(config_of(values))
    run(config_of(values), resume=True)
    assert "all 12 steps are done: nothing is trained; --trainer.max-steps extends the run" in capsys.readouterr().err
