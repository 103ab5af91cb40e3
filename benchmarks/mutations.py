"""Do the tests notice? Plant known errors in a copy of the package, one at a time, and run the tests that should fail.

python benchmarks/mutations.py --method dmd2      # without --method: all of them

Errors are listed in ``fastvideo/tests/distillation/mutations/METHOD.yaml``, one mapping each:

    - file: fastvideo/distillation/methods/fine_tuning/sft.py
      find: noise, t = self.rng.normal_like(batch.x0), self.times(len(batch))   # exactly once in the file
      replace: noise, t = self.rng.normal_like(batch.x0), 1 - self.times(len(batch))
      why: time runs backwards
      tests: [fastvideo/tests/distillation/analytic/test_sft_analytic.py::test_uniform_times_are_shifted]

Nothing is changed in place. Exit code 0: the tests pass as they are, and notice every error; the last line is JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "fastvideo" / "tests" / "distillation" / "mutations"
KEYS = {"file", "find", "replace", "why", "tests"}
PASSED, FAILED = 0, 1
"""Exit codes of pytest; any other one means that it could not run the tests."""
LIBRARIES = (
    *("diffusers.models.autoencoders", "diffusers.models.transformers.transformer_wan", "diffusers.schedulers"),
    *("transformers", "transformers.models.umt5", "peft", "pyarrow.parquet", "av", "pytest"),
)
"""Imported once, and there for every process that is forked, whose tests start 2 to 6 seconds sooner."""
LIMIT = 600
"""Seconds that the tests of one error may take."""


@dataclass(frozen=True)
class Mutation:
    """One planted error."""

    file: str
    find: str
    replace: str
    why: str
    tests: tuple[str, ...]

    def planted(self, root: Path) -> str:
        """The file's text with the error in it.

        Raises:
            SystemExit: if ``find`` is not in the file exactly once: the code has moved on, and this entry has not.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        if text.count(self.find) != 1:
            raise SystemExit(
                f"error: stale mutation {self.why!r}: {self.find!r} is {text.count(self.find)} times in {self.file}"
            )
        return text.replace(self.find, self.replace)


def read(path: Path) -> list[Mutation]:
    """The entries of a file.

    Raises:
        SystemExit: for an entry with other keys than those.
    """
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    for entry in entries:
        if set(entry) != KEYS or not entry["tests"]:
            raise SystemExit(f"error: {path.name}: {entry} has not exactly the keys {sorted(KEYS)}, all filled")
    return [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def files(method: str | None = None) -> list[Path]:
    """The file of a method, or all.

    Raises:
        SystemExit: if there is none.
    """
    found = sorted(FOLDER.glob("*.yaml"))
    chosen = [path for path in found if method in (None, path.stem)]
    if not chosen:
        raise SystemExit(f"error: no mutations of {method!r}; there are {', '.join(path.stem for path in found)}")
    return chosen


def copy_tree(target: Path) -> Path:
    """A working copy of the project: the package's sources copied, all else linked."""
    for item in ROOT.iterdir():
        if item.name == "fastvideo":
            shutil.copytree(item, target / "fastvideo", ignore=shutil.ignore_patterns("__pycache__"))
        elif item.name not in (".git", "outputs"):
            (target / item.name).symlink_to(item)
    return target


def run_tests(root: Path, tests: Sequence[str], log: Path) -> int:
    """The exit code of pytest in a process of its own, which has torch already; what it prints goes to ``log``."""
    child = multiprocessing.get_context("fork").Process(target=_pytest, args=(root, tests, log))
    child.start()
    child.join(LIMIT)
    if child.is_alive():
        child.kill()
        child.join()
    assert child.exitcode is not None
    return child.exitcode


def _pytest(root: Path, tests: Sequence[str], log: Path) -> None:
    import pytest

    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(root)
    sys.path.insert(0, str(root))
    flags = ["-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "--rootdir", str(root)]
    flags += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # tyro has imported one of pytest's plugins
    sys.exit(int(pytest.main([*flags, *tests])))


def check(method: str, mutations: Sequence[Mutation], root: Path) -> Iterator[Mapping[str, Any]]:
    """What happens to each error, after a run of the same tests without one.

    Raises:
        SystemExit: if the tests fail as they are.
    """
    log = root / "pytest.log"
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    for mutation in mutations:
        mutation.planted(root)
    if run_tests(root, tests, log) != PASSED:
        raise SystemExit(f"error: {method}: the tests fail without any error planted:\n{log.read_text()[-3000:]}")
    for mutation in mutations:
        path = root / mutation.file
        before, begin = path.read_text(encoding="utf-8"), time.monotonic()
        path.write_text(mutation.planted(root), encoding="utf-8")
        code = run_tests(root, mutation.tests, log)
        path.write_text(before, encoding="utf-8")
        result = {PASSED: "missed", FAILED: "caught"}.get(code, "error")
        seconds = round(time.monotonic() - begin, 1)
        yield {"method": method, "result": result, "why": mutation.why, "file": mutation.file, "seconds": seconds}
        if result == "error":
            print(log.read_text()[-3000:], file=sys.stderr)


@dataclass(frozen=True)
class Arguments:
    """Plant the listed errors, and say which ones the tests notice."""

    method: str | None = None
    """Only the errors of this method."""


def main() -> int:
    """Print a line per error; the exit code."""
    import tyro

    arguments = tyro.cli(Arguments)
    sys.dont_write_bytecode = True  # a cached module could be of the text before: same second, same size
    for name in LIBRARIES:
        import_module(name)
    import torch

    torch.set_num_threads(1)
    results: list[Mapping[str, Any]] = []
    for path in files(arguments.method):
        with tempfile.TemporaryDirectory() as folder:
            for result in check(path.stem, read(path), copy_tree(Path(folder))):
                line = f"{result['method']:<12} {result['result']:<7} {result['seconds']:6.1f} s  {result['why']}"
                print(line, flush=True)
                results.append(result)
    counts = {kind: sum(r["result"] == kind for r in results) for kind in ("caught", "missed", "error")}
    print(json.dumps({**asdict(arguments), **counts, "mutations": results}))
    return 0 if counts["caught"] == len(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
