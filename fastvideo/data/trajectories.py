"""``fastvideo precompute-trajectories``: a teacher's walks from noise to data, in Parquet, with how they were made.

One row is one walk: the teacher's states at the times of the student's ladder, those times, and the end (as
``vae_latent``). A row's noise is a function of (seed, row), and the rows of a file go through the network in batches of
a fixed size, so that any number of processes and interruptions gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from fastvideo.data.index import dataset_files, index_file
from fastvideo.data.output import prepare_output, shard_path
from fastvideo.data.schema import LATENT, METADATA_KEY, schema_with, tensor_columns
from fastvideo.data.shards import whole_file
from fastvideo.data.workers import WriteFile, progress, start_server, write_files
from fastvideo.distillation.builder import Adapter, Config
from fastvideo.distillation.config.reading import config_of
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.registry import load_adapter, load_method
from fastvideo.distillation.rng import sample_seed
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, sample
from fastvideo.distillation.schedule import Ladder
from fastvideo.distillation.types import STATE_TIMES, STATES, UserError

FORMAT = 1
"""Raised when the same settings would make other rows."""
COMMAND, STEM = "fastvideo precompute-trajectories", "trajectories"
FIELDS = {"teacher": "teacher weights", "ladder": "ladder", "guidance": "guidance", "solver_times": "teacher steps"}
"""What the file must have in common with a run that trains on it, and how a message calls it."""


def walk_times(config: Config, adapter: Adapter) -> tuple[float, ...]:
    """The teacher's times: its own sampler's, with the ladder's among them."""
    own = Ladder(adapter.folder.teacher_times(config.method.teacher_steps))
    return own.joined(Ladder(config.ladder.times)).times


def weights_hash(network: nn.Module) -> str:
    """SHA-256 of a network's weights, with their names."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def provenance(config: Config, adapter: Adapter, teacher: nn.Module) -> dict[str, Any]:
    """How a walk is made, as JSON: what a file says, and what a run expects it to say."""
    return {
        "format": FORMAT,
        "latents": "normalised",
        "codec_key": adapter.codec.latent_key,
        "family": config.distill_model,
        "model": config.method.teacher_path or config.model.path,
        "teacher": weights_hash(teacher),
        "ladder": list(config.ladder.times),
        "guidance": config.method.teacher_guidance,
        "negative_prompt": adapter.conditioner.negative_prompt,
        "solver": "euler",
        "solver_times": list(walk_times(config, adapter)),
    }


@dataclass(frozen=True)
class TrajectoryJob:
    """All that a process needs to know.

    Attributes:
        config: of the run that will train on them, as JSON.
        made: :func:`provenance`, with what only the rows depend on.
    """

    config: Mapping[str, Any]
    captions: Sequence[str]
    out: Path
    per_file: int
    batch_size: int
    device: str
    made: Mapping[str, Any]

    @property
    def files(self) -> int:
        """Output files."""
        return -(-len(self.captions) // self.per_file)

    def rows(self, number: int) -> range:
        """The rows of one output file."""
        return range(number * self.per_file, min((number + 1) * self.per_file, len(self.captions)))

    def size(self, number: int) -> int:
        """How many those are."""
        return len(self.rows(number))

    def writer(self, device: str) -> WriteFile:
        """What writes an output file, with the teacher loaded."""
        config = config_of(self.config, "of the trajectories")
        adapter = load_adapter(config.distill_model)(config.model, device)
        adapter.ensure_negative_conditioning()
        teacher = Denoiser(adapter, adapter.folder.load_network(config.method.teacher_path))
        return partial(self._write, partial(self._walk, config, adapter, teacher))

    def _walk(self, config: Config, adapter: Adapter, teacher: Denoiser, rows: range) -> tuple[Tensor, Tensor]:
        """States ``[B, K, C, F, H, W]`` and end ``[B, C, F, H, W]`` of some rows, float32 on the CPU."""
        noise = SampleNoise([sample_seed(config.seed, row) for row in rows], adapter.device)
        condition = adapter.conditioner.encode_prompts([self.captions[row] for row in rows])
        sampler = SamplerSpec.teacher(walk_times(config, adapter), config.method.teacher_guidance)
        states: list[Tensor] = []

        def keep(step: int, x_t: Tensor) -> None:
            if sampler.times[step] in config.ladder.times:
                states.append(x_t)

        negative, shape = adapter.conditioner.negative(len(rows)), adapter.codec.latent_shape
        end = sample(teacher, noise, shape, sampler, condition, negative, visit=keep)
        return torch.stack(states, dim=1).float().cpu(), end.float().cpu()

    def _write(self, walk: Callable[[range], tuple[Tensor, Tensor]], number: int, done: Callable[[int], None]) -> None:
        schema, rows = schema_with((STATES, STATE_TIMES)), self.rows(number)
        with whole_file(shard_path(self.out, number, STEM), schema) as file:
            for start in range(rows.start, rows.stop, self.batch_size):
                part = range(start, min(start + self.batch_size, rows.stop))
                table = pa.Table.from_pylist(list(self._columns(part, *walk(part))), schema=schema)
                file.write_table(table)
                done(part.stop - rows.start)
            file.add_key_value_metadata({METADATA_KEY.decode(): json.dumps(self.made)})

    def _columns(self, rows: range, states: Tensor, ends: Tensor) -> Iterator[dict[str, Any]]:
        times = torch.tensor(self.made["ladder"], dtype=torch.float32).numpy()
        for row, state, end in zip(rows, states, ends, strict=True):
            columns = {"id": f"{row:08d}", "caption": self.captions[row], "media_type": "trajectory"}
            columns |= tensor_columns(LATENT, end.numpy()) | tensor_columns(STATES, state.numpy())
            yield columns | tensor_columns(STATE_TIMES, times)


def precompute(config: Config, captions: Sequence[str], out: Path, options: Mapping[str, Any]) -> str:
    """Write what is not there yet; one line about it.

    Args:
        config: of a run whose method trains on trajectories.
        captions: one walk each.
        out: the folder.
        options: ``workers``, ``per_file``, ``batch_size``, ``device`` and ``overwrite``.

    Raises:
        UserError: for a method that trains on something else, a model that goes on from frames, a caption that is too
            long, or a folder that was begun in another way.
        RunError: if a process dies; the same call goes on from there.
    """
    if not load_method(config.distill_method).needs_trajectories:
        raise UserError(f"{config.distill_method} trains on no trajectories; the config's distill_method must be kd")
    if options["workers"] > 1:
        start_server(__name__)
    adapter = load_adapter(config.distill_model)(config.model, options["device"])
    if adapter.conditioner.needs_frames:
        raise UserError(f"{config.model.path}: trajectories of a model that goes on from given frames cannot be stored")
    adapter.conditioner.check_prompts(captions)
    made = provenance(config, adapter, adapter.folder.load_network(config.method.teacher_path))
    made |= {"seed": config.seed, "rows_per_file": options["per_file"], "batch_size": options["batch_size"]}
    names = ("per_file", "batch_size", "device")
    chosen = {name: options[name] for name in names}
    job = TrajectoryJob(config.model_dump(mode="json"), tuple(captions), out, made=made, **chosen)
    sources = hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()
    manifest = {"command": COMMAND, "settings": made, "sources": sources, "videos": len(captions), "files": job.files}
    missing = prepare_output(out, manifest, overwrite=options["overwrite"], stem=STEM)
    left = sum(job.size(number) for number in missing)
    with progress("walking trajectories", len(captions), len(captions) - left) as show:
        write_files(job, missing, options["workers"], show)
    calls = len(made["solver_times"]) * (1 if made["guidance"] == 1.0 else 2)
    return f"{out}: {len(captions)} trajectories, {left} of them new, {calls} network calls each"


def metadata_at(path: str) -> list[dict[str, Any]]:
    """What every file of a dataset says about how it was made.

    Raises:
        UserError: if there is none, or making them did not come to its end.
    """
    return [index_file(file).made for file in dataset_files(path)]


def check_made_for(made: Mapping[str, Any], config: Config, adapter: Adapter, teacher: nn.Module) -> None:
    """Whether a dataset's trajectories are those that a run is configured for.

    Raises:
        UserError: with both values of all that differ.
    """
    path = config.data.path
    if "solver_times" not in made:
        raise UserError(
            f"data.path: {path} holds no trajectories, which {config.distill_method} trains on; make them with: "
            f"{COMMAND} --config CONFIG --out FOLDER"
        )
    wanted = provenance(config, adapter, teacher)
    wrong = [
        f"{name}: made with {_short(made[key])}, configured {_short(wanted[key])}"
        for key, name in FIELDS.items()
        if made[key] != wanted[key]
    ]
    if wrong:
        raise UserError(
            f"data.path: the trajectories in {path} are not this run's ({'; '.join(wrong)}). Make them again with "
            f"{COMMAND}, or configure what they were made with"
        )


def _short(value: Any) -> str:
    """A value for a message: a hash by its beginning, the times of a walk by their number."""
    if isinstance(value, list) and len(value) > 12:
        return f"{len(value)} from {value[0]:g} to {value[-1]:g}"
    return value[:12] if isinstance(value, str) else f"{value}"
