"""Traces of a process that fails or hangs: its error for torchrun's report, and its last collectives.

torch's flight recorder keeps the last collectives of every process: which one, of what shape, called from where, begun
and done or not. ``torchfrtrace`` compares the files of NCCL of all ranks.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

from fastvideo.errors import RunError, UserError
from fastvideo.stopping import Stopped

STACKS = "stacks"
"""Folder of a run for stacks and collectives of processes that hang."""
ENTRIES = 2000
"""Collectives that are kept, of the newest; torch's own number since 2.13."""


def record_collectives(folder: Path) -> None:
    """Keep the last collectives, and have NCCL's watchdog write them to ``folder/nccl-rank-N`` when one times out.

    Call it before a process group is made. What the environment says already stays.
    """
    wanted = {
        "TORCH_FR_BUFFER_SIZE": str(ENTRIES),
        "TORCH_FR_DUMP_TEMP_FILE": str(folder.resolve() / "nccl-rank-"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    if torch.__version__ < "2.13":  # the name before; newer versions warn of it
        wanted["TORCH_NCCL_TRACE_BUFFER_SIZE"] = str(ENTRIES)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def write_collectives(folder: Path, rank: int) -> None:
    """Write this process's last collectives, those of NCCL and of gloo apart, each a pickled dictionary."""
    if not dist.is_initialized():
        return
    kinds = {"gloo": torch._C._distributed_c10d._dump_fr_trace}  # type: ignore[attr-defined]
    if "nccl" in str(dist.get_backend_config()):
        kinds["nccl"] = torch._C._distributed_c10d._dump_nccl_trace  # type: ignore[attr-defined]
    for kind, dump in kinds.items():
        (folder / f"{kind}-rank-{rank}").write_bytes(dump())


def recorded(action: Callable[[], int]) -> Callable[[], int | None]:
    """``action`` under torchrun, which reports its error as that of this process.

    A mistake of the user is printed once for all processes, and a signal is no error: neither is reported again.
    """
    return record(action, _ErrorFile())


class _ErrorFile(ErrorHandler):
    """Writes the file that torchrun reads; an error that explains itself goes there without its traceback."""

    def record_exception(self, e: BaseException) -> None:
        if isinstance(e, RunError):
            found = {"message": f"{type(e).__name__}: {e}", "timestamp": int(time.time())}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(found))
        elif not isinstance(e, UserError | Stopped):
            super().record_exception(e)
