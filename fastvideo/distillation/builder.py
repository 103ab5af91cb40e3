"""Config -> roles -> handles -> method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.bundle import ModelBundle, RoleHandle, check_roles
from fastvideo.distillation.config.base import MethodConfig
from fastvideo.distillation.config.schema import ParallelConfig, RunConfig
from fastvideo.distillation.engine.checkpoint.initial import start_from
from fastvideo.distillation.engine.lora import AdapterSwitch
from fastvideo.distillation.engine.optim import attach_optimizer, check_states
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.placement import Placement
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Config, DMD2Method
from fastvideo.distillation.registry import ADAPTERS, METHODS, load_adapter, load_method
from fastvideo.distillation.rng import RandomStreams, initialising
from fastvideo.distillation.schedule import Ladder
from fastvideo.distillation.types import Need, UserError
from fastvideo.stopping import unit_done

Adapter = DistillAdapter[Any]
Method = DistillMethod[Any]
Config = RunConfig[Any, Any]


def build_adapter(config: Config, processes: Processes | None = None) -> Adapter:
    """The family of the config, on this process's device; no network is loaded yet."""
    processes = processes or Processes()
    family = load_adapter(config.distill_model)
    return family(config.model, processes.device, whole_forwards=processes.forward_together)


def lacks(config: MethodConfig, method: type[Method], family: type[Adapter]) -> list[Need]:
    """What a method with these options needs of a model family and does not get, in alphabetic order."""
    return sorted(method.needs_of(config) - family.supports)


def check_needs(config: Config) -> None:
    """Check that the family gives what the method needs.

    Raises:
        UserError: with what is lacking, and what would work instead.
    """
    method, name = load_method(config.distill_method), config.distill_model
    lacking = lacks(config.method, method, load_adapter(name))
    if not lacking:
        return
    fitting = [other for other in ADAPTERS if not lacks(config.method, method, load_adapter(other))]
    methods = [
        other for other in METHODS if not lacks(load_method(other).Config(), load_method(other), load_adapter(name))
    ]
    hint = "set method.jvp: central_difference; " if "jvp" in lacking else ""
    raise UserError(
        f"{config.distill_method} needs {' and '.join(lacking)} of the model family, which {name} does not have: {hint}"
        f"families that do: {', '.join(fitting) or 'none'}; methods that run on {name}: {', '.join(methods) or 'none'}"
    )


def load_role(config: Config, adapter: Adapter, role: str, placement: Placement | None = None) -> nn.Module:
    """The network of a role as training starts with it: the student of a method of flow maps is one.

    Without a ``placement`` it is whole.
    """
    placement = placement or Placement(adapter, Processes(), ParallelConfig())
    options, needs = config.roles[role], load_method(config.distill_method).needs_of(config.method)
    flow_map = role == "student" and "flow_map" in needs
    change = adapter.folder.add_flow_map if flow_map else None
    return placement.load(options.path, trained=options.trainable, change=change)


def shared_networks(config: Config, placement: Placement) -> dict[str, AdapterSwitch]:
    """The roles that train an adapter, and the frozen ones over the same weights: one network per path.

    Raises:
        UserError: if an adapter does not fit, or the method changes the student's network itself.
    """
    method, switches = load_method(config.distill_method), dict[str, AdapterSwitch]()
    adapted = {name: role for name, role in config.roles.items() if role.lora is not None}
    if "student" in adapted and "flow_map" in method.needs_of(config.method):
        raise UserError(f"roles.student.lora: {config.distill_method} adds a part to the student and trains it whole")
    for path in dict.fromkeys(role.path for role in adapted.values()):
        adapters = {name: role.lora for name, role in adapted.items() if role.path == path and role.lora is not None}
        base = placement.load_shared(path, adapters, config.seed)
        for name, role in config.roles.items():
            if role.path == path and (name in adapters or not role.trainable):
                switches[name] = AdapterSwitch(base, name if name in adapters else None, path)
    return switches


def build_method(
    config: Config,
    adapter: Adapter,
    processes: Processes | None = None,
    networks: Mapping[str, nn.Module] | None = None,
) -> Method:
    """Roles, handles with their optimizers, random streams and the method on top.

    Args:
        config: the run.
        adapter: the family of all roles.
        processes: this process among all.
        networks: networks by role, instead of loading or building them.

    Raises:
        UserError: if the roles or the family are not what the method needs; nothing is loaded then.
    """
    processes = processes or Processes()
    method = load_method(config.distill_method)
    trainable = {name: role.trainable for name, role in config.roles.items()}
    roles = (*method.trainable_roles, *method.frozen_roles)
    check_roles(trainable, roles, method.trainable_roles, method.optional_roles)
    check_needs(config)
    _check_averages(config, trainable)
    placement = Placement(adapter, processes, config.parallel)
    placement.check({name: role.path for name, role in config.roles.items()}, [adapter.codec.latent_shape])
    _check_derivatives(config, processes)
    optimizers = method.optimizers(config.method)
    check_states(config.trainer.optimizer_states, optimizers)
    with initialising(config.seed):
        heads = method.heads(config.method, adapter)
    for name in heads:
        if config.roles[name].path is not None:
            raise UserError(f"roles.{name}.path: {config.distill_method} makes this network itself; leave the path out")
    loaded = {name: role for name, role in config.roles.items() if name not in heads}
    placement.check_memory(loaded, config.trainer.optimizer_states)
    adapter.ensure_negative_conditioning()
    switches = {} if networks else shared_networks(config, placement)
    handles, notes = [], []
    for name, role in config.roles.items():
        unit_done()
        handles.append(_handle(config, adapter, name, placement, {**heads, **(networks or {})}, switches))
        if role.init_from is not None:
            notes.append(start_from(handles[-1], role.init_from, adapter.folder.load_network, processes))
    for role_name, options in optimizers.items():
        handle = next(h for h in handles if h.name == role_name)
        attach_optimizer(handle, options, config.trainer.optimizer_states)
    rank, ranks = processes.data_rank, processes.data_size
    rng = RandomStreams(config.seed, rank=rank, ranks=ranks, device=processes.device)
    built = method(config.method, ModelBundle(handles), Ladder(config.ladder.times), rng)
    built.notes = (*notes, *built.notes)
    return built


def _handle(
    config: Config,
    adapter: Adapter,
    name: str,
    placement: Placement,
    made: Mapping[str, nn.Module],
    switches: Mapping[str, AdapterSwitch],
) -> RoleHandle:
    """One role over a network that is made already, shared with other roles, or loaded."""
    trainable = config.roles[name].trainable
    if name in switches and name not in made:
        switch = switches[name]
        shared = switch.network.to(adapter.device)
        return RoleHandle(name, adapter, shared, trainable, select=switch, trained=switch.parameters())
    network = made[name].to(adapter.device) if name in made else load_role(config, adapter, name, placement)
    return RoleHandle(name, adapter, network, trainable)


def _check_derivatives(config: Config, processes: Processes) -> None:
    if processes.context > 1 and "jvp" in load_method(config.distill_method).needs_of(config.method):
        raise UserError(
            f"parallel.context: {config.distill_method} takes forward-mode derivatives, which attention over several "
            f"processes does not have; set method.jvp: central_difference, or parallel.context: 1"
        )


def _check_averages(config: Config, trainable: Mapping[str, bool]) -> None:
    wrong = [role for role in config.ema.roles if not trainable.get(role)]
    if config.ema.enabled and wrong:
        trained = ", ".join(role for role in trainable if trainable[role])
        raise UserError(f"ema.roles: {', '.join(wrong)} is not trained; trained are {trained}")


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
