"""Causal calls of networks that are shared, split, recomputed, compiled, changed, or called by two threads."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.tensor import DTensor

from fastvideo.distillation.adapters.diffusers.folder import repeated_blocks
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.causal_rollout import Continuation, roll
from fastvideo.distillation.chunks import Masked, Past, Reach
from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.engine.lora import merge, switch_of
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.placement import Placement
from fastvideo.distillation.noise import full_time, velocity_to_x0
from fastvideo.distillation.registry import run_schema
from fastvideo.distillation.rollout import Velocity
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, sample
from fastvideo.distillation.types import Condition
from fastvideo.errors import UserError
from fastvideo.tests.distillation.tiny import wan_config, wan_folder
from fastvideo.tests.launch import in_world

PROMPTS = ["a green seven moving up", "red three"]
REACH = Reach(1, window=2, sink=1)


@pytest.fixture(scope="module")
def adapter(tiny_wan: Path) -> WanFamily:
    return WanFamily(wan_config(wan_folder(tiny_wan.parent), num_frames=17))


@pytest.fixture(scope="module")
def condition(adapter: WanFamily) -> Condition:
    return adapter.conditioner.encode_prompts(PROMPTS)


def draw(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 4, frames, 2, 4, generator=torch.Generator().manual_seed(seed))


def half(x: Tensor) -> Tensor:
    return full_time(x, 0.5)


def rolled(
    student: Denoiser, condition: Condition, seed: int = 0, shared: dict[Any, Any] | None = None, frames: int = 4
) -> Tensor:
    """A video of one step per chunk, each with its graph, on pasts that move on before the backward pass."""
    stream = Continuation(student, condition, 0.0, torch.randn_like)

    def one_step(velocity: Velocity, noise: Tensor) -> Tensor:
        return velocity_to_x0(noise, velocity(noise, half(noise)), half(noise))

    chunks = roll(stream, Past(REACH, shared=shared), draw(frames, seed).split(1, dim=2), one_step)
    return torch.cat([chunk for _, chunk in chunks], dim=2)


def keys_made(network: nn.Module) -> list[bool]:
    """Grows with each call that computes keys of its prompts, by its having a graph."""
    made: list[bool] = []
    layer = network.get_submodule("blocks.0.attn2.to_k")
    layer.register_forward_hook(lambda *_: made.append(torch.is_grad_enabled()))
    return made


# Adapters on one base


def roles(folder: Path, recompute: str) -> Any:
    """DMD2 whose student and critic train adapters over the teacher, with adapters that change something."""
    values = {
        "distill_model": "wan", "distill_method": "dmd2", "output": "unused",
        "model": {"path": str(folder), "height": 16, "width": 32, "num_frames": 17, "max_sequence_length": 8},
        "roles": {
            "student": {"trainable": True, "lora": {"rank": 4}},
            "teacher": {"trainable": False},
            "critic": {"trainable": True, "lora": {"rank": 2}},
        },
        "ladder": {"times": [1.0, 0.5]}, "method": {}, "parallel": {"activation_checkpointing": recompute},
    }  # fmt: skip
    config = validate(run_schema("wan", "dmd2"), values, "test")
    method, generator = build_method(config, build_adapter(config)), torch.Generator().manual_seed(0)
    for handle in method.bundle:
        for parameter in handle.parameters() if handle.trainable else ():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return method


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_a_causal_student_a_teacher_and_a_critic_on_one_base(
    adapter: WanFamily, tiny_wan: Path, condition: Condition, recompute: str
) -> None:
    """The student's chunks have gradient for its adapter alone; the others see whole videos on the same base."""
    method = roles(wan_folder(tiny_wan.parent), recompute)
    student, teacher, critic = method.student, method.teacher, method.critic
    assert student.network is teacher.network is critic.network
    x, t, base = draw(4, seed=5), torch.tensor([0.7, 0.4]), Denoiser(adapter, adapter.folder.load_network())
    video = rolled(student, condition, shared={})
    seen = teacher.velocity(x, t, condition)
    critic.velocity(video.detach(), t, condition).square().mean().backward()
    trained = {role: [p.grad for p in method.bundle[role].parameters()] for role in ("student", "critic")}
    assert [all(g is None for g in trained[role]) for role in ("student", "critic")] == [True, False]
    video.square().mean().backward()
    assert torch.equal(seen, base.velocity(x, t, condition))
    alone = merged(adapter, student)
    expected = rolled(alone, condition)
    torch.testing.assert_close(video, expected, rtol=1e-4, atol=1e-5)
    expected.square().mean().backward()
    for name, parameter in student.named_parameters().items():
        assert parameter.grad is not None
        if name.endswith("lora_B.weight"):
            layer = name.removesuffix(".lora_B.weight")
            down = student.named_parameters()[f"{layer}.lora_A.weight"]
            whole = alone.network.get_parameter(f"{layer}.weight").grad
            torch.testing.assert_close(parameter.grad, whole @ down.T, rtol=1e-3, atol=1e-6)


def merged(adapter: WanFamily, student: RoleHandle) -> Denoiser:
    """A network of its own with the role's adapter in its weights."""
    network, switch = adapter.folder.load_network(), switch_of(student)
    assert switch is not None
    merge(network, {name: p.detach() for name, p in student.named_parameters().items()}, switch.scaling)
    return Denoiser(adapter, network.requires_grad_(True))


# Recomputed and split networks


def placed(adapter: WanFamily, processes: Processes, recompute: Any = "none") -> nn.Module:
    options = ParallelConfig(shard=processes.shard, activation_checkpointing=recompute)
    return Placement(adapter, processes, options).load(None, trained=True)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_sees_the_past_of_its_own_call(adapter: WanFamily, condition: Condition, recompute: str) -> None:
    found = []
    for kind in ("none", recompute):
        network = placed(adapter, Processes(), kind)
        video = rolled(Denoiser(adapter, network), condition)
        video.square().mean().backward()
        found.append(gradients(network))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_rollout_makes_keys_of_the_prompts_once(adapter: WanFamily, condition: Condition) -> None:
    """With one graph for all calls and commits: the same video to the bit, and gradients but for their rounding."""
    networks = [placed(adapter, Processes()) for _ in range(2)]
    made = [keys_made(network) for network in networks]
    videos = [
        rolled(Denoiser(adapter, network), condition, shared=shared)
        for network, shared in zip(networks, (None, {}), strict=True)
    ]
    assert made == [[True, False, True, True, True], [True]]
    assert torch.equal(*videos)
    for video in videos:
        video.square().mean().backward()
    alone, together = map(gradients, networks)
    assert alone["blocks.0.attn2.to_k.weight"].abs().sum() > 0
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-7)


def test_shared_keys_serve_no_other_prompt(adapter: WanFamily, condition: Condition) -> None:
    network = placed(adapter, Processes())
    student, other, x = Denoiser(adapter, network), adapter.conditioner.encode_prompts(["blue two", "a four"]), draw(1)
    past, alone = Past(REACH, shared={}), Past(REACH)
    for prompts in (condition, other):
        found, expected = (student.velocity(x, half(x), prompts, context=value) for value in (past, alone))
        assert torch.equal(found, expected)
    with torch.no_grad():
        for prompts in (condition, other):
            kept, made = (student.commit(value, x, prompts).pieces[0].layers for value in (past, alone))
            assert all(torch.equal(a, b) for pair in zip(kept, made, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_calls_make_their_own_keys(adapter: WanFamily, condition: Condition, recompute: str) -> None:
    """Or those of all layers would be kept until backward."""
    network, shared = placed(adapter, Processes(), recompute), dict[Any, Any]()
    made = keys_made(network)
    rolled(Denoiser(adapter, network), condition, shared=shared)
    assert made == [True, False, True, True, True]
    assert True not in shared


def split_work(adapter: WanFamily, condition: Condition, recompute: str, rank: int, size: int) -> Any:
    """Video of this rank's own noise, and gradients of its part of the mean over all ranks; then a masked call."""
    network = placed(adapter, Processes(rank, size, torch.device("cpu"), size), recompute)
    student = Denoiser(adapter, network)
    video = rolled(student, condition, seed=rank, shared={})
    loss(video).backward()
    with torch.no_grad():
        forced = student.velocity(draw(4), torch.full((2, 4), 0.5), condition, context=Masked(REACH, draw(4, 1)))
    return video.detach(), gradients(network), forced


def loss(video: Tensor) -> Tensor:
    """Mean over all chunks but the first: a scored window begins with an image latent in the place of its own."""
    return video[:, :, 1:].square().mean()


@pytest.mark.parametrize("recompute", ["full", "none"])
def test_split_networks_stream_as_whole_ones(
    adapter: WanFamily, condition: Condition, tmp_path: Path, recompute: str
) -> None:
    whole = Denoiser(adapter, placed(adapter, Processes()))
    split = WanFamily(adapter.config, whole_forwards=True)
    ends = in_world(2, partial(split_work, split, condition, recompute), tmp_path)
    for rank, (video, *_) in enumerate(ends):
        expected = rolled(whole, condition, seed=rank, shared={})
        (loss(expected) / 2).backward()
        torch.testing.assert_close(video, expected.detach(), rtol=1e-4, atol=1e-5)
    wanted = gradients(whole.network)
    with torch.no_grad():
        forced = whole.velocity(draw(4), torch.full((2, 4), 0.5), condition, context=Masked(REACH, draw(4, 1)))
    for _, found, seen in ends:
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(seen, forced, rtol=1e-4, atol=1e-5)


def test_tokens_on_several_processes_are_refused(
    adapter: WanFamily, condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = adapter.folder.load_network()
    monkeypatch.setattr(network, "_parallel_config", object())  # as diffusers' enable_parallelism leaves it
    student = Denoiser(adapter, network)
    with pytest.raises(UserError, match=r"parallel.context: .* so chunks need parallel.context: 1"):
        student.commit(Past(REACH), draw(1), condition)
    with pytest.raises(UserError, match=r"parallel.context"):
        student.velocity(draw(4), torch.full((2, 4), 0.5), condition, context=Masked(REACH))


# Compiled networks


def streamed(student: Denoiser, condition: Condition, chunks: int, reach: Reach = REACH) -> Tensor:
    """Predictions on pasts that fill sink and window."""
    past, found = Past(reach), []
    with torch.no_grad():
        for number in range(chunks):
            x = draw(1, seed=number)
            found.append(student.velocity(x, half(x), condition, context=past))
            past = student.commit(past, x, condition)
    return torch.cat(found, dim=2)


def compiled(adapter: WanFamily, backend: Any) -> Denoiser:
    network = adapter.folder.load_network()
    for block in repeated_blocks(network):
        block.compile(backend=backend)
    return Denoiser(adapter, network)


@pytest.mark.slow
def test_a_full_window_needs_no_new_graphs(adapter: WanFamily, condition: Condition) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    student = compiled(adapter, counter)
    first = streamed(student, condition, 5)
    graphs = counter.frame_count
    assert graphs > 0
    more = streamed(student, condition, 9)
    assert counter.frame_count == graphs
    plain = streamed(Denoiser(adapter, adapter.folder.load_network()), condition, 9)
    torch.testing.assert_close(more, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first, plain[:, :, :5], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_kernels_give_the_same_chunks(tiny_wan: Path, condition: Condition) -> None:
    """Under inductor, through the option of a run; two lengths of the past are enough graphs for a test."""
    torch._dynamo.reset()
    found = []
    for compile_blocks in (False, True):
        config = wan_config(wan_folder(tiny_wan.parent), num_frames=17, compile_blocks=compile_blocks)
        adapter = WanFamily(config)
        found.append(streamed(Denoiser(adapter, adapter.folder.load_network()), condition, 4, Reach(1, window=1)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


# Changed networks, inference mode


def test_a_processor_that_was_replaced_is_named(adapter: WanFamily, condition: Condition) -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    network: Any = adapter.folder.load_network()
    network.blocks[1].attn1.set_processor(WanAttnProcessor())
    student = Denoiser(adapter, network)
    with pytest.raises(UserError, match=r"blocks.1.attn1 has the processor WanAttnProcessor, which sees no past"):
        student.velocity(draw(1), torch.full((2,), 0.5), condition, context=Past(REACH))
    assert student.velocity(draw(3), torch.full((2,), 0.5), condition).isfinite().all()


def test_a_past_of_inference_mode_can_be_trained_on(adapter: WanFamily, condition: Condition) -> None:
    student = Denoiser(adapter, adapter.folder.load_network().requires_grad_(True))
    pasts = []
    for mode in (True, False):
        with torch.inference_mode(mode):
            past = Past(REACH)
            for frame in range(3):
                past = student.commit(past, draw(1, seed=frame) + 0, condition)
                student.velocity(draw(1), torch.full((2,), 0.5), condition, context=past)
            pasts.append(past)
    assert not any(tensor.is_inference() for piece in pasts[0].pieces for tensor in (piece.latents, *piece.layers[0]))
    found = []
    for past in pasts:
        student.network.zero_grad()
        student.velocity(draw(1), torch.full((2,), 0.5), condition, context=past).square().mean().backward()
        found.append(gradients(student.network))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


# Times


def test_a_stream_gives_one_time_per_sample(adapter: WanFamily, condition: Condition) -> None:
    """Times per token would cost Wan 1.3B a modulation tensor of 1.2 GB per call; a chunk has one."""
    network, shapes = adapter.folder.load_network(), []
    spec = SamplerSpec((1.0, 0.5), 2.0, "renoise", REACH)
    with network.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[1].shape))):
        sample(Denoiser(adapter, network), SampleNoise([1, 2]), (4, 4, 2, 4), spec, condition, condition)
    assert len(shapes) == 4 * 2 * 2 + 3 * 2
    assert set(shapes) == {(2,)}
