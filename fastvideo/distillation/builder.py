"""Config -> roles -> handles -> method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastvideo.distillation.abilities import of_folder, of_frames
from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.adapters.diffusers.single_file import is_quantised
from fastvideo.distillation.adapters.export.lora import read_lora
from fastvideo.distillation.bridge import bridge_between
from fastvideo.distillation.bundle import Bridge, ModelBundle, RoleHandle, check_roles, same_space
from fastvideo.distillation.chunks import STREAMING
from fastvideo.distillation.config.base import MethodConfig, OptimizerConfig
from fastvideo.distillation.config.causal import StreamOptions, streaming
from fastvideo.distillation.config.reading import SIZES, family_of
from fastvideo.distillation.config.schema import LoRAConfig, MergedLoRA, RunConfig
from fastvideo.distillation.config.sections import AdapterConfig
from fastvideo.distillation.engine.checkpoint.initial import start_from
from fastvideo.distillation.engine.ema import keep_averages
from fastvideo.distillation.engine.lora import AdapterSwitch, Merge, merge_file, parameter_shapes, start_adapter
from fastvideo.distillation.engine.optional.footprint import check_memory
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.parallel.sharding import includes, is_trained
from fastvideo.distillation.engine.placement import EmptyPlacement, Placement, check_tokens
from fastvideo.distillation.engine.runtime import Averages
from fastvideo.distillation.engine.training import attach_optimizer, check_states
from fastvideo.distillation.expert_checks import check_experts
from fastvideo.distillation.experts import boundary_of, idle_expert_of
from fastvideo.distillation.features import ReadsFeatures
from fastvideo.distillation.frame_bridge import ScoresFrames
from fastvideo.distillation.frame_roles import frame_bridge
from fastvideo.distillation.lora_file import LoRAFile
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Config, DMD2Method
from fastvideo.distillation.quantised_roles import check_quantised, load_quantised, sizes_of
from fastvideo.distillation.registry import ADAPTERS, METHODS, load_adapter, load_exporter, load_method
from fastvideo.distillation.rng import RandomStreams, stream_seed
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.stream_recipe import streaming_of
from fastvideo.distillation.types import Need, UserError
from fastvideo.stopping import unit_done

Adapter = DistillAdapter[Any]
Method = DistillMethod[Any]
Config = RunConfig[Any, Any]
ROUNDING = 1e-4
"""Difference of two times that are one, of which a config writes four digits."""


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """Put the config's key before what is wrong with its value, unless the message names a role's key already."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(error).startswith("roles.") else f"{key}: {error}") from error


def build_adapter(config: Config, processes: Processes | None = None) -> Adapter:
    """The family of the config, on this process's device; no network is loaded yet."""
    processes = processes or Processes()
    family = load_adapter(config.distill_model)
    return family(config.model, processes.device, whole_forwards=processes.forward_together)


def lacks(config: MethodConfig, method: type[Method], family: type[Adapter]) -> list[Need]:
    """Needs of a method with these options that a model family does not meet, in alphabetic order."""
    return sorted(method.needs_of(config) - family.supports)


def check_needs(config: Config) -> None:
    """Check that the family gives what the method needs.

    Raises:
        UserError: with what is lacking, and what would work instead.
    """
    method, name = load_method(config.distill_method), config.distill_model
    own = [role for role in method.flow_maps_of(config.method) if config.roles[role].model is None]
    lacking = [need for need in lacks(config.method, method, load_adapter(name)) if need != "flow_map" or own]
    if not lacking:
        return
    fitting = [other for other in ADAPTERS if not lacks(config.method, method, load_adapter(other))]
    methods = [
        other for other in METHODS if not lacks(load_method(other).Config(), load_method(other), load_adapter(name))
    ]
    hint = "set method.jvp: central_difference; " if "jvp" in lacking else ""
    hint += "leave method.critic_sees_rung out; " if "flow_map" in lacking and "critic" in own else ""
    raise UserError(
        f"{config.distill_method} needs {' and '.join(lacking)} of the model family, which {name} does not have: {hint}"
        f"families that do: {', '.join(fitting) or 'none'}; methods that run on {name}: {', '.join(methods) or 'none'}"
    )


@dataclass(frozen=True)
class Families:
    """Families of a run's roles, and the place of their networks on this process.

    Attributes:
        main: the run's own, which is the student's.
        by_role: the family of each role; roles with equal sections share one.
        placements: of each family's networks.
    """

    main: Adapter
    by_role: Mapping[str, Adapter]
    placements: Mapping[Adapter, Placement]

    def placement(self, role: str) -> Placement:
        """Placement of the networks of a role's family."""
        return self.placements[self.by_role[role]]

    def roles_of(self, family: Adapter) -> list[str]:
        """Names of the roles of one family."""
        return [role for role, own in self.by_role.items() if own is family]


def build_families(config: Config, main: Adapter, processes: Processes) -> Families:
    """One adapter and one placement per distinct family section of the roles; no network is loaded yet.

    Raises:
        UserError: for an unknown family, options that it does not take, or a layout that it does not support.
    """
    made: dict[tuple[str, AdapterConfig], Adapter] = {(config.distill_model, config.model): main}
    by_role = {}
    for role in config.roles:
        name, options = key = family_of(config, role)
        if key not in made:
            made[key] = load_adapter(name)(options, main.device, whole_forwards=processes.forward_together)
        by_role[role] = made[key]
    placements = {family: Placement(family, processes, config.parallel) for family in made.values()}
    return Families(main, by_role, placements)


def build_bridges(
    config: Config, method: type[Method], families: Families
) -> tuple[dict[tuple[str, str], Bridge], list[str]]:
    """Bridges from the student's latent space to those of the other roles, and lines about them.

    Raises:
        UserError: if the method, or a model that goes on from frames, cannot cross latent spaces, or if teacher and
            critic do not share one.
    """
    main, bridges, notes = families.main, dict[tuple[str, str], Bridge](), list[str]()
    use = method.frames_of(config.method) if issubclass(method, ScoresFrames) else None
    if use is not None:
        recompute = config.parallel.activation_checkpointing != "none"
        to_frames, note = frame_bridge(use, main, families.by_role, recompute=recompute)
        bridges |= {("student", role): to_frames for role in use.roles}
        notes.append(note)
    rest = [role for role in families.by_role if use is None or role not in use.roles]
    others = {role: families.by_role[role] for role in rest if families.by_role[role] is not main}
    for family in dict.fromkeys(others.values()):
        roles = [name for name in others if others[name] is family]
        role = roles[0]
        if main.codec.latent_key != family.codec.latent_key:
            _check_one_tensor(role, main, family)
        bridge, note = bridge_between(main.codec, family.codec, roles)
        notes.append(note)
        if bridge is same_space:
            continue
        if not method.bridges or of_frames(main.conditioner).needs_frames:
            why = "conditioning frames" if method.bridges else f"samples of {method.__name__}"
            raise UserError(f"roles.{role}.model: its latent space is not the student's, and {why} stay in one")
        _check_sizes(role, main.config, family.config)
        bridges |= {("student", name): bridge for name in roles}
    scoring = [family for role, family in families.by_role.items() if role in ("teacher", "critic")]
    if others and len({family.codec.latent_key for family in scoring}) > 1:
        raise UserError(
            "roles.critic.model: teacher and critic score the same samples, so they need one latent space; give the "
            "critic the teacher's model section"
        )
    return bridges, notes


def _check_one_tensor(role: str, *families: Adapter) -> None:
    """A bridge is one of pixels: what is beside them cannot cross it."""
    for parts in (family.codec.parts for family in families):
        if parts is not None:
            raise UserError(f"roles.{role}.model: {parts} cross to no other latent space: leave out `model`")


def _check_sizes(role: str, own: AdapterConfig, other: AdapterConfig) -> None:
    """A bridge takes pixels as they come: both families make videos of one size."""
    sizes = dict(own)
    wrong = {name: size for name, size in other if name in SIZES and sizes.get(name, size) != size}
    if "num_frames" in wrong and "num_frames" in other.own_sizes:
        raise UserError(
            f"roles.{role}.model: it makes stills, and the student videos of {sizes['num_frames']} frames: "
            f"distill_method: dmd2_frames takes it as frame_teacher and frame_critic, beside a teacher of videos"
        )
    for name, size in wrong.items():
        raise UserError(f"roles.{role}.model: {name} is {size}, the student's is {sizes[name]}; give both one")


def load_role(config: Config, families: Families, role: str) -> nn.Module:
    """The network of a role as training starts with it: some methods make flow maps of some."""
    options, flow_maps = config.roles[role], load_method(config.distill_method).flow_maps_of(config.method)
    change = of_folder(families.by_role[role].folder).add_flow_map if role in flow_maps else None
    if options.trainable and not options.lora and is_quantised(options.path):
        raise UserError(
            f"roles.{role}.path: {options.path} holds fp8 weights, which are read for frozen roles and as the base of "
            f"adapters; give the weights in full precision to train them, or add `lora`"
        )
    family, placement = families.by_role[role], families.placement(role)
    if options.storage is not None:
        return load_quantised(config, family, placement, role, partial(merge_files, config, family, role))
    with nullcontext() if options.path is None else _naming(f"roles.{role}.path"):
        network = placement.load(options.path, trained=options.trainable, change=change)
    merge_files(config, family, role, network)
    return network


def merge_files(config: Config, family: Adapter, role: str, network: nn.Module) -> None:
    """Merge a role's LoRA files into its network.

    Raises:
        UserError: as :func:`merges_of`.
    """
    for file, weight in merges_of(config, family, role, network):
        merge_file(network, file, weight)


def merges_of(config: Config, family: Adapter, role: str, network: nn.Module) -> tuple[Merge, ...]:
    """Files that are merged into a role's network, with their weights.

    Raises:
        UserError: for one that cannot be read or does not fit.
    """
    found = []
    for index, lora in enumerate(config.roles[role].loras):
        file = _read_lora(f"roles.{role}.loras[{index}].path", lora.path, family, network)
        found.append((file, lora.weight))
    return tuple(found)


def _read_lora(key: str, path: str, family: Adapter, network: nn.Module) -> LoRAFile:
    with _naming(key):
        return read_lora(Path(path), parameter_shapes(network), load_exporter(family.config))


def shared_networks(config: Config, families: Families) -> dict[str, AdapterSwitch]:
    """The roles that train an adapter, and the frozen ones over the same weights: one network per family and path.

    Raises:
        UserError: if an adapter does not fit, or the method changes that role's network itself.
    """
    method, switches = load_method(config.distill_method), dict[str, AdapterSwitch]()
    adapted = {name: role.lora for name, role in config.roles.items() if role.lora is not None}
    for role in method.flow_maps_of(config.method):
        if role in adapted:
            raise UserError(f"roles.{role}.lora: {config.distill_method} adds a part to the {role} and trains it whole")
    for base in dict.fromkeys(_base_of(config, families, name) for name in adapted):
        sharing = [name for name in families.roles_of(base[0]) if _base_of(config, families, name) == base]
        adapters = {name: lora for name, lora in adapted.items() if name in sharing}
        switches |= _share(config, families, sharing, adapters)
    return switches


def _bases(config: Config, families: Families) -> dict[str, str]:
    """A role that trains an adapter over the same weights, of each frozen role that shares them."""
    adapted = {_base_of(config, families, name): name for name, role in config.roles.items() if role.lora is not None}
    frozen = {name: _base_of(config, families, name) for name, role in config.roles.items() if not role.trainable}
    return {name: adapted[base] for name, base in frozen.items() if base in adapted}


def _base_of(config: Config, families: Families, role: str) -> tuple[Adapter, str | None, tuple[MergedLoRA, ...]]:
    """Equal for roles whose networks have the same weights."""
    options = config.roles[role]
    return families.by_role[role], options.path, options.loras


def _share(
    config: Config, families: Families, sharing: Sequence[str], adapters: Mapping[str, LoRAConfig]
) -> dict[str, AdapterSwitch]:
    """Switches of the roles over one network, with the adapters of those that train one."""
    first = next(iter(adapters))
    family, path = families.by_role[first], config.roles[first].path

    def start(network: nn.Module) -> None:
        for role, lora in adapters.items():
            if lora.init_from is not None:
                key = f"roles.{role}.lora.init_from"
                start_adapter(network, role, _read_lora(key, lora.init_from, family, network))

    with nullcontext() if path is None else _naming(f"roles.{first}.path"):
        network = families.placements[family].load_shared(path, adapters, config.seed, start)
    merged = merges_of(config, family, first, network)
    for file, weight in merged:
        merge_file(network, file, weight)
    own = [name for name in sharing if name in adapters or not config.roles[name].trainable]
    return {name: AdapterSwitch(network, name if name in adapters else None, path, merged) for name in own}


def build_method(
    config: Config,
    adapter: Adapter,
    processes: Processes | None = None,
    networks: Mapping[str, nn.Module] | None = None,
) -> Method:
    """Roles, handles with their optimizers, random streams and the method on top.

    Args:
        config: the run.
        adapter: the run's own family; those that roles name for themselves are made here.
        processes: this process among all.
        networks: networks by role, instead of loading or building them.

    Raises:
        UserError: if the roles or families are not what the method needs; nothing is loaded then.
    """
    processes = processes or Processes()
    return build_on(config, build_families(config, adapter, processes), processes, networks)


def build_on(
    config: Config,
    families: Families,
    processes: Processes,
    networks: Mapping[str, nn.Module] | None = None,
    rng: RandomStreams | None = None,
) -> Method:
    """:func:`build_method` on families whose networks come from their placements, such as ones without weights.

    Args:
        rng: replaces the run's random streams.

    Raises:
        UserError: as :func:`build_method`.
    """
    method = load_method(config.distill_method)
    optimizers = method.optimizers(config.method)
    check_run(config, families, processes, optimizers)
    with initialising(config.seed):
        heads = method.heads(config.method, families.by_role)
    _check_heads(config, heads)
    _check_memory(config, families, processes, heads)
    bridges, crossings = build_bridges(config, method, families)
    for family in families.placements:
        family.ensure_negative_conditioning()
    switches = {} if networks else shared_networks(config, families)
    handles, notes = [], []
    for name, role in config.roles.items():
        unit_done()
        handles.append(_handle(config, families, name, {**heads, **(networks or {})}, switches))
        handles[-1].boundary, handles[-1].is_head = boundary_of(handles[-1].network), name in heads
        if role.init_from is not None:
            load = families.by_role[name].folder.load_network
            notes.append(start_from(handles[-1], role.init_from, load, processes))
        if name in optimizers:
            attach_optimizer(handles[-1], optimizers[name], config.trainer.optimizer_states)
    rank, ranks = processes.data_rank, processes.data_size
    rng = rng or RandomStreams(config.seed, rank=rank, ranks=ranks, device=processes.device)
    built = method(config.method, ModelBundle(handles, bridges), Ladder(config.ladder.times), rng)
    built.notes = (*notes, *crossings, *_noise_notes(config, families), *built.notes)
    return built


@contextmanager
def initialising(seed: int) -> Iterator[None]:
    """Derive the first weights of networks made inside from ``seed``; torch's global state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "heads"))
        yield


def check_run(
    config: Config, families: Families, processes: Processes, optimizers: Mapping[str, OptimizerConfig]
) -> None:
    """Check roles, families, layout and optimizers before anything is loaded.

    Raises:
        UserError: for the first that does not fit.
    """
    method = load_method(config.distill_method)
    trainable = {name: role.trainable for name, role in config.roles.items()}
    roles = (*method.trainable_roles, *method.frozen_roles)
    check_roles(trainable, roles, method.trainable_roles, method.optional_roles)
    check_needs(config)
    _check_needs_of_others(config, families)
    _check_paths(config, families)
    _check_rungs(config)
    _check_first_time(config, families)
    check_experts(config, families.by_role, processes)
    check_quantised(config, method, families.by_role, families.placements, _bases(config, families))
    _check_backbone(config, families)
    _check_averages(config, trainable)
    for family in families.placements:
        paths = {name: config.roles[name].path for name in families.roles_of(family)}
        check_tokens(family, processes, paths, [family.codec.latent_shape])
        of_folder(family.folder).check_kernels(trained=any(trainable[name] for name in paths))
    _check_guidance(config, families)
    _check_derivatives(config, families.main, processes)
    _check_reach(config, families, processes)
    check_states(config.trainer.optimizer_states, optimizers)


def _check_paths(config: Config, families: Families) -> None:
    """Find the folders of roles with a path of their own."""
    for role, options in config.roles.items():
        if options.path is not None:
            with _naming(f"roles.{role}.path"):
                of_folder(families.by_role[role].folder).recipe_of(options.path)


def _check_guidance(config: Config, families: Families) -> None:
    for role, key in (("teacher", "teacher_guidance"), ("frame_teacher", "frame_guidance")):
        guidance, family = dict(config.method).get(key), families.by_role.get(role, families.main)
        if guidance is not None:
            with _naming(f"method.{key}"):
                of_folder(family.folder).check_guidance(guidance)


def _check_needs_of_others(config: Config, families: Families) -> None:
    method = load_method(config.distill_method)
    needs, flow_maps = method.needs_of(config.method), method.flow_maps_of(config.method)
    for role, family in families.by_role.items():
        needed = needs & ({"features", "flow_map"} if role in flow_maps else {"features"})
        if family is not families.main and (lacking := needed - family.supports):
            name = family_of(config, role)[0]
            raise UserError(
                f"roles.{role}.model.family: {config.distill_method} needs {' and '.join(sorted(lacking))}, "
                f"which {name} does not have"
            )


def _check_rungs(config: Config) -> None:
    if "critic" in load_method(config.distill_method).flow_maps_of(config.method) and len(config.ladder.times) == 1:
        raise UserError(
            "method.critic_sees_rung: a ladder of one step makes samples of one kind, and the critic could be told "
            "nothing; leave it out"
        )


def _check_first_time(config: Config, families: Families) -> None:
    """Refuse to train a student at a time above its family's levels, from which stock samplers would not start."""
    first, noisiest = config.ladder.times[0], of_folder(families.main.folder).noisiest
    if load_method(config.distill_method).makes_teachers or first <= noisiest + ROUNDING:
        return
    fitting = load_exporter(config.model).stock_sampler(config.ladder.times, "renoise").times
    raise UserError(
        f"ladder.times (or steps, count): they start at {first:g}, and the noisiest level of {config.distill_model} is "
        f"{noisiest:.4f}, from which stock diffusers samples: take its levels, those of `fastvideo schedule stock`: "
        f"ladder: {{times: [{', '.join(f'{t:.6f}' for t in fitting)}]}}"
    )


def _noise_notes(config: Config, families: Families) -> list[str]:
    """A line about scores at times above the levels of the networks that give them."""
    found, scoring = dict(config.method).get("score_time_range"), families.by_role.get("teacher", families.main)
    noisiest = of_folder(scoring.folder).noisiest
    if found is None or found[1] <= noisiest + ROUNDING:
        return []
    return [
        f"method.score_time_range ends at {found[1]:g}, and the noisiest level of the teacher is {noisiest:.4f}: the "
        f"times above are scored as that level; end the range there or below"
    ]


def _check_backbone(config: Config, families: Families) -> None:
    """Refuse other blocks than the family's own in a role whose features are read: heads are made for those."""
    if not isinstance(config.method, ReadsFeatures):
        return
    role = config.method.backbone
    family, path = families.by_role[role], config.roles[role].path
    if path is None or family.scaling is None:
        return
    empty, blocks = of_folder(family.folder).empty, family.scaling.blocks
    sizes = [[p.shape for b in blocks(empty(at, torch.float32)) for p in b.parameters()] for at in (None, path)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"roles.{role}.path: {path} has blocks of another number or size than {family.config.path}, for which the "
            f"discriminator on the features of the {role} is made; give a pipeline folder of its own instead: "
            f"roles.{role}.model: {{family: {family_of(config, role)[0]}, path: FOLDER}}"
        )


def _check_heads(config: Config, heads: Mapping[str, nn.Module]) -> None:
    for name in heads:
        if config.roles[name].path is not None or config.roles[name].model is not None:
            raise UserError(
                f"roles.{name}.path: {config.distill_method} makes this network itself; leave path and model out"
            )


def _check_memory(config: Config, families: Families, processes: Processes, heads: Mapping[str, nn.Module]) -> None:
    """Check that a device holds what the roles keep on it, on networks without weights; heads are not counted.

    Raises:
        UserError: with each role's need, and the ``parallel.shard`` that would fit.
    """
    if processes.memory is None or any(family.scaling is None for family in families.placements):
        return
    empty = replace(families, placements={f: EmptyPlacement.of(own) for f, own in families.placements.items()})
    with initialising(config.seed):
        switches = shared_networks(config, empty)
        handles = [_handle(config, empty, name, {}, switches) for name in config.roles if name not in heads]
    on_device = [handle for handle in handles if not includes(config.parallel.offload, is_trained(handle.network))]
    packed = {name: sizes_of(config, handle, families.by_role[name]) for handle in on_device if (name := handle.name)}
    idle = idle_expert_of(load_method(config.distill_method), config.method)
    check_memory(on_device, processes, config.trainer.optimizer_states, packed, idle)


def _handle(
    config: Config,
    families: Families,
    name: str,
    made: Mapping[str, nn.Module],
    switches: Mapping[str, AdapterSwitch],
) -> RoleHandle:
    """One role over a network that is made already, shared with other roles, or loaded."""
    trainable, family = config.roles[name].trainable, families.by_role[name]
    if name in switches and name not in made:
        switch = switches[name]
        return RoleHandle(name, family, switch.network, trainable, select=switch, trained=switch.parameters())
    network = made[name].to(family.device) if name in made else load_role(config, families, name)
    return RoleHandle(name, family, network, trainable)


def _check_derivatives(config: Config, family: Adapter, processes: Processes) -> None:
    if "jvp" not in load_method(config.distill_method).needs_of(config.method):
        return
    if family.folder.compute_dtype != torch.float32 and (reason := _rounded_student(config, processes)):
        raise UserError(
            f"model.precision: {config.distill_method} takes derivatives of the student in float32, and with {reason} "
            f"its weights are {config.model.precision}; set model.precision: float32, or method.jvp: central_difference"
        )
    if processes.context > 1:
        raise UserError(
            f"parallel.context: {config.distill_method} takes forward-mode derivatives, which attention over several "
            f"processes does not have; set method.jvp: central_difference, or parallel.context: 1"
        )


def _check_reach(config: Config, families: Families, processes: Processes) -> None:
    """A student that generates chunk by chunk needs chunks, a ladder from pure noise, and whole samples."""
    own, name = streaming(config.method), config.distill_method
    if own is None:
        return
    if processes.context > 1:
        raise UserError(
            f"parallel.context: {name} attends chunk by chunk, which attention over several processes does not do; set "
            f"parallel.context: 1, and parallel.shard for memory"
        )
    if frames := max(of_frames(families.main.conditioner).first_frames):
        raise UserError(
            f"method.reach: this model goes on from given frames ({frames}), and streams have text alone in their "
            f"condition; leave out model.given_frames, or take a text-to-video model"
        )
    own.check_frames(families.main.codec.latent_shape[1])
    _check_autoregressive(config, own, families)
    for role in ("student", *_autoregressive(config, own)):
        _check_trained(config, own, role, of_folder(families.by_role[role].folder).recipe_of(config.roles[role].path))
    if not load_method(name).makes_teachers and config.ladder.times[0] < 1.0:
        raise UserError(f"ladder.times: every chunk starts from pure noise, 1.0, and not from {config.ladder.times[0]}")


def _autoregressive(config: Config, own: StreamOptions) -> tuple[str, ...]:
    """Roles of this run that continue a past as the student does."""
    return tuple(role for role in own.autoregressive_roles if role in config.roles)


def _check_autoregressive(config: Config, own: StreamOptions, families: Families) -> None:
    """Refuse a teacher that has only seen whole videos where one is needed that continues a past."""
    for role in () if own.trusts_teachers else _autoregressive(config, own):
        options = config.roles[role]
        if options.init_from is None and STREAMING not in of_folder(families.by_role[role].folder).recipe_of(
            options.path
        ):
            raise UserError(
                f"roles.{role}.path: {options.path or config.model.path} makes whole videos at once (its recipe.json "
                f"has no `{STREAMING}`), and {config.distill_method} needs a {role} that generates chunk by chunk: "
                f"train one with causal_sft, or set method.allow_bidirectional_teacher: true if it is one"
            )


def _check_trained(config: Config, own: StreamOptions, role: str, recipe: Mapping[str, Any]) -> None:
    """Refuse weights of chunks of another length, and a teacher that never saw as much noise on a past."""
    if STREAMING not in recipe or config.roles[role].init_from is not None:
        return
    assert own.reach is not None, "these are options of a stream"
    path, chunk = config.roles[role].path or config.model.path, own.reach.chunk
    with _naming(f"roles.{role}.path {path}"):
        known = streaming_of(recipe)
    if (trained := known["reach"].chunk) != chunk:
        raise UserError(
            f"method.reach.chunk: {chunk}, but roles.{role}.path {path} was trained on chunks of {trained} (its "
            f"recipe.json says so); set method.reach.chunk: {trained}"
        )
    if role != "student" and own.context_time > (most := known["context_time"]):
        raise UserError(
            f"method.context_time: {own.context_time:g}, but roles.{role}.path {path} was trained with noise up to "
            f"{most:g} on its past (its recipe.json says so); set {most:g} at most"
        )


def _rounded_student(config: Config, processes: Processes) -> str | None:
    """The option by which a student computes with weights of the run's precision, if it is not with float32 ones."""
    if processes.shard > 1:
        return f"parallel.shard {processes.shard}"
    return "roles.student.lora" if config.roles["student"].lora is not None else None


def _check_averages(config: Config, trainable: Mapping[str, bool]) -> None:
    wrong = [role for role in config.ema.roles if not trainable.get(role)]
    if config.ema.enabled and wrong:
        trained = ", ".join(role for role in trainable if trainable[role])
        raise UserError(f"ema.roles: {', '.join(wrong)} is not trained; trained are {trained}")
    for role in load_method(config.distill_method).averaged_roles:
        if not config.ema.enabled or role not in config.ema.roles:
            raise UserError(
                f"ema: {config.distill_method} trains on the average of the {role}, and without one the target would "
                f"be the {role} itself; set ema.enabled: true, with {role} in ema.roles"
            )


def build_wan_dmd2_method(
    config: RunConfig[Any, DMD2Config],
    processes: Processes | None = None,
    networks: Mapping[str, nn.Module] | None = None,
) -> DMD2Method:
    """DMD2 on Wan: :func:`build_method` with both names fixed.

    Raises:
        UserError: if the config names another family or method.
    """
    named = (config.distill_model, config.distill_method)
    if named != ("wan", "dmd2"):
        raise UserError(f"build_wan_dmd2_method builds wan x dmd2, the config says {' x '.join(named)}")
    return cast(DMD2Method, build_method(config, build_adapter(config, processes), processes, networks))


def build_averages(config: Config, method: Method) -> Averages:
    """Begin the averages of trained roles that the config asks for."""
    return keep_averages(method.bundle, config.ema)
