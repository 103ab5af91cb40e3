"""The code only becomes smaller: the measures of ``tools/shape.py`` keep to their budgets, and see what they should."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load_shape() -> ModuleType:
    """``tools/shape.py``, which is not in the package."""
    spec = importlib.util.spec_from_file_location("shape", ROOT / "tools" / "shape.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["shape"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


shape = load_shape()


@pytest.mark.parametrize("name", shape.MEASURES)
def test_budget(name: str) -> None:
    complaint = shape.BUDGETS[name].complaint(name, shape.MEASURES[name](shape.modules()))
    assert complaint is None, complaint


def test_a_budget_follows_what_is_earned() -> None:
    """Up to its goal, and not for a few lines."""
    budget = shape.Budget(100, goal=90)
    assert "may only become smaller" in budget.complaint("a", 101)
    assert "lower the budget in tools/shape.py to 94" in budget.complaint("a", 94)
    assert "lower the budget in tools/shape.py to 90" in budget.complaint("a", 50)
    assert budget.complaint("a", 96) is None
    assert shape.Budget(90, goal=90).complaint("a", 50) is None


def tree(root: Path, **files: str) -> dict[str, object]:
    """The modules of a package ``fastvideo.distillation`` with these files; ``__`` in a name is a folder."""
    folder = root / "fastvideo" / "distillation"
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found: dict[str, object] = shape.modules(root)
    return found


def test_closure(tmp_path: Path) -> None:
    """Imports in functions count, those under TYPE_CHECKING do not, and the façade hides its own folder alone."""
    start = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fastvideo.distillation.hint\n"
    start += (
        "def late():\n    from fastvideo.distillation import used\n    import fastvideo.distillation.engine.runtime\n"
    )
    code = tree(
        tmp_path,
        start=start,
        used="a = 1\n",
        hint="a = 1\n",
        engine__runtime="from fastvideo.distillation.engine import inner\nfrom fastvideo.distillation import below\n",
        engine__inner="a = 1\n",
        below='"""A docstring alone."""\n',
    )
    reached = {module.name.rpartition(".")[2] for module in shape.closure(["fastvideo.distillation.start"], code)}
    assert reached == {"start", "used", "runtime", "inner"}
    facade = shape.closure(["fastvideo.distillation.start"], code, facade=shape.RUNTIME)
    assert {module.name.rpartition(".")[2] for module in facade} == {"start", "used", "runtime"}


def test_sampling_loops(tmp_path: Path) -> None:
    """A function that calls a sampler, and one that has a loop of its own; not one that asks about many inputs."""
    own = "def f(role, x, times):\n    for t in times:\n        u = role.velocity(x, t)\n        x = x - u\n"
    code = tree(
        tmp_path,
        rollout="def euler(velocity, noise, times): ...\ndef full_time(x, t): ...\n",
        calls="from fastvideo.distillation.rollout import euler as walk\ndef f(v, n):\n    return walk(v, n, [1.0])\n",
        far="from fastvideo.distillation import rollout\ndef f(v, n):\n    return rollout.euler(v, n, [1.0])\n",
        own=own,
        asks="def f(role, xs, t):\n    for x in xs:\n        u = role.velocity(x, t)\n        print(u)\n",
        forced="def f(role, xs, past, t):\n    for x in xs:\n        u = role.velocity(x, t, context=past)\n"
        "        past = role.commit(past, x)\n",
        fills="from fastvideo.distillation.rollout import full_time\ndef f(x):\n    return full_time(x, 1.0)\n",
        methods__own=own,
    )
    files = [Path(site.partition("::")[0]).stem for site in shape.sampling_loops(code)]
    assert files == ["calls", "far", "own"]


def test_members(tmp_path: Path) -> None:
    """Those of a class and of its own bases, once each."""
    code = tree(
        tmp_path,
        base="class Base:\n    blocks: str = ''\n    def velocity(self): ...\n    def _hidden(self): ...\n",
        adapter="class DistillAdapter(Base, Generic[T]):\n    def __init__(self):\n        self.device = 1\n"
        "        self._x = 1\n    @property\n    def shape(self): ...\n    def velocity(self): ...\n",
    )
    assert shape.members("DistillAdapter", shape.classes(code)) == {"blocks", "velocity", "device", "shape"}
