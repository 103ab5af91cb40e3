"""Fake tensors that stand for a run's: shapes without memory, what is alive of them, and worst-case decisions."""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from fastvideo.data.trajectories import state_times
from fastvideo.distillation.abilities import of_folder, of_frames, of_texts
from fastvideo.distillation.adapters.base import Conditioner
from fastvideo.distillation.adapters.diffusers.codec import DiffusersCodec, latent_space
from fastvideo.distillation.adapters.diffusers.folder import block_classes
from fastvideo.distillation.builder import Adapter, Config, Families, Method, build_adapter, build_families, build_on
from fastvideo.distillation.bundle import RoleHandle, same_space
from fastvideo.distillation.config.base import MethodConfig
from fastvideo.distillation.config.causal import reach_of, streaming, uses_switches
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.placement import EmptyPlacement, Placement
from fastvideo.distillation.experts import Experts, networks_of
from fastvideo.distillation.registry import load_method
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.trajectory import Trajectory
from fastvideo.distillation.types import Batch, Condition, RawBatch, UserError

ASKED, NEGATED = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.bitwise_not.default
PICKED, NEW = torch.ops.aten.index.Tensor, torch.ops.aten.new_empty.default


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive, and the most there were at once.

    Args:
        device: type of the devices that count; all by default.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self._device = device
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(tensor.untyped_storage()) for tensor in _held((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _held(out):
            if id(tensor.untyped_storage()) not in given and self._device in (None, tensor.device.type):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known[storage] = size = [0]
        weakref.finalize(storage, self._drop, size)
        self.resized(storage)

    def resized(self, storage: Any) -> None:
        """Count a known storage anew, whose size was changed in place, which no operator tells."""
        if (size := self._known.get(storage)) is not None:
            now = int(storage.nbytes())
            self.live += now - size[0]
            size[0] = now
            self.peak = max(self.peak, self.live)

    def _drop(self, size: Sequence[int]) -> None:
        self.live -= size[0]


def _held(values: Any) -> Iterator[Tensor]:
    """Tensors with memory of their own: of a split one, this process's part. Operators nest tuples, lists and dicts."""
    if isinstance(values, FakeTensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _held(value)
    elif isinstance(values, dict):
        yield from _held(list(values.values()))
    elif is_traceable_wrapper_subclass(values):
        yield from _held([getattr(values, name) for name in values.__tensor_flatten__()[0]])
    elif isinstance(values, Tensor):
        yield values


class WorstCase(RandomStreams):
    """Decisions that change which forwards run are taken as given: the last of the choices, or the first.

    What a step does grows by the same with each choice, so that its mean is one of the two, weighed by :attr:`share`.
    """

    longest = True
    place = 0.5
    """Mean of the latest choice's distribution, from 0, the first of the choices, to 1, the last."""

    @property
    def share(self) -> float:
        """Weight of the choice that is taken."""
        return self.place if self.longest else 1 - self.place

    def shared_index(self, high: int) -> int:
        return high - 1 if self.longest else 0

    def shared_uniform(self) -> float:
        return 1.0 - 2**-24 if self.longest else 0.0

    def shared_choice(self, shares: Sequence[float]) -> int:
        last = len(shares) - 1
        if last:
            self.place = sum(index * share for index, share in enumerate(shares)) / sum(shares) / last
        return self.shared_index(len(shares))

    def positions(self, count: int) -> Tensor:
        return torch.empty(count, device=self.device)


class FakeMode(FakeTensorMode):
    """Fake tensors of one device, in forward-mode derivatives too.

    There torch makes tensors on the meta device, to get at their shapes or because C++ sees the meta tensor inside a
    fake one, and mixes them with the others. What is asked of a mask's values, which there are not, is answered for a
    full one: it picks all, its negation nothing, and no branch is taken.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._device = torch.device(device)
        self._negated = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Operators take devices by name or place, never inside a list: a look at each is a third of the time of a tree.
        args = tuple(self._here(value) if isinstance(value, torch.device) else value for value in args)
        named = {n: self._here(v) if isinstance(v, torch.device) else v for n, v in (kwargs or {}).items()}
        if func is ASKED and args[0].dtype == torch.bool:
            return False
        if func is PICKED and args[1] and args[1][0] is not None and args[1][0].dtype == torch.bool:
            mask: Tensor = args[1][0]
            count = 0 if mask in self._negated else mask.numel()
            func, args = NEW, (args[0], [count, *args[0].shape[mask.ndim :]])
        out = super().__torch_dispatch__(func, types, args, named)
        if func is NEGATED:
            self._negated[out] = True
        for tensor in _held(out):
            if isinstance(tensor, FakeTensor):
                tensor.fake_device = self._here(tensor.fake_device)
        return out

    def _here(self, device: torch.device) -> torch.device:
        return self._device if device.type == "meta" else device


class FakePlacement(EmptyPlacement):
    """Makes networks of fake tensors on the CPU.

    Args:
        real: the placement of the run.
        mode: of the tensors.
        depth: number of repeated blocks to keep; all without it.
        gathered: trained parameters have the compute dtype, as those of a split network do while they are whole.
    """

    def __init__(self, real: Placement, mode: FakeTensorMode, depth: int | None, gathered: bool) -> None:
        super().__init__(real.source, real.processes, real.options)
        self.mode, self.depth, self.gathered, self.made = mode, depth, gathered, list[nn.Module]()

    def _new(self, path: str | None, dtype: torch.dtype) -> nn.Module:
        network = super()._new(path, self.source.folder.compute_dtype if self.gathered else dtype)
        for one in networks_of(network) if self.depth is not None else ():
            for blocks in stacks(one):
                del blocks[self.depth :]
        return on_one_side(network)

    def _spread(self, network: nn.Module, path: str | None) -> None:
        super()._spread(network, path)
        self.made.append(fake_network(network, self.mode))


def on_one_side(network: nn.Module) -> nn.Module:
    """The network, whose experts take every sample for noisy: fake times have no values to choose by."""
    if isinstance(network, Experts):
        network.assumed_side = True
    return network


def stacks(network: Any) -> list[nn.ModuleList]:
    """The list of a network's repeated blocks that are alike, the one with most of its parameters, and all lists of as
    many such blocks: a UNet has several at its coarsest level.

    Where no list is alike throughout (Stable Diffusion 3's last block lacks parts) it is one of blocks of one class.
    """
    names = block_classes(network)
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList) and _of_one_class(m, names)]
    shapes = {m: [tuple(p.shape for p in block.parameters()) for block in m] for m in lists}
    alike = [m for m in lists if len(set(shapes[m])) == 1]
    largest = max(alike or lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    return [m for m in lists if shapes[m] == shapes[largest]]


def _of_one_class(blocks: nn.ModuleList, names: Container[str]) -> bool:
    """True for blocks of one of the classes ``names``: a UNet's levels are of several."""
    kinds = {type(block).__name__ for block in blocks}
    return len(kinds) == 1 and next(iter(kinds)) in names


def fake_network(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The network with fake tensors for its own."""
    with mode:
        for module in network.modules():
            for name, p in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return network


@dataclass(frozen=True)
class FakeRun:
    """A run's real method over fake tensors; use it inside :attr:`mode`."""

    config: Config
    processes: Processes
    families: Families
    method: Method
    mode: FakeTensorMode
    times: Tensor | None = None
    """Times ``[B, K]`` of a teacher's stored states, with numbers, for a method that trains on them."""

    @property
    def conditioners(self) -> dict[str, Conditioner]:
        """One conditioner per kind of condition, the student's first."""
        families = (self.families.main, *self.families.placements)
        return {family.conditioner.key: family.conditioner for family in families}

    def placement(self, handle: RoleHandle) -> FakePlacement | None:
        """The placement that made a role's network; ``None`` for the method's own networks, which are never split."""
        placement = self.families.placement(handle.name)
        return placement if isinstance(placement, FakePlacement) and handle.network in placement.made else None

    def bridged(self, role: str) -> bool:
        """True for a role whose latent space is not the student's."""
        return self.method.bundle.bridge("student", role) is not same_space

    def batch(self) -> Batch:
        """One micro-batch, with latents if the method trains on them."""
        config, conditioners, shape = self.config, self.conditioners.values(), self.families.main.codec.latent_shape
        latents = torch.empty(config.data.batch_size, *shape)
        texts = [fake_text(each, len(latents)) for each in conditioners]
        first = [_fake_first_frames(each, latents) for each in conditioners if of_frames(each).needs_frames]
        negative = [each.negative(len(latents)) for each in conditioners]
        method, condition = load_method(config.distill_method), reduce(or_, [*texts, *first])
        states = None if self.times is None else torch.empty(*self.times.shape, *shape)
        return Batch(
            shape=tuple(latents.shape),
            condition=condition,
            negative=reduce(or_, [*negative, *first]),
            x0=latents if method.uses_latents(config.method) else None,
            trajectory=None if self.times is None or states is None else Trajectory(states, self.times),
            switch=condition if uses_switches(config.method) else None,
        )


def fake_run(
    config: Config, processes: Processes | None = None, *, depth: int | None = None, gathered: bool = False
) -> FakeRun:
    """Build a run over fake tensors; its model paths are folders with config files.

    Args:
        depth, gathered: as for :class:`FakePlacement`.

    Raises:
        UserError: as the builder does, and for a family whose networks are nothing without their weights.
    """
    processes, mode = processes or Processes(), FakeMode()
    real = build_families(config, build_adapter(config, processes), processes)
    if any(family.scaling is None for family in real.placements):
        raise UserError(f"plan: {config.distill_model} has no networks whose size is worth a plan")
    placements = {family: FakePlacement(place, mode, depth, gathered) for family, place in real.placements.items()}
    for family in placements:
        if len(placements) > 1 or reach_of(config.method) is not None:
            fake_codec(family, mode)
        with mode:
            family.conditioner.ensure_negative_conditioning(fake_text(family.conditioner, 1))
    families = replace(real, placements=placements)
    method = build_on(_without_files(config), families, processes, rng=WorstCase(config.seed))
    run = FakeRun(config, processes, families, method, mode, _walked(config, method))
    for handle in method.bundle:
        if run.placement(handle) is None:
            fake_network(handle.network, mode)
    return run


def _walked(config: Config, method: Method) -> Tensor | None:
    if not method.needs_trajectories:
        return None
    kind, *_ = config.method.trajectory_kinds
    return torch.tensor(state_times(config, kind)).expand(config.data.batch_size, -1)


def _without_files(config: Config) -> Config:
    """The config without weights to start from, nor what they were trained for, and without torchao, which is not
    needed to count its states."""
    roles = {name: role.without_start().model_copy(update={"loras": ()}) for name, role in config.roles.items()}
    trainer = config.trainer.model_copy(update={"optimizer_states": "float32"})
    return config.model_copy(update={"roles": roles, "trainer": trainer, "method": _trusting(config)})


def _trusting(config: Config) -> MethodConfig:
    """The method's options with every term of the loss in it from the first step, and teachers taken as they come."""
    trusted: dict[str, Any] = {}
    if (own := streaming(config.method)) is not None and own.autoregressive_roles:
        trusted["allow_bidirectional_teacher"] = True
    if "frame_warmup_steps" in type(config.method).model_fields:
        trusted |= {"frame_warmup_steps": 0, "trust_frame_teacher": True}
    return config.method.model_copy(update=trusted)


def fake_codec(family: Adapter, mode: FakeTensorMode) -> None:
    """Give a family a VAE without weights, which a bridge between latent spaces or a stream's window runs.

    The shapes of its encoder and its normalisation tell its latent space from others.
    """
    if isinstance(family.codec, DiffusersCodec):
        vae: Any = of_folder(family.folder).frozen_parts()["VAE"]
        family.codec.vae = fake_network(family.codec.ready(vae.eval().requires_grad_(False)), mode)
        options, weights = latent_space(family.codec.pipeline.vae_config, vae)
        family.codec.latent_key = repr((options, [(name, tuple(value.shape)) for name, value in weights.items()]))


def fake_text(conditioner: Conditioner, count: int) -> Condition:
    """The condition of ``count`` prompts."""
    width = of_texts(conditioner).stored_shapes["text_embedding"][-1]
    stored = torch.empty(count, conditioner.text_rows, width or 1)
    return conditioner.text_of(RawBatch(("",) * count, None, {"text_embedding": stored}))


def _fake_first_frames(conditioner: Conditioner, latents: Tensor) -> Condition:
    count = len(latents)
    shapes = {name: [size or 1 for size in shape] for name, shape in of_texts(conditioner).stored_shapes.items()}
    extras = {name: torch.empty(count, *shape) for name, shape in shapes.items()}
    return of_frames(conditioner).first_frames_of(RawBatch(("",) * count, latents, extras))


def drop_gradients(method: Method) -> None:
    """Free each gradient at once, as reduce-scatter does: what stays of it is counted with its role."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for handle in method.bundle:
        for parameter in handle.parameters():
            parameter.register_post_accumulate_grad_hook(drop)


@contextmanager
def one_thread() -> Iterator[None]:
    """Kernels chosen by the number of threads must not differ between a laptop and a server."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
