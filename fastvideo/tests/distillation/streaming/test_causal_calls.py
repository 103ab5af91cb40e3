"""Causal calls of Wan: chunks that come one by one give what one call over all of them gives."""

from __future__ import annotations

import copy
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastvideo
from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.adapters.diffusers.view import Grid, next_view, rotate, view_of
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.causal_rollout import recache
from fastvideo.distillation.chunks import Masked, Past, Reach, masked_runs, spans
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.types import Condition
from fastvideo.errors import UserError
from fastvideo.tests.distillation.streaming.chunked import chunk_times, streamed


@pytest.fixture(scope="module")
def adapter() -> WanFamily:
    return WanFamily(WanFamilyConfig())


@pytest.fixture(scope="module")
def student(adapter: WanFamily) -> Denoiser:
    return Denoiser(adapter, adapter.folder.load_network())


@pytest.fixture(scope="module")
def condition(adapter: WanFamily) -> Condition:
    return adapter.conditioner.encode_prompts(["a red seven moving up", "a four"])


def draw(frames: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(2, 16, frames, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


REACHES = [
    Reach(1),
    Reach(3),
    Reach(4),
    Reach(1, window=3),
    Reach(1, window=2, sink=1),
    Reach(3, window=3, sink=3, positions="absolute"),
    Reach(2, window=4, sink=2),
]


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def precise(adapter: WanFamily, request: pytest.FixtureRequest) -> tuple[Denoiser, torch.dtype]:
    return Denoiser(adapter, adapter.folder.load_network().to(request.param)), request.param


@pytest.mark.parametrize("reach", REACHES, ids=str)
@pytest.mark.parametrize("forced", [False, True], ids=["diffusion", "teacher"])
def test_streaming_is_the_masked_call(
    precise: tuple[Denoiser, torch.dtype], condition: Condition, reach: Reach, forced: bool
) -> None:
    """Equal to the bit in float64; in float32 a matrix product rounds otherwise for fewer rows."""
    student, dtype = precise
    condition, frames = condition.map(lambda value: value.to(dtype)), 9
    x, t = draw(frames, dtype), chunk_times(frames, reach.chunk)
    clean = draw(frames, dtype, seed=1) if forced else None
    with torch.no_grad():
        masked = student.velocity(x, t, condition, context=Masked(reach, clean))
    error = (masked - streamed(student, x, t, condition, reach, clean)).abs().max()
    assert error <= (0.0 if dtype == torch.float64 else 1e-5)


def test_no_context_is_the_stock_network(adapter: WanFamily, condition: Condition) -> None:
    from diffusers import WanTransformer3DModel

    from fastvideo.tiny.paths import PIPELINE_FOLDER

    stock = WanTransformer3DModel.from_pretrained(PIPELINE_FOLDER, subfolder="transformer", torch_dtype=torch.float32)
    x, t = draw(3), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        expected = adapter.velocity(stock.eval(), x, t, condition)
        assert torch.equal(adapter.velocity(adapter.folder.load_network(), x, t, condition), expected)


def test_a_chunk_of_all_frames_is_a_bidirectional_call(student: Denoiser, condition: Condition) -> None:
    x, t = draw(3), torch.full((2, 3), 0.6)
    with torch.no_grad():
        assert torch.equal(
            student.velocity(x, t, condition, context=Masked(Reach(3))), student.velocity(x, t, condition)
        )


def test_calls_on_one_past_share_its_view(student: Denoiser, condition: Condition) -> None:
    """Their tables are computed once, and never serve another past or another size of chunk."""
    grid, x = Grid(2, 2, (16, 16, 16)), draw(2)
    past = student.commit(Past(Reach(2, positions="absolute")), x, condition)
    view = next_view(student.network, past, x, grid)
    assert next_view(student.network, past, draw(2, seed=1), grid) is view
    later = next_view(student.network, replace(past, length=4), x, grid)
    assert view.table is not None
    assert later.table is not None
    assert not torch.equal(later.table, view.table)
    assert next_view(student.network, past, draw(1), grid).parts[0].queries == (0, 4)


def test_rotated_keys_are_kept_but_where_recomputation_would_keep_them_for_every_chunk(
    student: Denoiser, condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept ones may be read by a call with gradient, also if a call for inference made them."""
    grid, x, past = Grid(2, 2, (16, 16, 16)), draw(1), student.commit(Past(Reach(1)), draw(1), condition)
    with torch.inference_mode():
        kept = next_view(student.network, past, x, grid)
    assert len(kept.turned) == len(student.network.blocks)
    assert not any(tensor.is_inference() for tensor in (kept.table, kept.past_table, *kept.turned))
    monkeypatch.setattr(student.network, "gradient_checkpointing", True)
    assert next_view(student.network, past, x, grid).turned == ()
    with torch.no_grad():
        assert next_view(student.network, past, x, grid) is kept


def keys_made(student: Denoiser, layer: int = 0) -> Any:
    """Grows by one for each call that computes keys of its prompts."""
    made: list[int] = []
    student.network.blocks[layer].attn2.to_k.register_forward_hook(lambda *_: made.append(layer))
    return made


def test_keys_of_the_prompts_are_made_once(adapter: WanFamily, condition: Condition) -> None:
    """By the first commit, for all calls without gradient behind it, and to the bit those of a call of its own."""
    student, x, t = Denoiser(adapter, adapter.folder.load_network()), draw(1), torch.tensor([0.7, 0.4])
    made = keys_made(student)
    past = student.commit(student.commit(Past(Reach(1)), x, condition), draw(1, seed=1), condition)
    with torch.no_grad():
        found = student.velocity(x, t, condition, context=past)
        assert len(made) == 1
        assert torch.equal(student.velocity(x, t, condition, context=replace(past, texts=None)), found)
    assert len(made) == 2


def test_kept_keys_serve_no_other_prompt_and_no_gradient(adapter: WanFamily, condition: Condition) -> None:
    student, x, t = Denoiser(adapter, adapter.folder.load_network()), draw(1), torch.tensor([0.7, 0.4])
    other = adapter.conditioner.encode_prompts(["a green nine moving left", "blue two"])
    past = student.commit(Past(Reach(1)), x, condition)
    with torch.no_grad():
        found = student.velocity(x, t, other, context=past)
        assert torch.equal(found, student.velocity(x, t, other, context=replace(past, texts=None)))
        assert student.commit(past, x, other).texts.text is other.of(adapter.conditioner.key)["prompt_embeds"]
    student.network.requires_grad_(True)
    student.velocity(x, t, condition, context=past).square().mean().backward()
    assert student.network.blocks[0].attn2.to_k.weight.grad.abs().sum() > 0


def test_a_foreign_processor_of_text_keeps_no_keys(adapter: WanFamily, condition: Condition) -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    student, x = Denoiser(adapter, adapter.folder.load_network()), draw(1)
    expected = student.commit(Past(Reach(1)), x, condition)
    student.network.blocks[1].attn2.set_processor(WanAttnProcessor())
    found = student.commit(Past(Reach(1)), x, condition)
    assert (expected.texts is None, found.texts) == (False, None)
    assert torch.equal(found.pieces[0].layers[3][0], expected.pieces[0].layers[3][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rotation_is_the_stock_one(dtype: torch.dtype) -> None:
    """To the bit, and so is its gradient; compiled code multiplies the pairs one by one."""
    table = Grid(2, 2, (16, 16, 16)).table((0, 3, 4), torch.device("cpu"))
    cos, sin = (half.repeat_interleave(2, -1) for half in table.unbind(-1))
    x, weight = (torch.randn(2, 12, 4, 48, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))

    def stock(x: Tensor) -> Tensor:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)
        return (x * cos + turned * sin).type_as(x)

    for turn in (lambda x: rotate(x, table), torch.compile(lambda x: rotate(x, table), backend="eager")):
        own, theirs = (x.clone().requires_grad_() for _ in range(2))
        found, expected = turn(own), stock(theirs)
        assert torch.equal(found, expected)
        for value in (found, expected):
            (value * weight).sum().backward()
        assert torch.equal(own.grad, theirs.grad) or dtype == torch.bfloat16


def test_a_call_leaves_the_network_as_it_was(student: Denoiser, condition: Condition) -> None:
    """After an error too: a bidirectional call that follows has positions of its own."""
    x = draw(3)
    before = student.velocity(x, torch.full((2,), 0.5), condition)
    with pytest.raises(RuntimeError):
        student.velocity(x[:, :3], torch.full((2,), 0.5), condition, context=Past(Reach(3)))
    assert torch.equal(student.velocity(x, torch.full((2,), 0.5), condition), before)


def test_parts_against_a_mask(adapter: WanFamily) -> None:
    """An independent oracle: one call of attention with a mask of booleans."""
    frames, reach = 7, Reach(2, window=2, sink=2, positions="absolute")
    heads = [torch.randn(2, 4 * frames, 4, 48, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    grid = Grid(2, 2, (16, 16, 16))
    view = view_of(masked_runs(frames, reach, False), grid, torch.device("cpu"))
    found = view.attend(0, *heads, attention)
    table = grid.table(tuple(range(frames)), torch.device("cpu"))
    query, key = (rotate(x, table) for x in heads[:2])
    chunks = spans(frames, reach.chunk)
    of = [next(i for i, (a, b) in enumerate(chunks) if a <= frame < b) for frame in range(frames)]
    seen = [
        [
            of[k] == of[q] or (k < q and (chunks[of[k]][0] < 2 or chunks[of[k]][0] >= chunks[of[q]][0] - 2))
            for k in range(frames)
        ]
        for q in range(frames)
    ]
    mask = torch.tensor(seen).repeat_interleave(4, 0).repeat_interleave(4, 1)
    expected = functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, heads[2])), mask)
    assert (found - expected.transpose(1, 2)).abs().max() < 1e-5


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = (x.transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(*heads).transpose(1, 2)


def test_the_future_is_not_seen(student: Denoiser, condition: Condition) -> None:
    """A later chunk changes nothing before it; a chunk's own clean latents change only what comes after it."""
    x, t, reach, clean = draw(6), chunk_times(6, 2), Reach(2), draw(6, seed=1)
    other = draw(6, seed=2)
    with torch.no_grad():
        for changed in (Masked(reach), Masked(reach, clean)):
            before = student.velocity(x, t, condition, context=changed)
            later = torch.cat([x[:, :, :4], other[:, :, 4:]], dim=2)
            assert torch.equal(student.velocity(later, t, condition, context=changed)[:, :, :4], before[:, :, :4])
        swapped = torch.cat([clean[:, :, :2], other[:, :, 2:4], clean[:, :, 4:]], dim=2)
        after = student.velocity(x, t, condition, context=Masked(reach, swapped))
    assert torch.equal(after[:, :, :4], before[:, :, :4])
    assert (after[:, :, 4:] - before[:, :, 4:]).abs().amax(dim=(1, 3, 4)).gt(0.01).all(), "each frame of each sample"


def test_a_longer_video_than_the_table(student: Denoiser, condition: Condition) -> None:
    """The tiny network's table of positions ends at 32 latent frames; a stream does not."""
    assert student.network.rope.max_seq_len == 32
    x, t, reach = draw(36), torch.full((2, 36), 0.5), Reach(1, window=2, positions="absolute")
    with torch.no_grad():
        masked = student.velocity(x, t, condition, context=Masked(reach))
        assert (masked - streamed(student, x, t, condition, reach)).abs().max() < 1e-5
        window = streamed(student, x, t, condition, Reach(1, window=2))
    assert (window - masked).abs().max() < 1e-4  # without a sink, distances are the same


def test_a_past_is_a_value(student: Denoiser, condition: Condition) -> None:
    """Two futures of one past do not disturb each other, and pieces are shared and not copied."""
    first = student.commit(Past(Reach(1, window=2)), draw(1), condition)
    one, two = (student.commit(first, draw(1, seed=s), condition) for s in (1, 2))
    assert one.pieces[0] is two.pieces[0] is first.pieces[0]
    kept = [value.clone() for layer in first.pieces[0].layers for value in layer]
    student.commit(student.commit(one, draw(1, seed=3), condition), draw(1, seed=4), condition)
    assert all(
        torch.equal(a, b) for a, b in zip(kept, [v for layer in first.pieces[0].layers for v in layer], strict=True)
    )
    assert (one.frames, one.length) == (2, 2)


def test_memory_is_constant_in_a_full_window(student: Denoiser, condition: Condition) -> None:
    past, sizes = Past(Reach(1, window=3, sink=1)), []
    for index in range(8):
        past = student.commit(past, draw(1, seed=index), condition)
        sizes.append((past.frames, past.bytes))
    assert [frames for frames, _ in sizes] == [1, 2, 3, 4, 4, 4, 4, 4]
    assert len({size for _, size in sizes[3:]}) == 1
    assert [piece.start for piece in past.pieces] == [0, 5, 6, 7]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_the_chunk_and_not_the_past(
    adapter: WanFamily, condition: Condition, checkpointing: bool
) -> None:
    """Recomputation in backward sees the past of its own call, though a later one was committed meanwhile."""
    network = adapter.folder.load_network()
    if checkpointing:
        network.train()
        network.enable_gradient_checkpointing()
    student = Denoiser(adapter, network.requires_grad_(True))
    past = student.commit(Past(Reach(1)), draw(1), condition)
    x = draw(1, seed=1).requires_grad_()
    loss = student.velocity(x, torch.full((2,), 0.5), condition, context=past).square().mean()
    student.commit(student.commit(past, draw(1, seed=2), condition), draw(1, seed=3), condition)
    loss.backward()
    assert not any(value.requires_grad for layer in past.pieces[0].layers for value in layer)
    reference = Denoiser(adapter, adapter.folder.load_network().requires_grad_(True))
    y = draw(1, seed=1).requires_grad_()
    fresh = reference.commit(Past(Reach(1)), draw(1), condition)
    reference.velocity(y, torch.full((2,), 0.5), condition, context=fresh).square().mean().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)
    for mine, theirs in zip(network.parameters(), reference.network.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_the_first_chunk_takes_the_remainder_and_one_function_says_so() -> None:
    """Masks, times and rollouts that each had a rule of their own would not agree on the chunks of a video."""
    assert spans(7, 3) == ((0, 4), (4, 7))
    assert spans(9, 1) == tuple((i, i + 1) for i in range(9))
    assert spans(4, 4) == ((0, 4),)
    package = Path(fastvideo.__file__).parent
    sources = [path for path in package.rglob("*.py") if "tests" not in path.parts]
    taken = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in sources
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"% [a-z_.]*chunk\b", line) and not line.lstrip().startswith("if ")
    ]
    assert taken == ["distillation/chunks.py: edges = [0, *range(chunk + frames % chunk, frames + 1, chunk)]"]


@pytest.mark.parametrize(("frames", "chunk"), [*itertools.product(range(1, 12), range(1, 5))])
def test_pasts_keep_what_the_definition_keeps(frames: int, chunk: int) -> None:
    """Window and sink in frames: pieces against the definition, for every layout."""
    from fastvideo.distillation.chunks import Piece

    if frames < chunk:
        with pytest.raises(UserError, match=f"no chunk of {chunk}"):
            spans(frames, chunk)
        return
    for reach in (Reach(chunk), Reach(chunk, chunk), Reach(chunk, 2 * chunk, chunk)):
        past = Past(reach)
        for index, (start, end) in enumerate(spans(frames, chunk)):
            runs = masked_runs(frames, reach, False)[index]
            assert sum(b - a for a, b in runs.keys[:-1]) == past.frames
            assert runs.positions == past.positions(end - start)
            past = past.add(Piece(start, torch.zeros(1, 1, end - start, 1, 1), ()))
        assert past.length == frames


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "reach.chunk: at least 1"),
        ({"chunk": -2}, "reach.chunk: at least 1 latent frame, got -2"),
        ({"chunk": 1, "window": 2, "sink": -1}, "reach.sink: 0 or a multiple of chunk 1, got -1"),
        ({"chunk": 3, "window": 4}, "reach.window: a positive multiple of chunk 3"),
        ({"chunk": 3, "window": 0}, "reach.window: a positive multiple"),
        ({"chunk": 2, "window": 4, "sink": 1}, "reach.sink: 0 or a multiple"),
        ({"chunk": 1, "sink": 1}, "a sink needs a window"),
    ],
)
def test_a_reach_that_does_not_fit(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Reach(**options)


def test_published_windows() -> None:
    """LongLive's 12 visible frames with sink 3 and chunk 3; Reward Forcing's 9."""
    assert Reach.from_visible(3, 12, 3) == Reach(3, window=6, sink=3)
    assert Reach.from_visible(3, 9, 3) == Reach(3, window=3, sink=3)


def test_a_past_of_other_videos_is_refused(student: Denoiser, condition: Condition) -> None:
    past = student.commit(Past(Reach(1)), draw(1), condition)
    with pytest.raises(UserError, match="cannot continue with a chunk"):
        student.velocity(draw(1)[:1], torch.full((1,), 0.5), condition.rows(slice(0, 1)), context=past)


def test_a_past_of_another_network_is_refused(student: Denoiser, condition: Condition) -> None:
    """Of a teacher, say, with latents of the same size; or of the same weights under another role's adapter."""
    half, past = torch.full((2,), 0.5), student.commit(Past(Reach(1)), draw(1), condition)
    others = [Denoiser(student.adapter, copy.deepcopy(student.network))]
    others.append(Denoiser(student.adapter, student.network, select=lambda: None))
    for other in others:
        with pytest.raises(UserError, match="made by another network"):
            other.velocity(draw(1), half, condition, context=past)
        with pytest.raises(UserError, match="made by another network"):
            other.commit(past, draw(1), condition)
        anew = recache(other, past, condition)
        other.velocity(draw(1), half, condition, context=anew)
    again = Denoiser(student.adapter, student.network)
    again.velocity(draw(1), half, condition, context=past)


def test_a_past_of_another_dtype_is_refused(student: Denoiser, condition: Condition) -> None:
    half, past = torch.full((2,), 0.5), student.commit(Past(Reach(1)), draw(1), condition)
    with pytest.raises(UserError, match=r"past of torch\.float32 latents .* a chunk of torch\.float64"):
        student.velocity(draw(1).double(), half, condition, context=past)
    layers = tuple(tuple(tensor.double() for tensor in layer) for layer in past.pieces[0].layers)
    other = replace(past, pieces=(replace(past.pieces[0], layers=layers),))
    with pytest.raises(UserError, match=r"past of torch\.float64 keys .* computes in torch\.float32"):
        student.velocity(draw(1), half, condition, context=other)


class Whole(AnalyticAdapter):
    """A family that generates whole videos."""

    commit = DistillAdapter.commit


def test_a_family_without_chunks_says_so() -> None:
    family = Whole(AnalyticConfig())
    with pytest.raises(UserError, match="Whole does not generate chunk by chunk"):
        Denoiser(family, family.folder.load_network()).commit(Past(Reach(1)), draw(1), Condition({}))
