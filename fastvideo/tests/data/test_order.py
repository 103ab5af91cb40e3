"""The order of samples: pure, disjoint, complete, resumable; one bucket per step on all processes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvideo.data.order import Bucket, MemorySource, SampleStream, Shard
from fastvideo.distillation.types import RawBatch, UserError

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@dataclass
class Numbers:
    """A source whose captions are its row numbers."""

    buckets: tuple[Bucket, ...]

    def read(self, rows: list[int]) -> RawBatch:
        return RawBatch(tuple(map(str, rows)))


@st.composite
def sources(draw: st.DrawFn) -> Numbers:
    """One to three buckets whose rows are dealt at random, in blocks of random sizes."""
    count = draw(st.integers(1, 60))
    owner = torch.tensor(draw(st.lists(st.integers(0, draw(st.integers(0, 2))), min_size=count, max_size=count)))
    blocks = torch.arange(count) // draw(st.integers(1, 12))
    window = draw(st.integers(1, 4))
    members = [(owner == i).nonzero().flatten() for i in owner.unique()]
    return Numbers(tuple(Bucket(str(i), rows, blocks[rows], window) for i, rows in enumerate(members)))


def rows_of(batch: RawBatch) -> list[int]:
    return [int(caption) for caption in batch.captions]


def epoch_of(stream: SampleStream) -> list[list[int]]:
    return [rows_of(next(stream)) for _ in range(stream.rounds)]


@given(sources(), st.integers(1, 5), st.integers(1, 3), st.integers(0, 5))
def test_an_epoch_has_each_sample_once_and_each_step_one_bucket(
    source: Numbers, batch: int, ranks: int, seed: int
) -> None:
    expected = sum(len(bucket.rows) // (batch * ranks) * batch * ranks for bucket in source.buckets)
    if not expected:
        with pytest.raises(UserError, match="fewer than one batch"):
            SampleStream(source, seed, Shard(batch, 0, ranks))
        return
    streams = [SampleStream(source, seed, Shard(batch, rank, ranks)) for rank in range(ranks)]
    epochs = [epoch_of(stream) for stream in streams]
    seen = [row for epoch in epochs for step in epoch for row in step]
    assert len(seen) == len(set(seen)) == expected
    bucket_of = {row: bucket.name for bucket in source.buckets for row in bucket.rows.tolist()}
    for step in zip(*epochs, strict=True):
        assert len({bucket_of[row] for rows in step for row in rows}) == 1
        assert {len(rows) for rows in step} == {batch}


@given(sources(), st.integers(0, 40), st.integers(0, 3), st.integers(0, 3))
def test_a_resumed_stream_goes_on_with_the_next_batch(source: Numbers, taken: int, ahead: int, again: int) -> None:
    stream = SampleStream(source, 1, Shard(1), ahead)
    for _ in range(taken):
        next(stream)
    resumed = SampleStream(source, 1, Shard(1), again)
    resumed.load_state_dict(stream.state_dict())
    for _ in range(5):
        assert rows_of(next(resumed)) == rows_of(next(stream))
    assert resumed.state_dict() == stream.state_dict()


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    source = MemorySource([str(i) for i in range(40)])
    first, same, other = (SampleStream(source, seed, Shard(4)) for seed in (1, 1, 2))
    epochs = [epoch_of(first) for _ in range(3)]
    assert epochs == [epoch_of(same) for _ in range(3)]
    assert all(a != b for a, b in itertools.pairwise(epochs))
    assert epoch_of(other) != epochs[0]


def test_a_window_of_blocks_is_read_before_the_next() -> None:
    """Blocks of 10 rows, shuffled two by two: the first 20 rows come from two blocks, and not in their order."""
    rows = torch.arange(100)
    bucket = Bucket("all", rows, rows // 10, window=2)
    epoch = list(itertools.chain(*epoch_of(SampleStream(Numbers((bucket,)), 0, Shard(5)))))
    for start in range(0, 100, 20):
        part = epoch[start : start + 20]
        assert len({row // 10 for row in part}) == 2
        assert part != sorted(part)


def test_each_process_reads_blocks_of_its_own() -> None:
    rows = torch.arange(120)
    source = Numbers((Bucket("all", rows, rows // 10, window=1),))
    streams = [SampleStream(source, 0, Shard(5, rank, 4)) for rank in range(4)]
    blocks = [{row // 10 for rows in epoch_of(stream) for row in rows} for stream in streams]
    assert [len(found) for found in blocks] == [3, 3, 3, 3]
    assert len(set.union(*blocks)) == 12


def test_reading_ahead_reports_an_error_where_it_belongs() -> None:
    class Failing(Numbers):
        def read(self, rows: list[int]) -> RawBatch:
            raise UserError("row is damaged")

    stream = SampleStream(Failing((Bucket("all", torch.arange(4)),)), 0, Shard(1), ahead=2)
    with pytest.raises(UserError, match="row is damaged"):
        next(stream)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory is CUDA's")
def test_batches_for_cuda_are_in_page_locked_memory() -> None:
    source = MemorySource(["a", "b"], torch.randn(2, 1, 1, 2, 2), {"text_embedding": torch.randn(2, 3, 4)})
    batch = next(SampleStream(source, 0, Shard(2), ahead=2, pin=True))
    assert batch.latents is not None
    assert batch.latents.is_pinned()
    assert batch.extras["text_embedding"].is_pinned()
