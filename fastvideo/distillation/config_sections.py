"""Parts of the config that concern networks and processes: roles with their adapters, and the layout."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


class Section(BaseModel):
    """Base of every part: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LoRAConfig(Section):
    """An adapter that is trained in place of a role's network."""

    rank: PositiveInt = 32
    """Rank of the change to each layer's weights."""
    alpha: PositiveFloat | None = None
    """The change is multiplied with alpha / rank; the rank itself if not given."""
    targets: tuple[str, ...] = Field(default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1)
    """Linear layers that get one, by the ends of their names."""


class RoleConfig(Section):
    """One role of the run."""

    trainable: bool
    """Whether it is trained; which roles must be and which must not is the method's to say."""
    path: str | None = None
    """Where its network's weights come from; the model's own path if not given."""
    init_from: str | None = None
    """Weights to start with instead, for the same network: a checkpoint (or a run's folder) as `PATH`, `PATH:ROLE` or
    `PATH:ROLE:ema|live`, or a model folder. Without a suffix: the role of this name or else the student, averaged
    weights if there are some. On the command line also `--init-ROLE-from`; a resumed run does not read it again."""
    lora: LoRAConfig | None = None
    """Train an adapter of this shape over a frozen network, which all such roles and the frozen ones with the same
    `path` share; without it a trainable role trains all its weights."""

    @model_validator(mode="after")
    def _adapter_is_trained(self) -> RoleConfig:
        if self.lora is not None and not self.trainable:
            raise ValueError("`lora` is trained: a frozen role has none")
        return self


class ParallelConfig(Section):
    """How the run is spread over processes; `docs/scaling.md` tells when to use what."""

    shard: PositiveInt = 1
    """Processes that hold one copy of every network between them (FSDP2); it divides the number of processes."""
    replicate: PositiveInt | None = None
    """Copies of that. Derived (processes / shard); if given, it must be right."""
    context: PositiveInt = 1
    """Processes that share one sample, each with a part of its tokens (Ulysses); it divides the number of processes."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute activations in backward: `full` keeps each block's input alone, `selective` also what attention and
    every second matrix product gave."""
    sync_every_micro_batch: bool = False
    """Reduce sharded gradients after every micro-batch: more traffic, but no whole gradient is kept meanwhile."""
    keep_gathered: Literal["none", "frozen", "all"] = "none"
    """Networks whose blocks stay whole after their first use, which saves traffic and costs memory: `frozen` for good,
    `all` also the trained ones, until the next backward pass is over. Without `shard` all networks are whole anyway."""
    offload: Literal["none", "frozen", "all"] = "none"
    """Networks that live in the host's memory and visit the device block by block; needs `shard` above 1."""
    timeout: PositiveFloat = 600.0
    """Seconds that a process waits for the others before the run ends with an error."""

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
