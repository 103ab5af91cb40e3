"""From exceptions to exit codes, for every program of the package: the verbs, the training entries, the demo."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from fastvideo.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, RunError, UserError
from fastvideo.stopping import Stopped, leave_word
from fastvideo.wording import see


def speak_utf8() -> None:
    """Start the program again in Python's UTF-8 mode if the locale has another encoding.

    Names of files and what is printed follow the locale, and there is no other way to change that (PEP 540): under
    ``LC_ALL=C`` a folder named in a config could not be made. The process keeps its id and its files.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def report_user_errors(action: Callable[[], int]) -> int:
    """Run ``action``; turn errors for the user into one message on stderr and an exit code.

    2 for a mistake in the user's input, 1 for a run that cannot go on, 75 for a run stopped by a scheduler's signal,
    130 for one stopped by Ctrl-C. The launch script learns the code too, which torchrun would keep to itself.
    """
    code = 1  # of an exception that ends in a traceback
    try:
        code = _code_of(action)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        leave_word(code)
    return code


def end_process(code: int) -> NoReturn:
    """End this process with ``code``; one of a group of processes without taking the interpreter apart.

    The threads of gloo and of the group's store outlive ``destroy_process_group``. One that wakes while the interpreter
    and the libraries are taken apart kills the process with SIGABRT or SIGSEGV, although all its work is done. Python's
    threads and exit hooks end as ever; exit hooks of C, and a profiler that waits for the program's end, do not run.
    """
    if "WORLD_SIZE" not in os.environ or "torch" not in sys.modules:
        raise SystemExit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are not daemons, pools' too
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _code_of(action: Callable[[], int]) -> int:
    """Exit code of an action, with the message of an error for the user printed."""
    try:
        return _run(action)
    except (UserError, RunError) as error:
        if _is_first(str(error)):
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else 1
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":  # all processes stop, one prints
            print(stop, file=sys.stderr)
        return stop.exit_code
    except (RuntimeError, MemoryError) as error:
        if not _ran_out_of_memory(error):
            raise
        what = str(error).splitlines()[0] if str(error) else "of this machine"
        print(f"error: out of memory: {what}{see('memory-runs-out')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(action: Callable[[], int]) -> int:
    """Run ``action``; under torchrun, which then names this process's error in its report."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return action()
    from fastvideo.distillation.engine.optional.recorder import recorded

    return recorded(action)() or 0


def _ran_out_of_memory(error: Exception) -> bool:
    """True for what Python and torch, on a CPU or a GPU, raise when memory runs out."""
    known = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(text in str(error) for text in known)


def _is_first(message: str) -> bool:
    """True if no other process of the job has printed this message."""
    if "WORLD_SIZE" not in os.environ:
        return True
    from fastvideo.distillation.engine.parallel.collective import first_to_report

    return first_to_report(message)
