"""Roles whose networks are quantised: their checks before anything is loaded, and their loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastvideo.distillation.abilities import of_folder
from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.adapters.diffusers.adapter import DiffusersAdapter
from fastvideo.distillation.adapters.diffusers.gguf_file import FEW_BITS
from fastvideo.distillation.adapters.diffusers.packed import packed_sizes
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.schema import RoleConfig, RunConfig
from fastvideo.distillation.engine.placement import Placement
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.registry import ADAPTERS, load_adapter
from fastvideo.distillation.types import UserError

Adapter = DistillAdapter[Any]
Config = RunConfig[Any, Any]


def quantised(config: Config) -> list[str]:
    """Roles whose networks are stored in fewer bits."""
    return [name for name, role in config.roles.items() if role.storage is not None]


def key_of(config: Config, role: str) -> str:
    """The config's key and value, for messages."""
    options = config.roles[role]
    key, value = ("path", options.path) if options.storage == "gguf" else ("quantise", options.quantise)
    return f"roles.{role}.{key}: {value}"


@runtime_checkable
class PassesGradient(Protocol):
    """Method whose gradient passes frozen roles on its way to the student, such as one whose features judge it."""

    @classmethod
    def gradient_roles_of(cls, config: Any) -> tuple[str, ...]:
        """Those roles."""
        ...


def gradient_roles_of(method: type, config: object) -> tuple[str, ...]:
    """Frozen roles that a method's gradient passes; none for most."""
    return method.gradient_roles_of(config) if issubclass(method, PassesGradient) else ()


def check_quantised(
    config: Config,
    method: type[DistillMethod[Any]],
    by_role: Mapping[str, Adapter],
    placements: Mapping[Adapter, Placement],
    bases: Mapping[str, str],
) -> None:
    """Check the roles with ``quantise`` against the method, their families, the layout and what is installed.

    Args:
        bases: the role with an adapter on the same weights, of each frozen role that shares its network.

    Raises:
        UserError: with the role, the key, the reason and what is possible.
    """
    passed = gradient_roles_of(method, config.method)
    for role in quantised(config):
        where, family = key_of(config, role), by_role[role]
        if role in passed:
            raise UserError(f"{where}: {_reads_gradient(config, role)}{_possible(method, passed)}")
        if family.scaling is None:
            raise UserError(f"{where}: the networks of this family have no repeated blocks of matrices to store")
        if role in bases:
            raise UserError(
                f"{where}: {role} is the network that {bases[role]} trains an adapter on, so it takes no memory of its "
                f"own, and gradients pass it; leave quantise out, or give {role} other weights by path"
            )
        if config.parallel.offload != "none":
            raise UserError(
                f"{where}: a quantised network stays whole on the device, and parallel.offload: "
                f"{config.parallel.offload} keeps frozen networks on the host: choose one of them"
            )
        _check_storage(config.roles[role], family, placements[family], where)


def _check_storage(role: RoleConfig, family: Adapter, placement: Placement, where: str) -> None:
    if role.quantise is not None:
        return placement.check_packing(role.quantise, where)
    if not reads_gguf(type(family)):
        able = [name for name in ADAPTERS if reads_gguf(load_adapter(name))]
        raise UserError(
            f"{where}: diffusers reads no .gguf files of this family; {FEW_BITS}; families that read such files: "
            f"{', '.join(able)}"
        )
    of_folder(family.folder).check_gguf(str(role.path), where)


def reads_gguf(family: type[Adapter]) -> bool:
    """True for a family whose network diffusers reads from a ``.gguf`` file."""
    return issubclass(family, DiffusersAdapter) and family.reads_gguf()


def _reads_gradient(config: Config, role: str) -> str:
    return (
        f"{config.distill_method} sends a gradient through the {role} to the student (it reads its features), which "
        f"quantised matrices do not pass exactly"
    )


def _possible(method: type[DistillMethod[Any]], passed: tuple[str, ...]) -> str:
    frozen = (*method.frozen_roles, *(role for role in method.optional_roles if role not in method.trainable_roles))
    able = [role for role in frozen if role not in passed]
    options = "features_of" in method.Config.model_fields
    hint = "; method.features_of: critic reads the critic's instead" if options else ""
    return f". Roles that can be quantised: {', '.join(able) or 'none'}{hint}"


def load_quantised(
    config: Config, family: Adapter, placement: Placement, role: str, change: Callable[[nn.Module], None]
) -> nn.Module:
    """The network of a role, read on the host, where ``change`` gets it, and packed on its way to the device.

    Its blocks run eagerly: kernels of other libraries are not compiled.
    """
    options = config.roles[role]
    assert options.storage is not None
    return placement.load_packed(_on_host(family).folder, options.path, options.storage, key_of(config, role), change)


def unpacked_path(config: Config, role: str) -> str | None:
    """Path of a quantised role's weights as they were; for a ``.gguf`` file, those of the run's own model stand in."""
    options = config.roles[role]
    return None if options.storage == "gguf" else options.path


def has_unpacked(config: Config, family: Adapter, role: str) -> bool:
    """True if the network at :func:`unpacked_path` has the size of the role's, as all but those of files have."""
    if config.roles[role].storage != "gguf":
        return True
    empty, paths = of_folder(family.folder).empty, (config.roles[role].path, unpacked_path(config, role))
    packed, own = ({name: p.shape for name, p in empty(at, torch.float32).named_parameters()} for at in paths)
    return packed == own


def load_unpacked(config: Config, family: Adapter, role: str, change: Callable[[nn.Module], None]) -> nn.Module:
    """The network of a quantised role with its weights as they were, on the host; each layer visits the device for its
    call, so that a device has room for it which has none for the network."""
    from accelerate import cpu_offload

    network = _on_host(family).folder.load_network(unpacked_path(config, role), family.folder.compute_dtype)
    change(network)
    if family.scaling is not None:
        family.scaling.compute_directly(network)
    return cpu_offload(network.requires_grad_(False), family.device)  # type: ignore[no-any-return]


def _on_host(family: Adapter) -> Adapter:
    """The same family with its networks on the host, eager."""
    return type(family)(family.config.model_copy(update={"compile_blocks": False}), "cpu")


def sizes_of(config: Config, handle: RoleHandle, family: Adapter) -> dict[Tensor, int]:
    """Bytes of the parameters of a role's unpacked (or empty) network that a run stores in another way."""
    role = config.roles[handle.name]
    if role.storage is None or family.scaling is None:
        return {}
    if role.quantise is None:
        return dict(of_folder(family.folder).gguf_sizes(handle.network, str(role.path)))
    return packed_sizes(family.scaling.matrices(handle.network), role.quantise)
