"""Steps of a recipe over fake tensors of the CUDA device."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param

from fastvideo.distillation.builder import Config, Method, build_adapter, build_families, build_on
from fastvideo.distillation.engine.non_finite import FiniteCheck
from fastvideo.distillation.engine.parallel.collective import Agreement
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.parallel.sharding import shard_network
from fastvideo.distillation.engine.placement import EmptyPlacement, Placement
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.rng import RandomStreams, seeded
from fastvideo.distillation.sample import SamplerSpec
from fastvideo.distillation.scaling import Scaling
from fastvideo.distillation.types import RawBatch
from fastvideo.inference.sampler import Sampling
from fastvideo.planning.estimate import Plan, Planner
from fastvideo.planning.fake import FakeMode, LiveBytes, fake_codec, fake_text, on_one_side
from fastvideo.planning.published import without_weights
from fastvideo.tests.fake_cuda.device import CALLS
from fastvideo.training.distillation import parse
from fastvideo.training.run import build_trainer
from fastvideo.training.shared_sampling import SharedSampler

CUDA = torch.device("cuda", 0)


class Streams(RandomStreams):
    """Draws of fake tensors; decisions take the longest of their choices."""

    def __init__(self) -> None:
        self.seed, self.device, self.rank, self.ranks, self.shared = 0, CUDA, 0, 1, seeded(0)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=CUDA, dtype=dtype)

    def uniform(self, count: int) -> Tensor:
        return torch.empty(count, device=CUDA)

    def shared_index(self, high: int) -> int:
        return high - 1

    def shared_uniform(self) -> float:
        return 1.0 - 2**-24

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class CudaPlacement(EmptyPlacement):
    """Networks of fake tensors on the device, split as a run splits them."""

    def __init__(self, real: Placement, mode: FakeMode, memory: LiveBytes) -> None:
        super().__init__(real.source, real.processes, real.options)
        self.mode, self.memory = mode, memory

    def _spread(self, network: nn.Module, path: str | None) -> None:
        meshes = [self._mesh] if self.processes.shard > 1 else []
        meshes += [self._context_mesh] if self.processes.context > 1 else []  # made of real numbers of ranks
        with self.mode, self.memory:
            for module in network.modules():
                for name, p in module.named_parameters(recurse=False):
                    module._parameters[name] = nn.Parameter(_like(p), p.requires_grad)
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = _like(buffer)
            Placement._spread(self, on_one_side(network), path)

    def _shard(self, network: nn.Module, scaling: Scaling, path: str | None) -> None:
        dtype = self.source.folder.compute_dtype
        shard_network(network, scaling.blocks(network), self._mesh, self.processes, self.options, dtype)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


def shortened(config: Config, folder: Path, blocks: int) -> Config:
    """The config over copies of its model folders whose networks have ``blocks`` blocks."""
    config = without_weights(config)
    shutil.copytree(config.model.path, folder / "model")
    for file in (folder / "model").glob("transformer*/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": blocks}))
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder / "model")})})


def measured(recipe: str, flags: list[str], world: int, blocks: int, steps: int) -> dict[str, Any]:
    """See :func:`fastvideo.tests.fake_cuda.take_steps`."""
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        config = shortened(parse(["--config", recipe, *flags])[1], Path(folder), blocks)
        live = _train(config, world, steps, Path(folder))
        dist.destroy_process_group()
        planned = Planner().plan(config, world)
    return {"live": live, "plan": _of_step(planned), "attention": dict(CALLS)}


def validated(recipe: str, prompts: int, frames: int) -> dict[str, int]:
    """See :func:`fastvideo.tests.fake_cuda.validate`."""
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model.num-frames", str(frames), "--parallel.shard", "1"]
        config = shortened(parse(["--config", recipe, *flags])[1], Path(folder), blocks=2)
        processes, mode, memory = Processes(device=CUDA), FakeMode(CUDA), LiveBytes("cuda")
        method = _method(config, processes, mode, memory)
        family = method.bundle["student"].adapter
        fake_codec(family, mode)
    _to_device(family.codec.vae, mode)
    family.conditioner.encode_prompts = lambda texts: fake_text(family.conditioner, len(texts))  # type: ignore
    wanted = Sampling([f"prompt {i}" for i in range(prompts)], SamplerSpec.student(method.ladder), 0, 1)
    found = dict[str, int]()
    with mode, memory, torch.no_grad():
        before = memory.peak = memory.live
        family.codec.decode(torch.empty(1, *family.codec.latent_shape, device=CUDA))
        found["decode"], memory.peak = memory.peak - before, memory.live
        SharedSampler(family, processes).videos(method.bundle["student"], wanted)
        found["peak"] = memory.peak - before
    return found


def _to_device(module: nn.Module, mode: FakeMode) -> None:
    with mode:
        for part in module.modules():
            for name, p in part.named_parameters(recurse=False):
                part._parameters[name] = nn.Parameter(_like(p), False)


def _of_step(plan: Plan) -> int:
    """What a plan says of roles and step alone."""
    return plan.stays - sum(plan.parts.values()) + plan.training


def _train(config: Config, world: int, steps: int, folder: Path) -> int:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    processes = Processes(0, world, CUDA, config.parallel.shard, config.parallel.context)
    FiniteCheck._read = lambda self: [0.0] * (2 + len(self.names))  # type: ignore[method-assign]
    Agreement.__init__ = lambda self: setattr(self, "_group", None)  # type: ignore[method-assign]
    mode, memory = FakeMode(CUDA), LiveBytes("cuda")
    _watch_resizing(memory)
    method = _method(config, processes, mode, memory)
    with mode, memory:
        memory.peak = memory.live  # networks were whole before they were split
        tracker = Tracker(folder, enabled=False)
        trainer = build_trainer(config, method.bundle["student"].adapter, method, tracker, processes)
        data = iter([_raw(config, method)] * (steps * config.trainer.grad_accumulation))
        for _ in range(steps):
            trainer.train_step(data)
    return memory.peak


def _watch_resizing(memory: LiveBytes) -> None:
    """Count what FSDP frees and allocates in place."""
    for name in ("alloc_storage", "free_storage"):
        plain = getattr(_fsdp_param, name)

        def resize(tensor: Tensor, plain: Callable[[Tensor], None] = plain) -> None:
            plain(tensor)
            memory.resized(tensor.untyped_storage())

        setattr(_fsdp_param, name, resize)


def _raw(config: Config, method: Method) -> RawBatch:
    """Prompts with stored embeddings, on the host."""
    conditioner, count = method.bundle["student"].adapter.conditioner, config.data.batch_size
    width = conditioner.stored_shapes["text_embedding"][-1] or 1
    text = torch.empty(count, conditioner.text_length or 1, width)
    return RawBatch(("a",) * count, None, {"text_embedding": text})


def _method(config: Config, processes: Processes, mode: FakeMode, memory: LiveBytes) -> Method:
    families = build_families(config, build_adapter(config, processes), processes)
    placements = {family: CudaPlacement(place, mode, memory) for family, place in families.placements.items()}
    with mode:
        for family in placements:
            family.conditioner.ensure_negative_conditioning(fake_text(family.conditioner, 1))
    return build_on(config, replace(families, placements=placements), processes, rng=Streams())
