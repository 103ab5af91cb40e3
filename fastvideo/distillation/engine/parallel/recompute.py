"""Activation checkpointing: keep less in forward, compute it again in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastvideo.distillation.engine.lora import adapted_layers, select, selected

Recompute = Literal["full", "selective"]
MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


class EverySecondProduct:
    """Keeps the results of attention and of every second matrix product; recomputes the rest.

    Forward and recomputation count separately, so both take the same decisions.
    """

    def __init__(self) -> None:
        self.products = {False: 0, True: 0}

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if op in MATRIX_PRODUCTS:
            self.products[context.is_recompute] += 1
            if self.products[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def _selective() -> Any:
    return create_selective_checkpoint_contexts(EverySecondProduct())  # type: ignore[no-untyped-call]


def checkpointed(kind: Recompute) -> Callable[..., Any]:
    """Make ``f(block, *args)``, which calls ``block(*args)`` and recomputes its activations in backward.

    The random state is not restored in backward: no network that is trained here draws random numbers.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        options["context_fn"] = _selective

    layers_of: dict[nn.Module, list[Any]] = {}

    def call(block: nn.Module, *args: Any) -> Any:
        if block not in layers_of:
            layers_of[block] = adapted_layers(block)
        layers = layers_of[block]
        adapter = selected(layers)

        def compute(*inputs: Any) -> Any:
            # In backward another role's adapter may be selected: recompute with that of the forward.
            select(layers, adapter)
            return block(*inputs)

        return checkpoint(compute, *args, **options)

    return call
