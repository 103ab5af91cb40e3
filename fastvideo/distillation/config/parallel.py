"""Config section of the layout over processes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fastvideo.distillation.config.base import Section
from fastvideo.ranges import Processes, Seconds


class ParallelConfig(Section):
    """Layout of the run over processes; see `docs/scaling.md`."""

    shard: Processes = 1
    """Processes that share one copy of every network (FSDP2); it divides the number of processes."""
    replicate: Processes | None = None
    """Copies of the networks; processes / shard if not given, and checked otherwise."""
    context: Processes = 1
    """Processes that share one sample, each with a part of its tokens (Ulysses); it divides the number of processes."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute activations in backward: `full` keeps only the inputs of blocks, `selective` also the results of
    attention and of every second matrix product. Either decodes frames for a frame teacher again in backward."""
    sync_every_micro_batch: bool = False
    """Reduce sharded gradients after every micro-batch: more traffic, but no whole gradients in memory."""
    keep_gathered: Literal["none", "frozen", "all"] = "none"
    """Sharded networks whose blocks stay whole after their first use, which saves traffic and costs memory: `frozen`
    permanently, `all` also the trained ones until the end of the next backward pass."""
    offload: Literal["none", "frozen", "all"] = "none"
    """Networks in host memory that are moved to the device block by block; needs `shard` above 1."""
    timeout: Seconds = Field(default=600.0, gt=0)
    """Seconds a process waits for others before the run ends with an error."""

    @model_validator(mode="after")
    def _offload_is_sharded(self) -> ParallelConfig:
        if self.offload != "none" and self.shard == 1:
            raise ValueError(f"offload {self.offload!r} moves blocks as sharding does: it needs shard above 1")
        if self.offload != "none" and self.keep_gathered != "none":
            raise ValueError(
                f"offload {self.offload!r} frees the device of what keep_gathered {self.keep_gathered!r} keeps there: "
                f"set one of them to none"
            )
        return self
