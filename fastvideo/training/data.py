"""Data of a run, from its config: a dataset, the embedded world, or prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from fastvideo.data.faults import Faults
from fastvideo.data.index import dataset_files, has_tars, open_parquet
from fastvideo.data.order import MemorySource, SampleStream, Shard, Source, too_few
from fastvideo.data.prompts import read_prompts
from fastvideo.data.schema import TEXT
from fastvideo.data.stored_texts import check_own_texts, column_of, texts_made
from fastvideo.distillation.abilities import normalised, of_frames, of_texts
from fastvideo.distillation.adapters.base import Conditioner
from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED
from fastvideo.distillation.batches import text_name
from fastvideo.distillation.builder import Adapter, Config
from fastvideo.distillation.config.causal import reach_of
from fastvideo.distillation.engine.placement import check_tokens
from fastvideo.distillation.engine.runtime import Processes
from fastvideo.distillation.registry import load_method
from fastvideo.distillation.trajectory import STATE_TIMES, STATES
from fastvideo.distillation.types import UserError
from fastvideo.storage import is_remote
from fastvideo.tiny.captions import outside_note
from fastvideo.tiny.world import FRAMES, WORLDS
from fastvideo.training.switches import check_switches, with_switches
from fastvideo.training.texts import usable_prompts
from fastvideo.wording import counted

if TYPE_CHECKING:
    from fastvideo.data.fits import DataRequirements

READ_AHEAD = 2
"""Batches that a thread reads, and pins for CUDA, while the networks are busy."""


def build_data(
    config: Config, adapter: Adapter, processes: Processes, others: Sequence[Conditioner] = ()
) -> tuple[SampleStream, str]:
    """Build the stream of this process, and a one-line description.

    ``others`` are the conditioners of further families, whose stored texts are read too.

    Raises:
        UserError: if the data cannot be read, does not fit the model, or lacks videos that the method needs.
    """
    faults = Faults(config.data.faults, config.data.max_faults)
    source, description = open_source(config, adapter, faults, others)
    source = with_switches(config, source, [adapter.conditioner, *others])
    shard = Shard(config.data.batch_size, processes.data_rank, processes.data_size)
    on_disk = not isinstance(source, MemorySource)
    on_cuda = processes.device.type == "cuda"
    ahead = READ_AHEAD if on_disk or on_cuda else 0
    return SampleStream(source, config.seed, shard, ahead, pin=on_cuda, faults=faults), description


def check_data(config: Config, adapter: Adapter, processes: Processes) -> None:
    """Check, before a network is loaded, that the data exists, is readable and is enough for a step.

    Raises:
        UserError: for a prompts file that is missing, empty, not UTF-8 or useless to the method, a folder without
            Parquet files, or fewer samples than one batch.
    """
    method = load_method(config.distill_method)
    check_switches(config)
    shard = Shard(config.data.batch_size, processes.data_rank, processes.data_size)
    if config.data.prompts is not None:
        _check_prompts_suffice(
            config, adapter, method.uses_latents(config.method) or of_frames(adapter.conditioner).needs_frames
        )
        count = len(read_prompts(config.data.prompts))
    elif config.data.path not in WORLDS:
        check_own_texts(config.data.path, texts_made(config.data.path), adapter.conditioner, config.model.path)
        count = _rows(config.data.path, enough=shard.per_round)
    else:
        count = config.data.size
    if count < shard.per_round:
        raise UserError(too_few([count], shard))


def _rows(path: str, enough: int) -> int:
    """Count the rows of a dataset until there are enough; the run itself reports unreadable files."""
    if has_tars(path):
        return enough
    count = 0
    for file in dataset_files(path):
        try:
            with open_parquet(file) as opened:
                count += opened.metadata.num_rows
        except (pa.ArrowException, OSError):
            return enough
        if count >= enough:
            break
    return count


def prompt_notes(config: Config, processes: Processes) -> list[str]:
    """Warnings of the main process about prompts that are unknown to the world of an embedded model."""
    if config.model.path not in EMBEDDED or not processes.is_main:
        return []
    prompts = [*(read_prompts(config.data.prompts) if config.data.prompts else ()), *config.validation.prompts]
    note = outside_note(prompts)
    return [note] if note else []


def check_buckets(config: Config, adapter: Adapter, processes: Processes, data: SampleStream) -> None:
    """Check that the processes of one sample can share each size in the data.

    Raises:
        UserError: with the sizes that do not fit, and the possible values of ``parallel.context``.
    """
    used = [bucket.name for bucket in data.source.buckets if bucket.rounds(data.shard)]
    shapes = [tuple(map(int, name.split("x"))) for name in used] if config.data.buckets and "all" not in used else []
    if shapes:
        paths = {name: role.path for name, role in config.roles.items() if role.model is None}
        check_tokens(adapter, processes, paths, shapes)


def open_source(
    config: Config, adapter: Adapter, faults: Faults | None = None, others: Sequence[Conditioner] = ()
) -> tuple[Source, str]:
    """Open the samples; latents are read, or (once) computed, only for a method that trains on them."""
    method = load_method(config.distill_method)
    with_latents = method.uses_latents(config.method) or of_frames(adapter.conditioner).needs_frames
    if method.needs_trajectories:
        return _trajectories(config, adapter)
    if config.data.prompts is not None:
        return _prompts(config, adapter, with_latents, others)
    return open_videos(config, adapter, with_latents, faults, others)


def open_videos(
    config: Config,
    adapter: Adapter,
    with_latents: bool = True,
    faults: Faults | None = None,
    others: Sequence[Conditioner] = (),
) -> tuple[Source, str]:
    """Open ``data.path`` as videos with captions, whatever the method trains on."""
    if config.data.path not in WORLDS:
        return _dataset(config, adapter, with_latents, faults, others)
    return _tiny_world(config, adapter, with_latents)


def _trajectories(config: Config, adapter: Adapter) -> tuple[Source, str]:
    """Open a teacher's trajectories, if they were made for this config."""
    from fastvideo.data.fits import DataRequirements
    from fastvideo.data.parquet import ParquetSource
    from fastvideo.data.trajectories import check_made_for, metadata_at, state_times

    missing = not is_remote(config.data.path) and not Path(config.data.path).exists()
    if config.data.prompts is not None or config.data.path in WORLDS or missing:
        causal = "" if reach_of(config.method) is None else " --causal"
        raise UserError(
            f"data.path: {config.distill_method} trains on a teacher's trajectories, and there are none at "
            f"{config.data.path!r}: make them with: fastvideo precompute-trajectories{causal} --config CONFIG --out "
            f"FOLDER, and give the folder as data.path"
        )
    teacher = adapter.folder.load_network(config.method.teacher_path)
    kinds = {check_made_for(made, config, adapter, teacher) for made in metadata_at(config.data.path)}
    if len(kinds) > 1:
        raise UserError(f"data.path: {config.data.path} holds causal and bidirectional trajectories: keep one kind")
    steps = len(state_times(config, kinds.pop()))
    extras = {STATES: (steps, *adapter.codec.latent_shape), STATE_TIMES: (steps,)}
    wanted = DataRequirements(adapter.codec.latent_shape, extras=extras, codec_keys=adapter.codec.known_keys)
    source = ParquetSource(config.data.path, wanted)
    adapter.conditioner.check_prompts(source.captions())
    return source, f"{len(source)} trajectories of {config.data.path}, {steps} states each"


def _check_prompts_suffice(config: Config, adapter: Adapter, with_latents: bool) -> None:
    if with_latents and not load_method(config.distill_method).needs_trajectories:
        needs = "goes on from given frames" if of_frames(adapter.conditioner).needs_frames else "trains on videos"
        raise UserError(
            f"data.prompts: {config.distill_model} x {config.distill_method} (as configured) {needs}, a prompts file "
            f"has none; give data.path"
        )


def _prompts(config: Config, adapter: Adapter, with_latents: bool, others: Sequence[Conditioner]) -> tuple[Source, str]:
    _check_prompts_suffice(config, adapter, with_latents)
    prompts, note = usable_prompts(config, [adapter.conditioner, *others], read_prompts(str(config.data.prompts)))
    return MemorySource(prompts), f"{counted(len(prompts), 'prompt')} of {config.data.prompts}{note}"


def _tiny_world(config: Config, adapter: Adapter, with_latents: bool) -> tuple[Source, str]:
    path, size, seed = config.data.path, config.data.size, config.seed
    world = WORLDS[path]("train", config.model.model_dump().get("num_frames", FRAMES))
    if not with_latents:
        return MemorySource(world.sample_captions(size, seed)), f"{size} captions of the world {path!r}"
    from fastvideo.tiny.latents import cached_latents

    encoded = cached_latents(adapter.codec, world, size, seed, Path(config.data.cache))
    return MemorySource(encoded.captions, encoded.latents), f"{size} videos of the world {path!r}"


def _wanted(config: Config, adapter: Adapter, with_latents: bool, others: Sequence[Conditioner]) -> DataRequirements:
    """Tensors of a dataset that the run reads: those of its own family, and the texts of the others."""
    from fastvideo.data.fits import DataRequirements

    path, made = config.data.path, texts_made(config.data.path)
    shapes, names = dict(of_texts(adapter.conditioner).stored_shapes), dict[str, str]()
    if (text := shapes.pop(TEXT, None)) is not None:
        own = check_own_texts(path, made, adapter.conditioner, config.model.path)
        shapes[own], names[own] = text, TEXT
    for other in others:
        column = column_of(made, other)
        if column is not None and column not in shapes:
            shapes[column], names[column] = of_texts(other).stored_shapes[TEXT], text_name(other)
    return DataRequirements(
        latents=adapter.codec.latent_shape if with_latents else None,
        any_size=config.data.buckets,
        extras=shapes,
        names=names,
        text_length=adapter.conditioner.text_rows if adapter.conditioner.text_length else None,
        texts=made,
        normalise=partial(normalised, adapter.codec),
        codec_keys=adapter.codec.known_keys if with_latents else (),
        unmarked=config.data.latents,
    )


def _dataset(
    config: Config, adapter: Adapter, with_latents: bool, faults: Faults | None, others: Sequence[Conditioner]
) -> tuple[Source, str]:
    from fastvideo.data.parquet import ParquetSource
    from fastvideo.data.tars import TarSource

    kind = TarSource if has_tars(config.data.path) else ParquetSource
    source = kind(config.data.path, _wanted(config, adapter, with_latents, others), faults)
    text = "stored text embeddings" if source.has_text else "captions"
    files = f"{len(source.files)} file{'s' if len(source.files) > 1 else ''}"
    if not source.has_text:
        captions = source.captions()
        adapter.conditioner.check_prompts(captions)
        if not source.names:
            return MemorySource(captions), f"{len(source)} captions of {config.data.path} ({files})"
    if not with_latents:
        return source, f"{len(source)} {text} of {config.data.path} ({files})"
    sizes = ", ".join(f"{len(bucket.rows)} of {bucket.name}" for bucket in source.buckets)
    return source, f"{len(source)} videos of {config.data.path} ({files}) with {text}, latents: {sizes} (CxFxHxW)"
