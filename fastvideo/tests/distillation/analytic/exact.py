"""Float64 roles and batches of one Gaussian, for tests that compare with closed forms to ten digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.types import Batch, Condition
from fastvideo.tests.distillation.toys import MEAN, STD, SpyAdapter, gaussian


def exact(adapter: SpyAdapter, kind: str, mean: float = MEAN, std: float = STD) -> nn.Module:
    """A network of N(mean, std^2) whose parameters are these numbers in float64."""
    network = gaussian(adapter, kind, mean, std).double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            number = {"mean": mean, "log_std": torch.tensor(std, dtype=torch.float64).log()}[name]
            parameter.copy_(torch.as_tensor(number, dtype=torch.float64))
    return network


def bundle_of(adapter: SpyAdapter, trained: dict[str, nn.Module], frozen: dict[str, nn.Module]) -> ModelBundle:
    """Handles of the given networks."""
    handles = [RoleHandle(name, adapter, network, trainable=True) for name, network in trained.items()]
    return ModelBundle([*handles, *(RoleHandle(name, adapter, network) for name, network in frozen.items())])


def draw(*shape: int, seed: int = 5) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(x0: Tensor, caption: float = 0.0) -> Batch:
    """A float64 batch; ``caption`` shifts the mean of its condition, the negative condition by nothing."""
    shift = torch.full((len(x0),), caption, dtype=torch.float64)
    condition = Condition({"analytic": {"shift": shift}})
    return Batch(tuple(x0.shape), condition, condition.map(lambda value: 0 * value), x0)


def column(values: Tensor) -> Tensor:
    """Numbers ``[B]`` that broadcast against latents."""
    return values.view(-1, 1, 1, 1, 1)
