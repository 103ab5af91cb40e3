"""Attention backends beside torch's choice: tried before a run loads anything, seen by its counter, fed one dtype."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch as dispatch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastvideo.distillation.adapters.diffusers.kernels import attend, check_kernel
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.builder import build_method
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.engine.optional.performance import Performance
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.placement import Placement
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.parity.runs import Case, config_of
from fastvideo.tests.distillation.tiny import wan_config


def _mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


@torch.library.custom_op("fastvideo_tests::flash", mutates_args=())
def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as flash-attn gives it: one operator, which torch's counter does not know, in one half dtype."""
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("query, key and value must have the same dtype")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return _mixed(q, k, v)


@torch.library.custom_op("fastvideo_tests::flash_backward", mutates_args=())
def flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad = (x.transpose(1, 2).float() for x in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    weights = (q @ k.mT * scale).softmax(-1)
    moved = grad @ v.mT
    scores = weights * (moved - (moved * weights).sum(-1, keepdim=True)) * scale
    found = (x.transpose(1, 2).bfloat16().contiguous() for x in (scores @ k, scores.mT @ q, weights.mT @ grad))
    return next(found), next(found), next(found)


flash.register_autograd(
    lambda ctx, grad: flash_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put ``flash`` where diffusers calls flash-attn, and an inference kernel where it calls SageAttention."""

    def sage(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return _mixed(q, k, v).detach()

    monkeypatch.setattr(dispatch, "_CAN_USE_FLASH_ATTN", True)
    monkeypatch.setattr(dispatch, "flash_attn_func", lambda q, k, v, **_: flash(q, k, v))
    monkeypatch.setattr(dispatch, "_CAN_USE_SAGE_ATTN", True)
    monkeypatch.setattr(dispatch, "sageattn", sage)
    yield
    check_kernel.cache_clear()


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (
            "_native_cudnn",
            r"does not train heads of width 12 in float32 on cpu \(No viable .*\); choose another",
        ),
        ("flex", "does not train .* does not support backward on CPU"),
        ("flash", "flash-attn"),
    ],
)
def test_a_kernel_that_this_device_lacks_is_refused_before_anything_is_loaded(
    backend: str, message: str, tiny_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"wan": dict.fromkeys(("", "student", "teacher", "critic"), tiny_wan)}
    config = config_of(Case("wan", "dmd2", {"model": {"attention_backend": backend}}), folders, {})
    monkeypatch.setattr(Placement, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=message):
        build_method(config, WanFamily(config.model))


@pytest.mark.usefixtures("foreign")
def test_a_kernel_for_another_dtype_is_refused(tiny_wan: Path) -> None:
    folder = WanFamily(wan_config(tiny_wan, attention_backend="flash")).folder
    with pytest.raises(UserError, match=r"does not compute heads of width 12 in float32 on cpu \(FlashAttention only"):
        folder.check_kernels(trained=False)
    WanFamily(wan_config(tiny_wan, attention_backend="flash", precision="bfloat16")).folder.check_kernels(trained=True)


@pytest.mark.usefixtures("foreign")
def test_a_kernel_without_gradient_samples_and_does_not_train(tiny_wan: Path) -> None:
    folder = WanFamily(wan_config(tiny_wan, attention_backend="sage")).folder
    folder.check_kernels(trained=False)
    with pytest.raises(UserError, match="'sage' gives no gradient, so it cannot train"):
        folder.check_kernels(trained=True)


def trained(folder: Path, backend: str, recompute: str) -> tuple[float, list[int]]:
    """Gradient norm of a step in bfloat16, and its operations, as a run counts them in its second and third step."""
    adapter = WanFamily(wan_config(folder, attention_backend=backend, precision="bfloat16"))
    options = ParallelConfig(activation_checkpointing=recompute)
    network = Placement(adapter, Processes(), options).load(None, trained=True)
    performance = Performance(ModelBundle([RoleHandle("student", adapter, network, True)]), Processes(), adapter, 1e12)
    x, condition = torch.ones(2, *adapter.codec.latent_shape), adapter.conditioner.encode_prompts(["a red", "a green"])
    for _ in range(3):
        network.zero_grad()
        with performance.step(("student",)):
            adapter.velocity(network, x, torch.tensor([0.9, 0.3]), condition).square().mean().backward()
    norms = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    return float(torch.stack(norms).norm()), performance._counts["student",]


@pytest.mark.usefixtures("foreign", "cuda_rules")
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_operations_and_gradients_are_those_of_torchs_own_kernel(recompute: str, tiny_wan: Path) -> None:
    """The kernel refuses float32 and mixed dtypes, and torch's counter sees none of its operations."""
    norm, counts = trained(tiny_wan, "flash", recompute)
    expected, native = trained(tiny_wan, "native", recompute)
    assert counts == native
    assert norm == pytest.approx(expected, rel=0.02)


@pytest.mark.usefixtures("foreign")
def test_kernels_are_as_they_were_after_a_counted_step(tiny_wan: Path) -> None:
    before = dict(dispatch._AttentionBackendRegistry._backends)
    adapter, seen = WanFamily(wan_config(tiny_wan)), list[int]()
    x = torch.ones(1, 8, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    with adapter.folder.counting(seen.append):
        attend("flash", x, x, x).sum().backward()
    attend("flash", x, x, x)
    product = 2 * 2 * 8 * 8 * 16  # of [8, 16] and [16, 8], in two heads
    assert seen == [2 * product, 5 * product]
    assert dispatch._AttentionBackendRegistry._backends == before
