"""Two streams: tensors differ per rank, decisions agree on all ranks, and both continue bit for bit."""

from __future__ import annotations

from typing import get_args

import torch

from fastvideo.distillation.rng import Purpose, RandomStreams, seeded, stream_seed


def test_ranks_draw_different_tensors() -> None:
    draws = [RandomStreams(7, rank=rank).normal((64,)) for rank in range(4)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert not torch.isin(one, other).any()


def test_the_next_seed_is_not_the_next_rank() -> None:
    assert not torch.equal(RandomStreams(7, rank=1).normal((8,)), RandomStreams(8, rank=0).normal((8,)))


def test_local_and_shared_are_not_the_same_stream() -> None:
    for seed in range(20):
        streams = RandomStreams(seed)
        assert not torch.equal(streams.local.get_state(), streams.shared.get_state())


def test_ranks_agree_on_decisions_whatever_they_drew_locally() -> None:
    first, second = RandomStreams(7, rank=0), RandomStreams(7, rank=5)
    first.normal((3, 5)), first.uniform(2), first.index(9, 4)
    assert [first.shared_index(4) for _ in range(50)] == [second.shared_index(4) for _ in range(50)]


def test_decisions_cover_the_range_and_depend_on_the_seed() -> None:
    one, other = ([RandomStreams(seed).shared_index(10_000) for _ in range(1)] for seed in (1, 2))
    assert one != other
    streams = RandomStreams(0)
    assert {streams.shared_index(4) for _ in range(200)} == {0, 1, 2, 3}


def test_draws_have_their_documented_dtype_shape_and_range() -> None:
    streams = RandomStreams(1)
    uniform, index = streams.uniform(2000), streams.index(2000, 3)
    assert (uniform.dtype, uniform.shape) == (torch.float32, (2000,))
    assert 0 <= float(uniform.min()) < 0.01
    assert 0.99 < float(uniform.max()) < 1
    assert index.dtype == torch.int64
    assert set(index.tolist()) == {0, 1, 2}
    like = streams.normal_like(torch.zeros(2, 3, dtype=torch.float64))
    assert (like.dtype, like.shape) == (torch.float64, (2, 3))


def test_streams_continue_bit_for_bit_from_their_state() -> None:
    streams = RandomStreams(5, rank=2)
    streams.normal((17,)), streams.shared_index(9)
    state = {key: value.clone() for key, value in streams.state_dict().items()}
    expected = streams.normal((33,)), streams.uniform(5), streams.index(8, 100), streams.shared_index(1000)

    resumed = RandomStreams(99)
    resumed.load_state_dict(state)

    found = resumed.normal((33,)), resumed.uniform(5), resumed.index(8, 100), resumed.shared_index(1000)
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(one, other)
    assert found[3] == expected[3]


def test_two_runs_with_one_seed_are_equal() -> None:
    assert torch.equal(RandomStreams(4, rank=1).normal((10,)), RandomStreams(4, rank=1).normal((10,)))


def test_streams_of_a_run_all_differ() -> None:
    """Every (purpose, rank or epoch) of a run, and of the runs with the seeds beside it, has a stream of its own."""
    seeds = [
        stream_seed(seed, purpose, *index)
        for seed in (0, 1, 7, 2**40)
        for purpose in get_args(Purpose)
        for index in streams_of(purpose)
    ]
    assert len(set(seeds)) == len(seeds)
    firsts = [torch.randn(4, generator=seeded(seed)) for seed in seeds]
    assert len({tuple(first.tolist()) for first in firsts}) == len(seeds)


def streams_of(purpose: str) -> list[tuple[int, ...]]:
    """The indices of a run's streams: 64 ranks or epochs, one stream of all ranks, 8 steps of 8 ranks."""
    if purpose in ("decisions", "heads"):
        return [()]
    if purpose == "noise of a resumed run":
        return [(rank, step) for rank in range(8) for step in range(8)]
    return [(i,) for i in range(64)]


def test_noise_is_not_the_order_of_an_epoch() -> None:
    """The order of the samples of an epoch and the noise of a rank come from other generators, whatever the rank."""
    orders = {torch.randn(2, generator=seeded(stream_seed(3, "order", epoch))) for epoch in range(32)}
    noises = [RandomStreams(3, rank=rank).normal((2,)) for rank in range(32)]
    assert not any(torch.equal(order, noise) for order in orders for noise in noises)
