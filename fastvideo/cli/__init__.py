"""``fastvideo VERB``. Nothing heavy is imported before a verb runs, so every ``--help`` is instant."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from fastvideo.entry import end_process, report_user_errors, speak_utf8
from fastvideo.errors import EXIT_USER_ERROR
from fastvideo.wording import did_you_mean

VERBS = {
    "distill": (
        "fastvideo.training.distillation",
        "train a student (or, with the method sft, a teacher) from a config",
    ),
    "doctor": ("fastvideo.cli.doctor", "check driver, packages, disks and output folder, before a run costs"),
    "plan": ("fastvideo.cli.plan", "predict what a run needs on every device, before it is started"),
    "checkpoints": ("fastvideo.cli.checkpoints", "list a run's checkpoints, and verify them"),
    "preprocess": ("fastvideo.cli.preprocess", "encode a folder of videos and captions once, to train on"),
    "precompute-trajectories": (
        "fastvideo.cli.precompute_trajectories",
        "store a teacher's trajectories from noise to data, to train the method kd on",
    ),
    "buckets": ("fastvideo.cli.buckets", "show the sizes in a dataset, and the batches that they give"),
    "generate": ("fastvideo.cli.generate", "make a video from a prompt with a student or a teacher"),
    "live": ("fastvideo.cli.live", "play a streaming student on a page of this machine, and steer it while it plays"),
    "evaluate": ("fastvideo.cli.evaluate", "measure how good a student is, against its teacher or a known truth"),
    "average": ("fastvideo.cli.average", "average a finished run's student anew, and choose the best average"),
    "export": ("fastvideo.cli.export", "write a student as a pipeline folder that stock diffusers samples"),
    "merge": ("fastvideo.cli.merge", "merge LoRA files of any program into a model, or read its network from one file"),
    "report": ("fastvideo.cli.report", "write the page of a run, or of several runs side by side"),
    "schedule": ("fastvideo.cli.schedule", "show a config's noise levels: the network's real input"),
    "conformance": ("fastvideo.cli.conformance", "check that a model family or a method fulfils its contract"),
    "list": ("fastvideo.cli.listing", "list methods and model families"),
    "recipes": ("fastvideo.cli.recipes", "list the ready configs, which `distill --config NAME` takes by name"),
}
"""Verb -> (module with ``main(argv) -> int``, one line of help)."""

WIDTH = max(map(len, VERBS))


def usage() -> str:
    """The top-level help."""
    lines = [
        "usage: fastvideo VERB [options]        fastvideo VERB --help shows a verb's options",
        "",
        "Distil a slow video diffusion model into a student that needs 1-8 network calls.",
        "",
        *(f"  {verb:<{WIDTH}} {text}" for verb, (_, text) in VERBS.items()),
        "",
        "start here:  fastvideo distill --config tiny_wan_dmd2",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a verb; returns the exit code."""
    if argv is None:
        speak_utf8()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else EXIT_USER_ERROR
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        print(f"error: unknown verb {verb!r}{did_you_mean(verb, VERBS)}\n\n{usage()}", file=sys.stderr)
        return EXIT_USER_ERROR
    module = import_module(VERBS[verb][0])
    return report_user_errors(lambda: int(module.main(rest)))


def program() -> NoReturn:
    """Run the command ``fastvideo``, of this process's arguments."""
    end_process(main())
