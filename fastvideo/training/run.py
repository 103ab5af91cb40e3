"""One run: folder, data, trainer with its hooks, result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file

from fastvideo.data.order import SampleStream
from fastvideo.distillation.abilities import of_folder
from fastvideo.distillation.adapters.base import Conditioner
from fastvideo.distillation.batches import BatchPreparer
from fastvideo.distillation.builder import (
    Adapter,
    Config,
    Method,
    build_adapter,
    build_averages,
    build_families,
    build_on,
)
from fastvideo.distillation.engine.runtime import Processes, Runtime, Tracker
from fastvideo.distillation.engine.saving import Saving, Snapshots
from fastvideo.distillation.engine.session import Session
from fastvideo.distillation.trainer import DistillTrainer
from fastvideo.files import replacing_folder
from fastvideo.inference.recipe import Weights, result_recipe
from fastvideo.stopping import time_taken
from fastvideo.storage import Place
from fastvideo.training.data import build_data, check_buckets, check_data, prompt_notes
from fastvideo.training.frames import frame_hooks, frame_notes
from fastvideo.training.lock import check_free, locked
from fastvideo.training.notes import idle_notes
from fastvideo.training.output import check_output, next_commands, prepare_output, resume_command
from fastvideo.training.quantised import quantised_notes
from fastvideo.training.resume import (
    already_started,
    checkpoint_folder,
    find_checkpoint,
    flat,
    resumed,
    run_facts,
    survivors,
)
from fastvideo.training.texts import conditioners_of, encode_ahead, list_left_out, take_stored_texts
from fastvideo.training.validation import build_validation


def run(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    resume_from: Place | None = None,
    began: float | None = None,
) -> Path:
    """Train as configured; returns the folder of the result (a model folder with its recipe).

    Args:
        resume: continue from the newest intact checkpoint of the output folder.
        overwrite: delete what an earlier run made in the output folder.
        resume_from: continue from this checkpoint (at a URL also from a run's newest), in the output folder that it is
            in or in a new one.
        began: launch time of the run (``time.monotonic``), for the time to its first step; default: now.

    Raises:
        UserError: for a mistake in the config, the data, the model folder or the output folder.
        RunError: if the run cannot go on.
        Stopped: on a signal; the run continues from there with ``resume``.
    """
    output = Path(config.output)
    with Session.open(config, began) as session:
        main = session.processes.is_main
        session.check_agreement("config", flat(config.model_dump(mode="json")))
        if main:
            check_free(output)
        check_output(config, resume=resume, overwrite=overwrite, resume_from=resume_from)
        session.wait_for_all()
        with locked(output) if main else nullcontext():
            session.start.reached("processes")
            return _run(config, session, OutputMode(resume, overwrite, resume_from))


@dataclass(frozen=True)
class OutputMode:
    """Treatment of an output folder that holds a run."""

    resume: bool
    overwrite: bool
    resume_from: Place | None


def _run(config: Config, session: Session, mode: OutputMode) -> Path:
    output, processes, tracker, start = Path(config.output), session.processes, session.tracker, session.start
    if processes.is_main:  # another run may have finished here since the first check
        check_output(config, **asdict(mode))
    source = None
    if mode.resume or mode.resume_from:
        source = find_checkpoint(config, session, mode.resume_from)
    session.prepare_mirror(config.checkpoint.mirror, source)
    adapter = build_adapter(config, processes)
    check_data(config, adapter, processes)
    method, conditioners = _build_method(already_started(config) if source else config, adapter, processes)
    start.reached("models")
    data, description = _build_data_once(config, adapter, session, conditioners[1:])
    check_buckets(config, adapter, processes, data)
    start.reached("data")
    validation = build_validation(config, adapter, method, tracker, processes)
    trainer = build_trainer(config, adapter, method, tracker, processes)
    if processes.is_main:
        for line in prepare_output(config, overwrite=mode.overwrite):
            tracker.say(line)
        list_left_out(config, conditioners)
    session.wait_for_all()
    data.faults.attach(output, processes.rank)
    session.check_agreement("dataset", {"steps per epoch": data.rounds})
    saving = Saving(trainer.runtime)
    parts = saving.parts(*survivors(trainer, data, validation))
    for line in resumed(saving.restore(source, parts), data) if source else []:
        tracker.say(line)
    tracker.rewind(trainer.step)
    snapshots = saving.snapshots(config.ema.post_hoc, source)
    folder, facts = checkpoint_folder(config), run_facts(config)
    checkpoints = saving.checkpoints(folder, parts, config.checkpoint, facts, trainer.over)
    trainer.hooks = (start.report_to(tracker), validation, *frame_hooks(trainer, tracker), *snapshots, checkpoints)
    trainer.on_stop = lambda step: (
        f"{checkpoints.save_for_stop(step)}{time_taken()}, go on with: {resume_command(config)}"
    )
    tracker.say(f"training on {description}, in batches of {config.data.batch_size}")
    tracker.say(f"{config.distill_model} on {processes.device}: {of_folder(adapter.folder).kernels}")
    for note in (
        *prompt_notes(config, processes),
        *method.notes,
        *frame_notes(config, method),
        *idle_notes(config, trainer, data),
        *encode_ahead(config, conditioners, data, trainer.step),
        *quantised_notes(config, trainer, data, tracker, processes),
    ):
        tracker.say(note)
    with checkpoints.closing():
        validation.resume(trainer.step)
        start.reached("preparation")
        _train(trainer, data, snapshots)
    save_result(config, adapter, trainer, output / "student")
    for line in (f"saved {output / 'student'}", *next_commands(config, adapter)):
        tracker.say(line)
    return output / "student"


def _train(trainer: DistillTrainer, data: SampleStream, snapshots: Sequence[Snapshots]) -> None:
    """Take the steps, and write the averages after the last one."""
    trainer.run(data)
    for one in snapshots:
        one.finish()


def _build_method(config: Config, adapter: Adapter, processes: Processes) -> tuple[Method, list[Conditioner]]:
    """Build the method, with the conditioners of its families: the run's own first, and stored texts in all of them."""
    families = build_families(config, adapter, processes)
    conditioners = conditioners_of([adapter, *families.placements])
    take_stored_texts(config, conditioners)
    return build_on(config, families, processes), conditioners


def _build_data_once(
    config: Config, adapter: Adapter, session: Session, others: Sequence[Conditioner]
) -> tuple[SampleStream, str]:
    """Build the data on the main process first; the others read its cache."""
    processes = session.processes
    if processes.is_main:
        data = build_data(config, adapter, processes, others)
    session.wait_for_all()
    return data if processes.is_main else build_data(config, adapter, processes, others)


def build_trainer(
    config: Config, adapter: Adapter, method: Method, tracker: Tracker, processes: Processes
) -> DistillTrainer:
    """The trainer over its runtime, still without hooks."""
    every = config.parallel.sync_every_micro_batch
    runtime = Runtime(
        method,
        config.trainer,
        tracker,
        processes,
        sync_every_micro_batch=every,
        averages=build_averages(config, method),
        source=adapter,
    )
    families = [adapter, *(handle.adapter for handle in method.bundle)]
    prepare = BatchPreparer(adapter.codec, conditioners_of(families), any_size=config.data.buckets)
    return DistillTrainer(method, prepare, config.trainer, runtime)


def save_result(config: Config, adapter: Adapter, trainer: DistillTrainer, folder: Path) -> None:
    """Save the student as a model folder: averaged weights if there are any, and the recipe that samples from it."""
    saving = Saving(trainer.runtime)
    weights: Weights = "ema" if saving.has_average("student") else "live"
    with saving.result("student", adapter) as (network, files):
        if network is None:
            return
        recipe = result_recipe(config, adapter.folder, weights, trainer.step)
        with replacing_folder(folder) as partial_folder:  # an interrupted save must not look like a result
            adapter.folder.save(partial_folder, network, recipe, slim=config.trainer.slim_result)
            for name, tensors in files.items():
                save_file(tensors, partial_folder / name, metadata={"format": "pt"})
