"""``fastvideo VERB``. Nothing heavy is imported before a verb runs, so every ``--help`` is instant."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from fastvideo.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, RunError, Stopped, UserError

VERBS = {
    "distill": (
        "fastvideo.training.distillation",
        "train a student (or, with the method sft, a teacher) from a config",
    ),
    "plan": ("fastvideo.planning.plan_cli", "say what a run will need on every device, before it is started"),
    "checkpoints": ("fastvideo.training.checkpoints_cli", "list a run's checkpoints, and verify them"),
    "preprocess": ("fastvideo.data.preprocess_cli", "encode a folder of videos and captions once, to train on"),
    "precompute-trajectories": (
        "fastvideo.training.trajectories_cli",
        "store a teacher's walks from noise to data, to train the method kd on",
    ),
    "buckets": ("fastvideo.data.buckets_cli", "show which sizes a dataset has, and how many batches they give"),
    "generate": ("fastvideo.inference.cli", "make a video from a prompt with a student or a teacher"),
    "evaluate": ("fastvideo.evaluation.cli", "measure prompt accuracy, Frechet distance, diversity and time"),
    "export": ("fastvideo.inference.export_cli", "write a student as a pipeline folder that stock diffusers samples"),
    "report": ("fastvideo.evaluation.report_cli", "write the page of a run, or of several runs side by side"),
    "schedule": ("fastvideo.inference.schedule_cli", "show a config's noise levels: what the network is really given"),
    "conformance": ("fastvideo.conformance.cli", "check that a model family fulfils the adapter contract"),
    "list": ("fastvideo.inference.list_cli", "list methods and model families"),
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
        "start here:  fastvideo distill --config examples/distillation/tiny_wan_dmd2.yaml",
    ]
    return "\n".join(lines)


def report_user_errors(action: Callable[[], int]) -> int:
    """Run ``action``; what is for the user becomes one message on stderr and an exit code.

    2 for a mistake in what the user gave, 1 for a run that cannot go on, 75 for one that a scheduler's signal stopped,
    130 for one that Ctrl-C stopped.
    """
    try:
        return action()
    except (UserError, RunError) as error:
        if _is_first(str(error)):
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else 1
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":  # of several processes, all of which stopped, one says so
            print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _is_first(message: str) -> bool:
    """Whether no other process of a job has said so already."""
    if "WORLD_SIZE" not in os.environ:
        return True
    from fastvideo.distillation.engine.parallel.distributed import first_to_report

    return first_to_report(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a verb; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else EXIT_USER_ERROR
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"error: unknown verb {verb!r}{hint}\n\n{usage()}", file=sys.stderr)
        return EXIT_USER_ERROR
    from importlib import import_module

    module = import_module(VERBS[verb][0])
    return report_user_errors(lambda: int(module.main(rest)))


if __name__ == "__main__":
    raise SystemExit(main())
