"""Initial weights of a role, from any role of any checkpoint, or from a model folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.engine.checkpoint.checkpoint import INDEX
from fastvideo.distillation.engine.checkpoint.manifest import MANIFEST, Manifest, complete_checkpoints
from fastvideo.distillation.engine.checkpoint.restore import check_intact, role_parts, under
from fastvideo.distillation.engine.checkpoint.state import EMA, JOINT, NETWORK, mismatches
from fastvideo.distillation.engine.checkpoint.storage import Stored, read_index, read_into
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.training import tensors_of
from fastvideo.distillation.types import UserError
from fastvideo.storage import is_remote, local_folder

KINDS = {"ema": EMA, "live": NETWORK}
"""Suffix of a path, to the averaged weights and those of the last step."""
FORM = "a checkpoint (or a run's folder), with :ROLE or :ROLE:ema or :ROLE:live behind it if wanted, or a model folder"


@dataclass(frozen=True)
class Origin:
    """Source of weights; ``role`` and ``kind`` are ``None`` if the text leaves them open."""

    folder: Path
    role: str | None
    kind: str | None


def parse_origin(text: str) -> Origin:
    """Parse ``PATH``, ``PATH:ROLE`` or ``PATH:ROLE:ema|live``; a folder at a URL is fetched once per machine.

    Raises:
        UserError: if there is no such folder.
    """
    if is_remote(text):
        protocol, _, rest = text.partition("://")
        at, *named = rest.split(":")
        return parse_origin(":".join([str(local_folder(f"{protocol}://{at}")), *named]))
    path = Path(text)
    suffix: list[str] = []
    while not path.is_dir() and ":" in path.name and len(suffix) < 2:
        head, _, tail = str(path).rpartition(":")
        path, suffix = Path(head), [tail, *suffix]
    role, kind = [*suffix, None, None][:2]
    if path.suffix == ".safetensors" and path.is_file():
        raise UserError(
            f"{text!r} is one file: a LoRA goes into the role's lora.init_from (to train it on) or loras (to merge "
            "it), a whole network into its path"
        )
    if not path.is_dir() or (kind is not None and kind not in KINDS):
        raise UserError(f"{text!r} is no folder: {FORM} is expected")
    return Origin(path, role, kind)


def start_from(handle: RoleHandle, text: str, load_network: Callable[[str], nn.Module], processes: Processes) -> str:
    """Give a role the weights that ``text`` names; returns a line for the log.

    Raises:
        UserError: if they are missing or damaged, or do not fit.
    """
    try:
        origin = parse_origin(text)
        checkpoint = _checkpoint_in(origin.folder)
        if checkpoint is None:
            _from_network(handle, load_network(str(origin.folder)))
            return f"role {handle.name} starts from {origin.folder}"
        return _from_checkpoint(handle, checkpoint, origin, processes)
    except UserError as error:
        raise UserError(f"roles.{handle.name}.init_from: {error}") from error


def _checkpoint_in(folder: Path) -> Path | None:
    if (folder / INDEX).is_file() or (folder / MANIFEST).is_file():
        return folder
    complete = complete_checkpoints(folder / "checkpoints") or complete_checkpoints(folder)
    return complete[-1] if complete else None


def _from_checkpoint(handle: RoleHandle, folder: Path, origin: Origin, processes: Processes) -> str:
    check_intact(folder, processes)
    manifest, index = Manifest.read(folder), read_index(folder / INDEX)
    role = origin.role or (handle.name if handle.name in manifest.roles else "student")
    held = {kind for kind, part in KINDS.items() if part in role_parts(folder, role)}
    if not held:
        raise UserError(f"{folder} holds no role {role!r}; it holds {', '.join(manifest.roles)}")
    kind = origin.kind or ("ema" if "ema" in held else "live")
    if kind not in held:
        raise UserError(f"{folder} holds no averaged weights of role {role!r}")
    prefix = JOINT.join((role, KINDS[kind], ""))
    stored = under(index, prefix)
    own = tensors_of(handle) if handle.trainable else _whole(handle)
    _check_fit(own, stored, f"role {role!r} of {folder}")
    read_into({f"{prefix}{name}": tensor for name, tensor in own.items()}, folder, index)
    return f"role {handle.name} starts from the {kind} weights of role {role}, step {manifest.step}, in {folder}"


def _from_network(handle: RoleHandle, network: nn.Module) -> None:
    own, given = _whole(handle), network.state_dict()
    stored = {name: Stored(str(value.dtype), tuple(value.shape), ()) for name, value in given.items()}
    _check_fit(own, stored, "the model")
    with torch.no_grad():
        for name, tensor in own.items():
            whole = given[name].to(tensor.device)
            if isinstance(tensor, DTensor):
                shard = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
                tensor.to_local().copy_(shard.to_local())
            else:
                tensor.copy_(whole)


def _whole(handle: RoleHandle) -> dict[str, Tensor]:
    return tensors_of(handle) if handle.shares_network else handle.network.state_dict()


def _check_fit(own: Mapping[str, Tensor], stored: Mapping[str, Stored], what: str) -> None:
    problems = mismatches(own, stored)
    if problems:
        raise UserError(f"the weights of {what} do not fit this role's network: {'; '.join(problems)}")
