"""``fastvideo preprocess``: a folder of videos to Parquet, in several processes, resumable after a kill.

Videos are dealt to output files by their name alone, and every row depends on nothing but its video: however many
processes there are and however often the work is interrupted, the same rows come out.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastvideo.data.captions import Video, find_videos
from fastvideo.data.clips import Policy
from fastvideo.data.model import ModelChoice
from fastvideo.data.output import SKIPPED, collect, prepare_output, shard_path, sources_key
from fastvideo.data.shards import ShardWriter
from fastvideo.distillation.types import UserError
from fastvideo.errors import RunError

FORMAT = 1
"""Raised when the same settings would make other rows."""
POLL = 0.2
"""Seconds between two looks at what the processes have done."""
IMPORTED = (__name__, "diffusers.models.autoencoders", "transformers")
"""What every process needs and takes seconds to import."""


@dataclass(frozen=True)
class Job:
    """All that a process needs to know.

    Attributes:
        choice: the model, at the size of the first bucket.
        policy: what becomes of a video.
        out: the folder.
        videos: all of them, in order.
        per_file: videos per output file.
        device: of the encoders: ``cpu``, ``cuda``, ``cuda:1``.
        model: its name, as given.
    """

    choice: ModelChoice
    policy: Policy
    out: Path
    videos: Sequence[Video]
    per_file: int
    device: str
    model: str

    @property
    def files(self) -> int:
        """Output files."""
        return -(-len(self.videos) // self.per_file)

    def part(self, number: int) -> Sequence[Video]:
        """The videos of one output file."""
        return self.videos[number * self.per_file : (number + 1) * self.per_file]

    def settings(self, codec_key: str) -> dict[str, Any]:
        """What every row depends on besides its video."""
        length = self.choice.fields.get("max_sequence_length")
        found = {"format": FORMAT, "model": self.model, "family": self.choice.family, "codec_key": codec_key}
        found |= {"latents": "normalised", "max_sequence_length": length, **self.policy.to_dict()}
        return {**found, "videos_per_file": self.per_file}


@dataclass(frozen=True)
class Summary:
    """What came out."""

    out: Path
    clips: int
    videos: int
    skipped: list[dict[str, str]]
    seconds: float
    encoded: int

    def __str__(self) -> str:
        rate = f", {self.encoded / self.seconds:.1f} videos/s" if self.encoded else ", nothing was left to do"
        bad = f"; {len(self.skipped)} skipped, see {self.out / SKIPPED}" if self.skipped else ""
        return f"{self.out}: {self.clips} clips of {self.videos - len(self.skipped)} videos{rate}{bad}"


def preprocess(job: Job, *, workers: int, overwrite: bool = False) -> Summary:
    """Write what is not there yet.

    Raises:
        UserError: for a mistake in what the user gave; nothing is written then.
        RunError: if a process dies; the same call goes on from there.
    """
    if workers > 1:
        _start_server()
    adapter = job.choice.adapter(job.device)
    if all(video.problem for video in job.videos):
        raise UserError(f"none of {len(job.videos)} videos has a caption: {job.videos[0].problem}")
    manifest = {"settings": job.settings(adapter.codec_key), "sources": sources_key(job.videos)}
    manifest |= {"videos": len(job.videos), "files": job.files}
    missing = prepare_output(job.out, manifest, overwrite=overwrite)
    begin, encoded = time.monotonic(), sum(len(job.part(number)) for number in missing)
    with progress(len(job.videos), len(job.videos) - encoded) as show:
        if workers == 1:
            _encode_here(job, manifest["settings"], missing, show)
        else:
            _encode_in_processes(job, manifest["settings"], missing, min(workers, max(1, len(missing))), show)
    clips, skipped = collect(job.out, job.files)
    return Summary(job.out, clips, len(job.videos), skipped, time.monotonic() - begin, encoded)


@contextmanager
def progress(total: int, before: int) -> Iterator[Callable[[int], None]]:
    """A bar with an estimate on stderr; call with the number of videos done by this call so far."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("encoding videos", total=total, completed=before)
        yield lambda done: bar.update(task, completed=before + done)


def _encode_here(job: Job, made: dict[str, Any], missing: Sequence[int], show: Callable[[int], None]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a process of its own: sums in another order would give other bits
    try:
        writer, before = ShardWriter(job.choice.adapter(job.device), job.policy, made), 0
        for number in missing:
            writer.write(shard_path(job.out, number), job.part(number), lambda done, base=before: show(base + done))
            before += len(job.part(number))
    finally:
        torch.set_num_threads(threads)


def _start_server() -> None:
    """Start the process that the others are forked from: it imports once for all, while this one loads the model."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED))
    forkserver.ensure_running()


def _encode_in_processes(
    job: Job, made: dict[str, Any], missing: Sequence[int], workers: int, show: Callable[[int], None]
) -> None:
    context = multiprocessing.get_context("forkserver")
    counts = context.RawArray("L", max(1, job.files))
    order, stop = context.Value("L", 0), context.Event()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job, made, counts, order, stop))
    try:
        _watch({pool.submit(_encode_file, number) for number in missing}, lambda: show(sum(counts)))
    except BrokenProcessPool as error:
        raise RunError("a process was killed (out of memory?); run the same command again to go on") from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _watch(pending: set[Future[None]], show: Callable[[], None]) -> None:
    while pending:
        finished, pending = wait(pending, timeout=POLL)
        show()
        for future in finished:
            future.result()


_worker: dict[str, Any] = {}
"""What a process keeps between two files."""


def _start_worker(job: Job, made: dict[str, Any], counts: Any, order: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and says so once
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with order.get_lock():
        number, order.value = order.value, order.value + 1
    device = job.device
    if device == "cuda":
        device = f"cuda:{number % torch.cuda.device_count()}"
    _worker.update(job=job, counts=counts, stop=stop, writer=ShardWriter(job.choice.adapter(device), job.policy, made))


def _die_with_parent() -> None:
    """A process that outlived a killed parent would write into the folder of the next call."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_file(number: int) -> None:
    job, counts = _worker["job"], _worker["counts"]

    def done(count: int) -> None:
        counts[number] = count
        if _worker["stop"].is_set():
            os._exit(1)

    _worker["writer"].write(shard_path(job.out, number), job.part(number), done)


def make_job(
    folder: Path, captions: Path | None, choice: ModelChoice, policy: Policy, out: Path, per_file: int, device: str
) -> Job:
    """The work on a folder of videos.

    Raises:
        UserError: if the folder, its captions or a size is not what it should be.
    """
    for size in policy.sizes:
        choice.sized(size.height, size.width, size.num_frames)
    first = policy.sizes[0]
    sized = choice.sized(first.height, first.width, first.num_frames)
    return Job(sized, policy, out, find_videos(folder, captions), per_file, device, str(choice.fields["path"]))
