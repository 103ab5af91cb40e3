"""Several gloo processes on this machine, forked, so that nothing is imported twice."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=30)
"""Of every collective: processes that run different forwards are a failure and not a hang."""


def in_world(size: int, work: Callable[[int, int], Any], folder: Path) -> list[Any]:
    """What ``work(rank, size)`` returns on each of ``size`` processes.

    Raises:
        AssertionError: with the traceback of the first process that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("fork")
    processes = [context.Process(target=_enter, args=(rank, size, work, folder)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [rank for rank in range(size) if not (folder / f"{rank}.pt").is_file()]
    assert not failed, "\n".join((folder / f"{rank}.txt").read_text() for rank in failed)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _enter(rank: int, size: int, work: Callable[[int, int], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", f"file://{folder}/store", TIMEOUT, size, rank)
        found = work(rank, size)
        torch.save(found, folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"rank {rank} of {size}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
