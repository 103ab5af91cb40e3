"""Initialise the tiny CogVideoX transformer from the Wan teacher.

Both networks have the same width, heads, layers and patches. Patch embedding, self-attention, feed-forward layers and
the last projection are copied; a least-squares fit turns Wan's modulations into functions of CogVideoX's smaller time
embedding. Text attention differs (joint instead of cross, queries and keys normalised per head) and starts untrained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvideo.distillation.adapters.diffusers.discrete_vp import NoiseGrid

TIMES = 400
GELU_SLOPE = 1.702  # gelu(x) is nearly silu(1.702 x) / 1.702, which is a fifth cheaper to train on a CPU
FIT_STEPS = 400
FIT_RATE = 3e-3
RIDGE = 1e-4


def start_from_wan(network: Any, wan: Any, grid: NoiseGrid) -> None:
    """Copy corresponding weights of a `WanTransformer3DModel` into a `CogVideoXTransformer3DModel`, in place."""
    t = torch.linspace(0.001, 0.999, TIMES)
    with torch.no_grad():
        embedded, modulation = _wan_times(wan, t)
    basis = _fit_time_embedding(network, grid.timestep(t), torch.cat([modulation.flatten(1), embedded], dim=1))
    with torch.no_grad():
        network.patch_embed.proj.weight.copy_(wan.patch_embedding.weight[:, :, 0])
        network.patch_embed.proj.bias.copy_(wan.patch_embedding.bias)
        for block, source in zip(network.transformer_blocks, wan.blocks, strict=True):
            _copy_block(block, source)
            values = source.scale_shift_table + modulation
            _set_rows(block.norm1.linear, basis, values[:, :3].flatten(1))
            _set_rows(block.norm2.linear, basis, values[:, 3:].flatten(1))
        _copy_head(network, wan, embedded, torch.hypot(1 - t, t), basis)


def _wan_times(wan: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """Wan's time embedding [T, D] and its six modulations [T, 6, D] of every block."""
    times = wan.condition_embedder
    embedded = times.time_embedder(times.timesteps_proj(1000 * t))
    return embedded, times.time_proj(times.act_fn(embedded)).unflatten(1, (6, -1))


def _fit_time_embedding(network: Any, timesteps: Tensor, wanted: Tensor) -> Tensor:
    """Train the time embedding until `wanted` [T, K] is linear in the basis [T, E + 1], which is returned."""
    optimizer = torch.optim.Adam(network.time_embedding.parameters(), FIT_RATE)
    projected = network.time_proj(timesteps)
    for _ in range(FIT_STEPS):
        basis = _basis(network, projected)
        optimizer.zero_grad()
        (basis @ _least_squares(basis, wanted) - wanted).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _basis(network, projected).detach()


def _basis(network: Any, projected: Tensor) -> Tensor:
    """Activated time embedding and a constant, [T, E + 1]."""
    seen = F.silu(network.time_embedding(projected))
    return torch.cat([seen, torch.ones(len(seen), 1)], dim=1)


def _least_squares(basis: Tensor, wanted: Tensor) -> Tensor:
    """Coefficients [E + 1, K] of `wanted` [T, K] in `basis` [T, E + 1]."""
    a = basis.double()
    return torch.linalg.solve(a.T @ a + RIDGE * torch.eye(a.shape[1]), a.T @ wanted.double()).float()


def _set_rows(linear: nn.Linear, basis: Tensor, values: Tensor) -> None:
    """Fit the first rows of `linear` to `values` [T, K] over the times of `basis`."""
    fitted, rows = _least_squares(basis, values), values.shape[1]
    linear.weight[:rows], linear.bias[:rows] = fitted[:-1].T, fitted[-1]


def _copy_block(block: Any, source: Any) -> None:
    """Copy self-attention and the narrower feed-forward layer; new units start with small weights."""
    wide, narrow = block.ff.net[0].proj, source.ffn.net[0].proj
    units = narrow.out_features
    wide.weight[:units], wide.bias[:units] = GELU_SLOPE * narrow.weight, GELU_SLOPE * narrow.bias
    block.ff.net[2].weight *= 0.3
    block.ff.net[2].weight[:, :units] = source.ffn.net[2].weight / GELU_SLOPE
    block.ff.net[2].bias.copy_(source.ffn.net[2].bias)
    ours, theirs = block.attn1, source.attn1
    for name in ("to_q", "to_k", "to_v"):
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    ours.to_out[0].load_state_dict(theirs.to_out[0].state_dict())
    for ours_norm, theirs_norm in ((ours.norm_q, theirs.norm_q), (ours.norm_k, theirs.norm_k)):
        ours_norm.weight.copy_(theirs_norm.weight.view(ours.heads, -1).mean(dim=0))


def _copy_head(network: Any, wan: Any, embedded: Tensor, length: Tensor, basis: Tensor) -> None:
    """Fit the last modulation, scaled by `length` [T] as `u = (alpha + sigma) v + ...`; copy the output projection."""
    shift, scale = (wan.scale_shift_table + embedded.unsqueeze(1)).unbind(dim=1)
    length = length.unsqueeze(1)
    _set_rows(network.norm_out.linear, basis, torch.cat([length * shift, length * (1 + scale) - 1], dim=1))
    patch = network.config.patch_size
    for name in ("weight", "bias"):  # Wan has channels last within a patch, CogVideoX first
        rows = getattr(wan.proj_out, name).unflatten(0, (patch * patch, -1)).transpose(0, 1).flatten(0, 1)
        getattr(network.proj_out, name).copy_(rows)
