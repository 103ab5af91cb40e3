"""Checkpoints: a new directory each, a manifest with hashes written last, newest complete one wins.

Tensors are safetensors and everything else is JSON, so nothing that is loaded is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastvideo.distillation.engine.distributed import Processes, barrier
from fastvideo.distillation.types import UserError

MANIFEST = "manifest.json"
SCHEMA = 1
JOINT = "::"


class Stateful(Protocol):
    """A part that survives a restart."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


def split_state(state: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Nested state as flat tensors (keys joined by ``::``) and a nested rest that JSON can hold."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for key, value in state.items():
        path = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()
        elif isinstance(value, Mapping):
            inner, plain[str(key)] = split_state(value, f"{path}{JOINT}")
            tensors.update(inner)
        else:
            plain[str(key)] = value
    return tensors, plain


def join_state(tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`split_state`; keys that are numbers (parameters in optimizer state) become ints again."""
    state = _with_int_keys(plain)
    for path, tensor in tensors.items():
        *parents, last = [_key(part) for part in path.split(JOINT)]
        node = state
        for part in parents:
            node = node[part]
        node[last] = tensor
    return state


def _key(text: str) -> Any:
    return int(text) if text.isdigit() else text


def _with_int_keys(plain: Mapping[str, Any]) -> dict[Any, Any]:
    return {_key(k): _with_int_keys(v) if isinstance(v, Mapping) else v for k, v in plain.items()}


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class CheckpointHook:
    """Saves every ``every`` steps and after ``last_step``, and keeps the last ``keep``.

    Args:
        folder: where ``step-N`` directories go.
        parts: what survives; parts named in ``per_process`` differ between processes and get a file each.
    """

    def __init__(
        self,
        folder: Path,
        parts: Mapping[str, Stateful],
        processes: Processes,
        *,
        every: int,
        keep: int,
        last_step: int,
        per_process: Sequence[str] = ("rng", "data", "trainer"),
    ) -> None:
        self.folder, self.parts, self.processes = folder, parts, processes
        self.every, self.keep, self.last_step, self.per_process = every, keep, last_step, tuple(per_process)

    def due(self, step: int) -> bool:
        """Whether to save after this step: every so often, and after the last."""
        return bool(self.every) and (step % self.every == 0 or step == self.last_step)

    def after_step(self, step: int, active: Sequence[str]) -> None:
        """Save if this step is due."""
        if self.due(step):
            self.save(step)

    def save(self, step: int) -> Path:
        """Write ``step-N``; it counts only once its manifest is there, and only then are older ones removed."""
        target = self.folder / f"step-{step}"
        if self.processes.is_main:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
        barrier()
        own = {name: part for name, part in self.parts.items() if name in self.per_process}
        self._write(target, f"process-{self.processes.rank}", own)
        if self.processes.is_main:
            shared = {name: part for name, part in self.parts.items() if name not in self.per_process}
            self._write(target, "shared", shared)
        barrier()
        if self.processes.is_main:
            self._complete(target, step)
        return target

    @staticmethod
    def _write(target: Path, name: str, parts: Mapping[str, Stateful]) -> None:
        tensors, plain = split_state({part: parts[part].state_dict() for part in parts})
        save_file(tensors, target / f"{name}.safetensors")
        (target / f"{name}.json").write_text(json.dumps(plain))

    def _complete(self, target: Path, step: int) -> None:
        files = {file.name: digest(file) for file in sorted(target.iterdir())}
        manifest = {"schema": SCHEMA, "step": step, "world_size": self.processes.world_size, "sha256": files}
        temporary = target / f"{MANIFEST}.tmp"
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
        temporary.rename(target / MANIFEST)
        for old in complete_checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)

    def restore(self) -> int:
        """Load the newest complete checkpoint into the parts; its step.

        Raises:
            UserError: if there is none, a file differs from its hash, or the number of processes changed.
        """
        found = complete_checkpoints(self.folder)
        if not found:
            raise UserError(f"--resume: no complete checkpoint in {self.folder}")
        manifest = verified_manifest(found[-1])
        if manifest["world_size"] != self.processes.world_size:
            raise UserError(
                f"checkpoint {found[-1]} was saved by {manifest['world_size']} processes, this run has "
                f"{self.processes.world_size}"
            )
        for name in ("shared", f"process-{self.processes.rank}"):
            plain = json.loads((found[-1] / f"{name}.json").read_text())
            for part, state in join_state(load_file(found[-1] / f"{name}.safetensors"), plain).items():
                self.parts[part].load_state_dict(state)
        return int(manifest["step"])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that have their manifest, oldest first."""
    found = [path.parent for path in folder.glob(f"step-*/{MANIFEST}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def verified_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest, after every file's hash was compared.

    Raises:
        UserError: naming the file that is missing or differs.
    """
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
    for name, expected in manifest["sha256"].items():
        if not (checkpoint / name).is_file() or digest(checkpoint / name) != expected:
            raise UserError(
                f"checkpoint {checkpoint}: {name} is missing or damaged; remove this checkpoint to use an older one"
            )
    return manifest


def role_parts(checkpoint: Path, role: str) -> set[str]:
    """Which parts of a role's state (``network``, ``ema``, ``optimizer``) a checkpoint holds."""
    with safe_open(checkpoint / "shared.safetensors", "pt") as file:
        split = [key.split(JOINT) for key in file.keys()]  # noqa: SIM118 (not a mapping)
    return {parts[1] for parts in split if parts[0] == role}


def role_weights(checkpoint: Path, role: str, part: str) -> dict[str, torch.Tensor]:
    """The tensors of one part of a role's state by name; nothing else of the checkpoint is read."""
    prefix = JOINT.join((role, part, ""))
    with safe_open(checkpoint / "shared.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a mapping)
        return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
