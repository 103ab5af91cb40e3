"""The rules of the code base, as tests: who imports whom, how long functions may be, what may be loaded when."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fastvideo.cli import VERBS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastvideo"
TOOLS = ROOT / "tools"
SOURCES = sorted(PACKAGE.rglob("*.py"))

MAX_FUNCTION, MAX_METHOD = 60, 160
HEAVY = ("torch", "diffusers", "transformers", "pydantic")
DISTRIBUTIONS = {
    "PIL": "pillow",
    "annotated_types": "annotated-types",
    "huggingface_hub": "huggingface-hub",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def test_import_contracts() -> None:
    """``.importlinter``: layers, forbidden imports and independent families."""
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / ".importlinter"), cache_dir=None) == 0, "run: make contracts"


@cache
def parsed(source: Path) -> ast.Module:
    """A file's syntax tree, which several rules read."""
    return ast.parse(source.read_text(encoding="utf-8"))


def imports_of(source: Path) -> Iterator[str]:
    """Every module that a file imports, under TYPE_CHECKING and inside functions too."""
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_process_groups_live_in_the_engine_alone() -> None:
    allowed = {PACKAGE / "distillation" / "engine", PACKAGE / "tests"}
    others = [source for source in SOURCES if not allowed & set(source.parents)]
    found = {source.name for source in others for name in imports_of(source) if name.startswith("torch.distributed")}
    assert not found


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(d for extra in ("live", "quantise", "gguf") for d in project["optional-dependencies"][extra]),
    ]
    known = {line.split(">")[0] for line in declared} | {"fastvideo"} | sys.stdlib_module_names
    library = [source for source in SOURCES if PACKAGE / "tests" not in source.parents]
    imported = {name.split(".")[0] for source in library for name in imports_of(source)}
    assert {DISTRIBUTIONS.get(name, name) for name in imported} <= known


def functions() -> Iterator[tuple[str, int]]:
    """Name and length in lines of every function, its docstring included."""
    for source in [*SOURCES, *sorted(TOOLS.rglob("*.py"))]:
        for node in ast.walk(parsed(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{source.relative_to(ROOT)}::{node.name}", node.end_lineno - node.lineno + 1


def test_no_function_is_longer_than_a_screen() -> None:
    assert not {name: lines for name, lines in functions() if lines > MAX_FUNCTION}


def test_an_algorithm_fits_on_two_screens() -> None:
    methods = [source for source in SOURCES if source.parent.parent == PACKAGE / "distillation" / "methods"]
    lengths = {source: len(source.read_text().splitlines()) for source in methods}
    assert not {str(s.relative_to(ROOT)): lines for s, lines in lengths.items() if lines > MAX_METHOD}


HELP = f"""
import sys
from fastvideo.cli import VERBS, main
for arguments in [[], *([verb] for verb in VERBS)]:
    before = set(sys.modules)
    try:
        code = main([*arguments, "--help"])
    except SystemExit as stop:
        code = stop.code
    heavy = [name for name in {HEAVY} if name in set(sys.modules) - before]
    print("checked", *arguments, code or "", *heavy)
"""


def test_help_is_instant() -> None:
    """No verb's help imports anything heavy; one process shows all of them, each line names what its verb loaded."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    checked = [line.split() for line in done.stdout.splitlines() if line.startswith("checked")]
    assert checked == [["checked"], *(["checked", verb] for verb in VERBS)]


def unencoded(source: Path) -> Iterator[int]:
    """Lines of calls that read or write a file as text and do not name its encoding."""
    for node in ast.walk(parsed(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        call = ast.unparse(node)
        as_text = re.search(r"(^|(?<!\bav)\.)open\(.*'[rwax][+t]*'", call)
        if re.search(r"\.(read|write)_text\([^()]*\)$", call) or as_text:
            yield node.lineno


def test_text_files_name_their_encoding() -> None:
    """Without it Python takes the locale's, and trains on other letters than the file has."""
    sources = [source for source in [*SOURCES, *sorted(TOOLS.rglob("*.py"))] if "tests" not in source.parts]
    assert not {f"{source.relative_to(ROOT)}:{line}" for source in sources for line in unencoded(source)}
    assert list(unencoded(Path(__file__)))
