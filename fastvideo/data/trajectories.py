"""``fastvideo precompute-trajectories``: a teacher's trajectories from noise to data, in Parquet, with their settings.

One row is one trajectory: the teacher's states at the times that the method asks for, mostly the ladder's, those times,
and the end (as ``vae_latent``). A causal one has the end among its states, at time 0, and as ``vae_latent`` the video
of the dataset that each of its chunks went on from.

A row's noise is a function of (seed, row), and the rows of a file go through the network in batches of a fixed size, so
that any number of processes and interruptions gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from fastvideo.data.index import dataset_files, index_file
from fastvideo.data.order import Source
from fastvideo.data.output import open_output, shard_path
from fastvideo.data.schema import LATENT, METADATA_KEY, schema_with, tensor_columns
from fastvideo.data.shards import whole_file
from fastvideo.data.workers import FileJob, WriteFile, progress, start_server, write_files
from fastvideo.distillation.abilities import of_folder, of_frames
from fastvideo.distillation.builder import Adapter, Config
from fastvideo.distillation.chunks import STREAMING, Masked
from fastvideo.distillation.config.causal import StreamOptions, reach_of
from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.config.reading import config_of
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.engine.placement import Placement
from fastvideo.distillation.engine.runtime import Processes
from fastvideo.distillation.registry import load_adapter, load_method
from fastvideo.distillation.rng import mixed
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, sample, sample_forced
from fastvideo.distillation.trajectory import STATE_TIMES, STATES, TrajectoryKind
from fastvideo.distillation.types import RawBatch, UserError

FORMAT = 1
"""Increase it when the same settings give other rows."""
COMMAND, STEM = "fastvideo precompute-trajectories", "trajectories"
KIND = "trajectory_kind"
FIELDS = {
    "teacher": "teacher weights",
    "reach": "reach",
    "ladder": "ladder",
    "guidance": "guidance",
    "solver_times": "teacher steps",
}
"""Settings that a file shares with a run that trains on it, and their names in messages."""


def trajectory_times(config: Config, adapter: Adapter) -> tuple[float, ...]:
    """The teacher's times: its own sampler's, with those of the stored states among them."""
    return joined(adapter.folder.teacher_times(config.method.teacher_steps), stored(config).times)


def stored(config: Config) -> Ladder:
    """Times of the states that the method asks for."""
    return Ladder(config.method.stored_times(config.ladder.times))


def joined(times: Sequence[float], kept: Sequence[float], tolerance: float = 1e-6) -> tuple[float, ...]:
    """Falling times of two ladders; of two nearer than ``tolerance``, the one that is ``kept``."""
    own = [t for t in times if all(abs(t - one) > tolerance for one in kept)]
    return tuple(sorted((*own, *kept), reverse=True))


def state_times(config: Config, kind: TrajectoryKind) -> tuple[float, ...]:
    """Times of the stored states; a causal trajectory has its end among them."""
    return stored(config).with_end if kind == "causal" else stored(config).times


def weights_hash(network: nn.Module) -> str:
    """SHA-256 of a network's weights, with their names."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def provenance(config: Config, adapter: Adapter, teacher: nn.Module, kind: TrajectoryKind) -> dict[str, Any]:
    """Settings of a trajectory, as JSON: stored in a file and compared with a run's.

    ``teacher`` has float32 weights, so that they are the same ones to a run of another precision.
    """
    reach = reach_of(config.method) if kind == "causal" else None
    return {
        KIND: kind,
        "reach": None if reach is None else asdict(reach),
        "format": FORMAT,
        "latents": "normalised",
        "codec_key": adapter.codec.latent_key,
        "family": config.distill_model,
        "model": config.method.teacher_path or config.model.path,
        "teacher": weights_hash(teacher),
        "dtype": str(adapter.folder.compute_dtype).removeprefix("torch."),
        "ladder": list(stored(config).times),
        "guidance": config.method.model_dump(mode="json")["teacher_guidance"],
        "negative_prompt": adapter.conditioner.negative_prompt,
        "solver": "euler",
        "solver_times": list(trajectory_times(config, adapter)),
    }


@dataclass(frozen=True)
class TrajectoryJob(FileJob):
    """Sample a list of captions with the teacher.

    Attributes:
        config: of the run that will train on them, as JSON.
        captions: one trajectory each.
        batch_size: trajectories per network call.
        made: :func:`provenance` with the settings of the rows.
        videos: clean pasts of causal trajectories, one each, in turn; ``None`` for bidirectional ones.
    """

    config: Mapping[str, Any]
    captions: Sequence[str]
    batch_size: int
    made: Mapping[str, Any]
    videos: Source | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def writer(self, device: str) -> WriteFile:
        config = config_of(self.config, "of the trajectories")
        adapter = load_adapter(config.distill_model)(config.model, device)
        adapter.ensure_negative_conditioning()
        of_folder(adapter.folder).check_kernels(trained=False)
        placement = Placement(adapter, Processes(), ParallelConfig())
        teacher = Denoiser(adapter, placement.load(config.method.teacher_path, trained=False))
        draw = self._sample if self.videos is None else self._continue
        return partial(self._write, partial(draw, config, adapter, teacher))

    def _continue(self, config: Config, adapter: Adapter, teacher: Denoiser, rows: range) -> tuple[Tensor, Tensor]:
        """States ``[B, K + 1, C, F, H, W]``, the last at time 0, and the videos whose chunks ``rows`` went on from."""
        raw, reach = self._clean(rows), reach_of(config.method)
        assert raw.latents is not None
        assert reach is not None
        clean, sampler = raw.latents.to(adapter.device), _sampler(config, adapter)
        conditions = adapter.conditioner.text_of(raw), adapter.conditioner.negative(len(rows))
        states, noise = list[Tensor](), _noise(config, adapter, rows)
        keep = partial(_keep, states, sampler, config)
        end = sample_forced(teacher, noise, sampler, Masked(reach, clean), *conditions, keep)
        return torch.stack([*states, end], dim=1).float().cpu(), clean.float().cpu()

    def _clean(self, rows: range) -> RawBatch:
        """The videos of ``rows``, each in turn."""
        assert self.videos is not None
        count = sum(len(bucket.rows) for bucket in self.videos.buckets)
        return self.videos.read([row % count for row in rows])

    def _sample(self, config: Config, adapter: Adapter, teacher: Denoiser, rows: range) -> tuple[Tensor, Tensor]:
        """States ``[B, K, C, F, H, W]`` and end ``[B, C, F, H, W]`` of ``rows``, float32 on the CPU."""
        noise = _noise(config, adapter, rows)
        condition = adapter.conditioner.encode_prompts([self.captions[row] for row in rows])
        states, sampler = list[Tensor](), _sampler(config, adapter)
        keep = partial(_keep, states, sampler, config)
        negative, shape = adapter.conditioner.negative(len(rows)), adapter.codec.latent_shape
        end = sample(teacher, noise, shape, sampler, condition, negative, visit=keep)
        return torch.stack(states, dim=1).float().cpu(), end.float().cpu()

    def _write(self, draw: Callable[[range], tuple[Tensor, Tensor]], number: int, done: Callable[[int], None]) -> None:
        schema, rows = schema_with((STATES, STATE_TIMES)), self.part(number)
        with whole_file(shard_path(self.out, number, STEM), schema) as file:
            for start in range(rows.start, rows.stop, self.batch_size):
                part = range(start, min(start + self.batch_size, rows.stop))
                table = pa.Table.from_pylist(list(self._columns(part, *draw(part))), schema=schema)
                file.write_table(table)
                done(part.stop - rows.start)
            file.add_key_value_metadata({METADATA_KEY.decode(): json.dumps(self.made)})

    def _columns(self, rows: range, states: Tensor, ends: Tensor) -> Iterator[dict[str, Any]]:
        ladder = Ladder(tuple(self.made["ladder"]))
        times = torch.tensor(ladder.with_end if self.made[KIND] == "causal" else ladder.times).numpy()
        for row, state, end in zip(rows, states, ends, strict=True):
            columns = {"id": f"{row:08d}", "caption": self.captions[row], "media_type": "trajectory"}
            columns |= tensor_columns(LATENT, end.numpy()) | tensor_columns(STATES, state.numpy())
            yield columns | tensor_columns(STATE_TIMES, times)


def _sampler(config: Config, adapter: Adapter) -> SamplerSpec:
    return SamplerSpec.teacher(trajectory_times(config, adapter), config.method.teacher_guidance)


def _keep(states: list[Tensor], sampler: SamplerSpec, config: Config, step: int, x_t: Tensor) -> None:
    """Add the states to be stored to ``states``."""
    if sampler.times[step] in stored(config).times:
        states.append(x_t)


def _noise(config: Config, adapter: Adapter, rows: range) -> SampleNoise:
    return SampleNoise([mixed(config.seed, row) for row in rows], adapter.device)


def precompute(
    config: Config, captions: Sequence[str], out: Path, options: Mapping[str, Any], videos: Source | None = None
) -> str:
    """Write the missing files; returns a line for the terminal.

    Args:
        config: of a run whose method trains on trajectories.
        captions: one trajectory each.
        out: the folder.
        options: ``workers``, ``per_file``, ``batch_size``, ``device`` and ``overwrite``.
        videos: for causal trajectories, the clean pasts; row by row those of ``captions``.

    Raises:
        UserError: for a method without stored trajectories or with another kind, a teacher that does not generate chunk
            by chunk where it must, a model with conditioning frames, a caption that is too long, or a folder
            with other settings.
        RunError: if a process dies; the same call then continues.
    """
    kind: TrajectoryKind = "bidirectional" if videos is None else "causal"
    check_kind(config, kind)
    if options["workers"] > 1:
        start_server(__name__)
    adapter = load_adapter(config.distill_model)(config.model, options["device"])
    if of_frames(adapter.conditioner).needs_frames:
        raise UserError(f"{config.model.path}: trajectories of a model with conditioning frames cannot be stored")
    adapter.conditioner.check_prompts(captions)
    _check_teacher(config, adapter, kind)
    made = provenance(config, adapter, adapter.folder.load_network(config.method.teacher_path), kind)
    made |= {"seed": config.seed, "rows_per_file": options["per_file"], "batch_size": options["batch_size"]}
    values, batch_size = config.model_dump(mode="json"), options["batch_size"]
    job = TrajectoryJob(out, options["per_file"], options["device"], values, tuple(captions), batch_size, made, videos)
    sources = hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()
    manifest = {"command": COMMAND, "settings": made, "sources": sources, "videos": len(captions), "files": job.files}
    missing = open_output(out, manifest, overwrite=options["overwrite"], stem=STEM)
    left = sum(len(job.part(number)) for number in missing)
    with progress("sampling trajectories", len(captions), len(captions) - left) as show:
        write_files(job, missing, options["workers"], show)
    calls = len(made["solver_times"]) * (1 if made["guidance"] == 1.0 else 2)
    return f"{out}: {len(captions)} trajectories, {left} of them new, {calls} network calls each"


def check_kind(config: Config, kind: TrajectoryKind) -> None:
    """Check that the config's method trains on these trajectories."""
    method, name = load_method(config.distill_method), config.distill_method
    if not method.needs_trajectories:
        raise UserError(f"{name} trains on no trajectories; the config's distill_method must be kd or causal_kd")
    if kind not in (kinds := config.method.trajectory_kinds):
        hint = "give --causal" if "causal" in kinds else "leave --causal out, or set distill_method: causal_kd"
        raise UserError(f"{name} trains on {' or '.join(kinds)} trajectories, and these would be {kind}: {hint}")


def _check_teacher(config: Config, adapter: Adapter, kind: TrajectoryKind) -> None:
    """Refuse a teacher that has only seen whole videos where chunks go on from clean ones."""
    path, own = config.method.teacher_path, config.method
    trusted = isinstance(own, StreamOptions) and own.trusts_teachers
    if kind == "causal" and not trusted and STREAMING not in of_folder(adapter.folder).recipe_of(path):
        raise UserError(
            f"method.teacher_path: {path or config.model.path} makes whole videos at once (its recipe.json has no "
            f"`{STREAMING}`), and --causal needs a teacher that generates chunk by chunk: train one with causal_sft, "
            f"or set method.allow_bidirectional_pairs: true if it is one"
        )


def metadata_at(path: str) -> list[dict[str, Any]]:
    """Settings stored in each file of a dataset.

    Raises:
        UserError: if there is no file, or preprocessing was interrupted.
    """
    return [index_file(file).made for file in dataset_files(path)]


def check_made_for(made: Mapping[str, Any], config: Config, adapter: Adapter, teacher: nn.Module) -> TrajectoryKind:
    """The kind of trajectories that were made with the run's settings.

    Raises:
        UserError: with both values of every difference.
    """
    path = config.data.path
    if "solver_times" not in made:
        raise UserError(
            f"data.path: {path} holds no trajectories, which {config.distill_method} trains on; make them with: "
            f"{COMMAND} --config CONFIG --out FOLDER"
        )
    kind: TrajectoryKind = made.get(KIND, "bidirectional")
    kinds = config.method.trajectory_kinds
    if kind not in kinds:
        option = ", or set method.allow_bidirectional_pairs: true" if kind == "bidirectional" else ""
        raise UserError(
            f"data.path: the trajectories in {path} are {kind}, and {config.distill_method} trains on "
            f"{' or '.join(kinds)} ones: make them with {COMMAND}{' --causal' if 'causal' in kinds else ''}{option}"
        )
    wanted = provenance(config, adapter, teacher, kind)
    wrong = [
        f"{name}: made with {_short(made.get(key))}, configured {_short(wanted[key])}"
        for key, name in FIELDS.items()
        if made.get(key) != wanted[key]
    ]
    if wrong:
        raise UserError(
            f"data.path: the trajectories in {path} are not this run's ({'; '.join(wrong)}). Make them again with "
            f"{COMMAND}, or configure what they were made with"
        )
    return kind


def _short(value: Any) -> str:
    """A value for a message: a hash by its beginning, a long list of times by its length and ends."""
    if isinstance(value, list) and len(value) > 12:
        return f"{len(value)} from {value[0]:g} to {value[-1]:g}"
    return value[:12] if isinstance(value, str) else f"{value}"
