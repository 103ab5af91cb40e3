"""Recomputation in backward changes no loss and no gradient of any family, but for the rounding of some processors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastvideo.conformance.tiny import perturb
from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.placement import Placement
from fastvideo.distillation.rng import normal, seeded
from fastvideo.tests.distillation.tiny import FAMILIES


def trained(folder: Path, name: str, **options: str) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and the number of times that an innermost module ran, forward and backward together."""
    family = FAMILIES[name]
    adapter, calls = family.make(folder), 0
    network = Placement(adapter, Processes(), ParallelConfig.model_validate(options)).load(None, trained=True)
    perturb(network)

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for module in network.modules():
        if not any(module.children()):
            module.register_forward_hook(count)
    x_t = normal((2, *adapter.codec.latent_shape), seeded(3))
    u = adapter.velocity(network, x_t, torch.tensor([0.8, 0.3]), adapter.conditioner.encode_prompts(family.prompts))
    loss = u.square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {key: p.grad for key, p in network.named_parameters() if p.grad is not None}, calls


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "analytic"])
def test_recomputed_blocks_give_the_loss_and_gradients_of_kept_ones(name: str, tiny_wan: Path) -> None:
    loss, gradients, calls = trained(tiny_wan.parent, name)
    again, recomputed, more = trained(tiny_wan.parent, name, activation_checkpointing="full")
    assert more > 1.3 * calls, "most of the network is in blocks that ran twice"
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0.0)
    assert gradients.keys() == recomputed.keys()
    assert any(gradient.any() for gradient in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-4, atol=1e-6, msg=key)
