"""Three steps of a method on a family, in one process or in a layout of several."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastvideo.conformance.tiny import MADE, tiny_options
from fastvideo.distillation.batches import BatchPreparer
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.config.sections import TrainerConfig
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.runtime import Runtime
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.engine.training import RoleTraining, training_of
from fastvideo.distillation.registry import load_method, run_schema
from fastvideo.distillation.trainer import DistillTrainer
from fastvideo.distillation.trajectory import STATE_TIMES, STATES
from fastvideo.distillation.types import Batch, RawBatch
from fastvideo.tests.distillation.tiny import cogvideox_folder, wan_folder
from fastvideo.tests.distillation.toys import TOYS

STEPS = 3
TIMES = (1.0, 0.6)
PROMPTS = ("a green seven", "red three moving up", "a blurry seven", "three moving left")
FOLDERS = {"wan": wan_folder, "cogvideox": cogvideox_folder}
"""Makers of pipelines; those of other families are the conformance command's, as are their sizes."""
SIZES: dict[str, dict[str, int]] = {
    "wan": {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8},
    "cogvideox": {"height": 16, "width": 32, "num_frames": 9, "max_sequence_length": 8},
    **{name: {**tiny.sizes, "max_sequence_length": tiny.length} for name, tiny in MADE.items()},
}


@dataclass(frozen=True)
class Case:
    """One method on one family, with the options of the run."""

    family: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further sections of the config."""
    roles: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of roles, by name."""
    method_options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the method."""

    @property
    def name(self) -> str:
        """For people."""
        extra = "".join(
            f" {section}={value}" for section, value in {**self.options, **self.roles, **self.method_options}.items()
        )
        return f"{self.family} x {self.method}{extra}"

    @property
    def accumulation(self) -> int:
        """Micro-batches per step."""
        return int(self.options.get("trainer", {}).get("grad_accumulation", 1))


@dataclass(frozen=True)
class Result:
    """What a run did: mean loss and clipped gradient of every role at every step, and its weights at the end."""

    losses: dict[str, float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


def role_folders(root: Path, families: Sequence[str] = ("wan", "cogvideox")) -> dict[str, dict[str, Path]]:
    """Weights per family and role: each role's own, so that teacher and critic disagree."""
    found: dict[str, dict[str, Path]] = {}
    for family in families:
        place = root / family / "source"
        source = FOLDERS[family](place) if family in FOLDERS else Path(tiny_options(family, place)["path"])
        schema = run_schema(family, "sft").model_fields["model"].annotation
        assert schema is not None
        values = {"distill_model": family, "distill_method": "sft", "output": "unused", "method": {}}
        model = {"path": str(source), **SIZES[family]}
        config = validate(run_schema(family, "sft"), values | {"model": model, "roles": {}}, "test")
        adapter = build_adapter(config)
        found[family] = {"": source}
        for seed, role in enumerate(("student", "teacher", "critic")):
            network, generator = adapter.folder.load_network(), torch.Generator().manual_seed(seed)
            for parameter in network.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
            adapter.folder.save(root / family / role, network, {})
            found[family][role] = root / family / role
    return found


def config_of(case: Case, folders: Mapping[str, Mapping[str, Path]], parallel: Mapping[str, Any]) -> Any:
    """The run's config; a role without weights of its own is the method's."""
    cls, own = load_method(case.method), folders[case.family]
    roles = {}
    for role in (*cls.trainable_roles, *cls.frozen_roles):
        roles[role] = {"trainable": role in cls.trainable_roles} | dict(case.roles.get(role, {}))
        if role in own and "path" not in roles[role]:
            roles[role]["path"] = str(own[role])
    values = {
        "distill_model": case.family,
        "distill_method": case.method,
        "output": "unused",
        "seed": 5,
        "device": "cpu",
        "model": {"path": str(own[""]), **SIZES[case.family], **case.options.get("model", {})},
        "roles": roles,
        "ladder": {"times": list(TIMES), **case.options.get("ladder", {})},
        "method": dict(TOYS[case.method].config) | dict(case.method_options),
        "parallel": dict(case.options.get("parallel", {})) | dict(parallel),
        "trainer": dict(case.options.get("trainer", {})),
    }
    return validate(run_schema(case.family, case.method), values, case.name)


def batches(case: Case, adapter: Any, data_rank: int) -> Iterator[RawBatch]:
    """The micro-batches of one data rank: two samples each, with a walk to them for the method that needs one."""
    generator, walked = torch.Generator().manual_seed(100 + data_rank), load_method(case.method).needs_trajectories
    for number in range(STEPS * case.accumulation):
        latents = torch.randn((2, *adapter.codec.latent_shape), generator=generator)
        captions = tuple(PROMPTS[(number + data_rank + i) % len(PROMPTS)] for i in range(2))
        walk = torch.stack([latents + time * torch.randn(latents.shape, generator=generator) for time in TIMES], 1)
        times = torch.tensor(TIMES).expand(2, -1)
        yield RawBatch(captions, latents, {STATES: walk, STATE_TIMES: times} if walked else {})


def steady(handle: RoleHandle) -> None:
    """AdamW divides by a gradient's own size: an element whose gradient is rounding alone would move a whole step."""
    for group in training_of(handle).optimizer.param_groups:
        group["eps"], group["lr"] = 1e-3, 1e-2


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors, joined from the shards of all processes: one exchange for all, not one for each."""
    shards = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    own = {name: shard.detach().clone() for name, shard in shards.items()}
    split = next((t for t in tensors.values() if isinstance(t, DTensor)), None)
    if split is None:
        return own
    dimension = next(i for i, placement in enumerate(split.placements) if placement.is_shard())
    group = split.device_mesh.get_group(dimension)
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, own, group)
    return {
        name: torch.cat([part[name] for part in parts], t.placements[dimension].dim)
        if isinstance(t, DTensor)
        else own[name]
        for name, t in tensors.items()
    }


def train(case: Case, folders: Mapping[str, Mapping[str, Path]], processes: Processes, **parallel: Any) -> Result:
    """Three steps through the real trainer, as one process of a layout."""
    config = config_of(case, folders, parallel | {"shard": processes.shard, "context": processes.context})
    adapter = build_adapter(config, processes)
    with patch.object(torch.accelerator, "device_count", lambda: 1):  # diffusers divides a rank by it: there is one CPU
        method = build_method(config, adapter, processes)
    options = TrainerConfig(max_steps=STEPS, grad_accumulation=case.accumulation, log_every=10 * STEPS)
    silent = Tracker(Path("unused"), enabled=False)
    runtime = Runtime(method, options, silent, processes, sync_every_micro_batch=config.parallel.sync_every_micro_batch)
    trainer = DistillTrainer(method, preparing(method), options, runtime)
    trained = [handle for handle in method.bundle if handle.trainable]
    for handle in trained:
        steady(handle)
    gradients, stepped = [], RoleTraining.step
    handles = {id(handle.training): handle for handle in trained}

    def recorded(training: RoleTraining, skip: Tensor | None = None) -> None:
        handle = handles[id(training)]
        named = handle.named_parameters().items()
        seen[handle.name] = whole({n: p.grad for n, p in named if p.grad is not None})
        stepped(training, skip)

    data, losses = batches(case, adapter, processes.data_rank), {}
    RoleTraining.step = recorded  # type: ignore[method-assign]
    try:
        for step in range(STEPS):
            seen: dict[str, dict[str, Tensor]] = {}
            trainer.step = step
            trainer.train_step(data)
            trainer.settle()
            gradients.append({f"{role}/{name}": g for role, found in seen.items() for name, g in found.items()})
            losses |= {
                f"{step}/{k}": v for k, v in runtime.metrics.drain().items() if k.endswith(("/loss", "/grad_norm"))
            }
    finally:
        RoleTraining.step = stepped  # type: ignore[method-assign]
    weights = whole({f"{h.name}/{name}": p for h in trained for name, p in h.network.named_parameters()})
    return Result(losses, gradients, weights)


def train_alone(case: Case, folders: Mapping[str, Mapping[str, Path]], data_ranks: int) -> Result:
    """The same in one process, which draws and computes for every data rank and averages by hand."""
    config = config_of(case, folders, {})
    adapter = build_adapter(config)
    methods = [build_method(config, adapter, Processes(rank, data_ranks)) for rank in range(data_ranks)]
    streams = [batches(case, adapter, rank) for rank in range(data_ranks)]
    trained = [[handle for handle in method.bundle if handle.trainable] for method in methods]
    for handle in itertools.chain(*trained):
        steady(handle)
    losses: dict[str, float] = {}
    gradients: list[dict[str, Tensor]] = []
    for step in range(STEPS):
        seen: dict[str, list[float]] = {}
        for method, stream in zip(methods, streams, strict=True):
            for batch in itertools.islice(stream, case.accumulation):
                backward(method, preparing(method)(batch), step, case.accumulation, seen)
        losses |= {f"{step}/{role}/loss": sum(values) / len(values) for role, values in seen.items()}
        gradients.append({})
        for role in methods[0].active_roles(step):
            handles = [method.bundle[role] for method in methods]
            losses[f"{step}/{role}/grad_norm"] = average_and_clip(handles)
            named = handles[0].named_parameters().items()
            gradients[-1] |= {f"{role}/{n}": p.grad.clone() for n, p in named if p.grad is not None}
            for handle in handles:
                training_of(handle).step()
    weights = {f"{h.name}/{name}": p.detach().clone() for h in trained[0] for name, p in h.network.named_parameters()}
    return Result(losses, gradients, weights)


def preparing(method: Any) -> BatchPreparer:
    """Data to batches of all families of a method's roles."""
    families = dict.fromkeys(handle.adapter for handle in method.bundle)
    return BatchPreparer(method.bundle["student"].adapter.codec, [family.conditioner for family in families])


def backward(method: Any, batch: Batch, step: int, accumulation: int, seen: dict[str, list[float]]) -> None:
    """Backward of one micro-batch; its losses are added to ``seen``, by role."""
    for loss in method.losses(batch, step):
        (loss.value / accumulation).backward()
        seen.setdefault(loss.role, []).append(float(loss.value.detach()))


def average_and_clip(handles: list[RoleHandle]) -> float:
    """Give every copy of a role the mean gradient, clipped to norm 1; the norm before."""
    norm = 0.0
    for parameters in zip(*(handle.parameters() for handle in handles), strict=True):
        found = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters if found else ():
            parameter.grad = sum(found) / len(handles)  # type: ignore[assignment]
    for handle in handles:
        norm = float(torch.nn.utils.clip_grad_norm_(handle.parameters(), 1.0))
    return norm
