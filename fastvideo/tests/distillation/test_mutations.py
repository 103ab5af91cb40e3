"""The lists of planted errors still fit the code; that tests notice them is what ``benchmarks/mutations.py`` shows."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
LISTS = sorted((Path(__file__).parent / "mutations").glob("*.yaml"))


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "benchmarks" / "mutations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_planted_error_still_applies(path: Path, runner: ModuleType) -> None:
    mutations = runner.read(path)
    assert len({mutation.why for mutation in mutations}) == len(mutations)
    for mutation in mutations:
        planted = mutation.planted(ROOT)
        assert planted != (ROOT / mutation.file).read_text(), mutation.why
        ast.parse(planted)
        for test in mutation.tests:
            file, _, name = test.partition("::")
            assert f"def {name.split('[')[0]}" in (ROOT / file).read_text(), test


def test_a_stale_entry_is_an_error(runner: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1\na = 1\n")
    for find in ("a = 1", "a = 2"):
        mutation = runner.Mutation("code.py", find, "a = 3", "wrong", ("test",))
        with pytest.raises(SystemExit, match="stale mutation"):
            mutation.planted(tmp_path)


NIGHTLY = """
import pytest

@pytest.mark.nightly
def test_that_fails():
    assert False
"""


def test_errors_are_noticed_by_nightly_tests_too(runner: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = nightly: as in pyproject.toml\n")
    (tmp_path / "test_nightly.py").write_text(NIGHTLY)
    found = runner.run_tests(tmp_path, ["test_nightly.py::test_that_fails"], tmp_path / "log")
    assert found == runner.FAILED, (tmp_path / "log").read_text()
