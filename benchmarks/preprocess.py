"""``fastvideo preprocess`` beside a bare loop over the same files and the same VAE, and after being killed.

    python benchmarks/preprocess.py --videos 32 --scale 4 --rounds 3
    python benchmarks/preprocess.py --videos 48 --kills 20

The bare loop decodes each file with PyAV, takes the first frames and encodes them: no captions, no text encoder, no
Parquet. Both run in ``workers`` fresh processes of one thread each, in turn; seconds are those of the processors, so
that another job on the machine does not count, and wall time is printed beside them.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parents[1]
REAPER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: processes that outlive their parent are waited for here
code = subprocess.call(sys.argv[1:])
try:
    while True:
        os.wait()
except ChildProcessError:
    sys.exit(code)
"""
"""Runs a command and waits for everything that it started, so that its processor time is counted."""


@dataclass(frozen=True)
class Arguments:
    """Compare with a bare loop, or kill again and again."""

    videos: int = 32
    """Video files of the tiny world."""
    scale: int = 4
    """Every pixel of it becomes a square of this side: 4 gives videos of 128 x 128."""
    workers: int = 1
    """Processes of both."""
    rounds: int = 3
    """Repetitions, in turn."""
    kills: int = 0
    """Instead: kill the command at this many random moments and compare the rows with those of an undisturbed call."""
    folder: Path = Path("outputs/benchmark_preprocess")
    """Where everything goes."""


def bare_loop(paths: Sequence[Path]) -> None:
    """Decode and encode, and nothing else."""
    import av
    import torch

    from fastvideo.data.model import choose_model

    torch.set_num_threads(1)
    adapter = choose_model("tiny", {}).adapter("cpu")
    for path in paths:
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)][:9]
        video = torch.stack(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        adapter.codec.encode(video)


def bare(paths: list[Path], workers: int) -> None:
    """The loop in so many processes."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=bare_loop, args=(paths[i::workers],)) for i in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def command(videos: Path, out: Path, arguments: Arguments, per_file: int) -> list[str]:
    """The command that is measured."""
    side = str(32 * arguments.scale)
    program = [sys.executable, "-m", "fastvideo.cli", "preprocess", str(videos), "--model", "tiny", "--out", str(out)]
    program += ["--height", side, "--width", side]
    return [*program, "--workers", str(arguments.workers), "--videos-per-file", str(per_file)]


def seconds_of(action: Any) -> tuple[float, float]:
    """Processor and wall seconds of the processes that an action starts."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    action()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.monotonic() - begin


def compare(arguments: Arguments, videos: Path) -> None:
    """Print throughput of both, and their ratio; the time of an (almost) empty call is start-up and taken off."""
    few = videos.with_name("few")
    shutil.rmtree(few, ignore_errors=True)
    shutil.copytree(
        videos, few, ignore=lambda _, names: sorted(n for n in names if n.endswith(".mp4"))[arguments.workers :]
    )
    names = sorted(path.name for path in few.glob("*.mp4"))
    lines = (few / "captions.csv").read_text().splitlines()
    (few / "captions.csv").write_text("\n".join([lines[0], *(x for x in lines if x.split(",")[0] in names)]) + "\n")
    out = arguments.folder / "out"
    counted = arguments.videos - arguments.workers

    def ours(folder: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        per_file = 1 if folder == few else 8  # one file per process, so that all of them start
        whole = [sys.executable, "-c", REAPER, *command(folder, out, arguments, per_file)]
        subprocess.run(whole, check=True, capture_output=True)

    for _ in range(arguments.rounds):
        measured = {}
        for name, run in (("bare", lambda f: bare(sorted(f.glob("*.mp4")), arguments.workers)), ("ours", ours)):
            start, whole = seconds_of(lambda run=run: run(few)), seconds_of(lambda run=run: run(videos))
            measured[name] = whole[0] - start[0]
            rate = counted / measured[name]
            print(f"{name}: {rate:6.1f} videos per processor second", end="; processors and wall: ")
            print("start-up {:.1f} s, {:.1f} s; all {:.1f} s, {:.1f} s".format(*start, *whole))
        print(f"ours at {measured['bare'] / measured['ours']:.2f}x of the bare loop", flush=True)


def kill_again_and_again(arguments: Arguments, videos: Path) -> None:
    """Print at which moments it was killed, and whether the rows are the same in the end."""
    from fastvideo.data.clips import Policy, Size
    from fastvideo.data.model import choose_model
    from fastvideo.data.preprocess import make_job, preprocess

    side, folders = 32 * arguments.scale, [arguments.folder / name for name in ("whole", "killed")]
    policy, choice = Policy((Size(side, side, 9),)), choose_model("tiny", {})
    whole, killed = (make_job(videos, None, choice, policy, out, 4, "cpu") for out in folders)
    begin = time.monotonic()
    preprocess(whole, workers=1, overwrite=True)
    length, draw, kills = time.monotonic() - begin, random.Random(0), 0
    shutil.rmtree(killed.out, ignore_errors=True)
    while kills < arguments.kills:
        # Forked: everything is imported already, so that a kill meets the work and not the start of Python.
        process = multiprocessing.get_context("fork").Process(target=preprocess, args=(killed,), kwargs={"workers": 1})
        process.start()
        process.join(draw.uniform(0, length / 4))
        hit = process.is_alive()
        process.kill()
        process.join()
        kills += hit
        done = len(list(killed.out.glob("*.parquet")))
        print(f"{kills} kills, {done} of {killed.files} files done", flush=True)
        if not hit:
            report_same(whole.out, killed.out)
            shutil.rmtree(killed.out)
    preprocess(killed, workers=1)
    report_same(whole.out, killed.out)


def report_same(whole: Path, killed: Path) -> None:
    """Compare all files."""
    same = [path.read_bytes() == (killed / path.name).read_bytes() for path in sorted(whole.iterdir())]
    print(f"{sum(same)} of {len(same)} files identical to those of the undisturbed call", flush=True)


def main() -> None:
    """Run what was asked for."""
    arguments = tyro.cli(Arguments)
    from fastvideo.tiny.video_files import write_world

    videos = write_world(arguments.folder / "videos", arguments.videos, scale=arguments.scale)
    (kill_again_and_again if arguments.kills else compare)(arguments, videos)


if __name__ == "__main__":
    main()
