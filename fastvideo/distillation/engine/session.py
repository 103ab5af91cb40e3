"""``Session``: one launch of a run, from joining the other processes to leaving them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from fastvideo.distillation.config.schema import RunConfig
from fastvideo.distillation.config.sections import TrainerConfig
from fastvideo.distillation.engine.checkpoint.manifest import Manifest, step_of
from fastvideo.distillation.engine.checkpoint.restore import check_intact, fetched, newest
from fastvideo.distillation.engine.optional.memory import keep_freed_memory
from fastvideo.distillation.engine.optional.mirror import checkpoints_at, set_aside
from fastvideo.distillation.engine.optional.recorder import STACKS, record_collectives
from fastvideo.distillation.engine.optional.startup import StartUp
from fastvideo.distillation.engine.parallel.collective import Agreement, check_agreement, naming_lost_ranks
from fastvideo.distillation.engine.parallel.distributed import Processes, barrier, start_processes, stop_processes
from fastvideo.distillation.engine.tracking import Tracker, check_installed
from fastvideo.stopping import listening
from fastvideo.storage import Place, Remote


class Session:
    """This process among all, its tracker, its start-up clock.

    Raises:
        UserError: for a tracker whose package is not installed.
    """

    check_agreement = staticmethod(check_agreement)
    wait_for_all = staticmethod(barrier)

    def __init__(self, config: RunConfig[Any, Any], processes: Processes, start: StartUp) -> None:
        for backend in config.tracking.backends:
            check_installed(backend)
        self.processes, self.start = processes, start
        self.tracker = Tracker(Path(config.output), enabled=processes.is_main, options=config.tracking)

    @staticmethod
    @contextmanager
    def open(config: RunConfig[Any, Any], began: float | None = None) -> Iterator[Session]:
        """Listen for signals and join the other processes, until the context ends.

        Args:
            config: of the run.
            began: launch time of the run (``time.monotonic``), for the time to its first step; default: now.

        Raises:
            UserError: if the processes do not fit the layout.
            RunError: naming the processes that were lost meanwhile.
        """
        start = StartUp(monotonic() if began is None else began)
        start.reached("imports")
        _set_up_process(config.trainer)
        record_collectives(Path(config.output) / STACKS)
        with listening(config.trainer.stop_signals):
            processes = start_processes(config.device, config.parallel)
            try:
                with naming_lost_ranks():
                    yield Session(config, processes, start)
            finally:
                stop_processes()

    def find_checkpoint(self, folder: Path, wanted: Place | None, mirror: str | None = None) -> Path | None:
        """Verify ``wanted``, or find the newest intact checkpoint in ``folder``; ``None`` if there is none.

        A ``wanted`` one at a URL, and a newer one at the ``mirror``, is downloaded into ``folder``.

        Raises:
            UserError: if ``wanted``, or every complete checkpoint, is damaged.
        """
        if isinstance(wanted, Remote):
            return fetched(wanted, folder, self.tracker.say)
        if wanted is not None:
            check_intact(wanted, self.processes)
        return wanted or newest(folder, self.processes, self.tracker.say, mirror)

    @staticmethod
    def saved_step(checkpoint: Path) -> int:
        """Step of an intact checkpoint."""
        return Manifest.read(checkpoint).step

    def prepare_mirror(self, url: str | None, resumed: Path | None) -> None:
        """Check that a run can write its mirror, and set aside what is later there than the ``resumed`` checkpoint.

        Raises:
            UserError: if the bucket does not exist or cannot be written, or holds another run.
            RunError: if it cannot be reached.
        """
        if url is None:
            return
        root, step = checkpoints_at(url), None if resumed is None else step_of(resumed)
        Agreement().on_main(lambda: set_aside(root, step, self.tracker.say))


def _set_up_process(options: TrainerConfig) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.keep_freed_memory:
        keep_freed_memory()
    # Weights that decay towards zero become denormal, and arithmetic on those is many times slower on a CPU.
    torch.set_flush_denormal(True)
