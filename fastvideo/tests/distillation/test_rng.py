"""Two streams: tensors differ per rank, decisions agree on all ranks, and both continue bit for bit."""

from __future__ import annotations

import torch

from fastvideo.distillation.rng import RandomStreams


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
