"""Measure the shape of the code: amount to read, and repetition.

    make shape        # or: python tools/shape.py

Prints each measure with its budget and its goal, and as last line one JSON object. Reads syntax trees alone, so nothing
of the package or of torch is imported. ``fastvideo/tests/test_shape.py`` holds the measures to their budgets.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DISTILLATION = "fastvideo.distillation"
DMD2 = f"{DISTILLATION}.methods.distribution_matching.dmd2"
CORE = (DMD2, f"{DISTILLATION}.trainer", f"{DISTILLATION}.adapters.wan")
ENGINE, RUNTIME = f"{DISTILLATION}.engine", f"{DISTILLATION}.engine.runtime"
ADAPTERS, METHODS = f"{DISTILLATION}.adapters", f"{DISTILLATION}.methods"
SAMPLE, ROLLOUTS = (
    f"{DISTILLATION}.sample",
    tuple(f"{DISTILLATION}.{name}" for name in ("rollout", "samplers", "causal_rollout")),
)
NETWORK_CALLS = {"velocity", "guided_velocity", "velocity_of", "x0", "x0_guided", "flow_map"}
"""Calls of a network; a loop that feeds their outputs back to them samples."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    name: str
    path: Path
    lines: int
    tree: ast.Module

    def within(self, *packages: str) -> bool:
        """True in one of those packages, or if it is one of those modules."""
        return any(self.name == package or self.name.startswith(f"{package}.") for package in packages)


@cache
def modules(root: Path = ROOT) -> dict[str, Module]:
    """Every file of the package by dotted name, tests included."""
    found = {}
    for path in sorted((root / "fastvideo").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name, text = ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text(encoding="utf-8")
        found[name] = Module(name, path, len(text.splitlines()), ast.parse(text))
    return found


def library(code: dict[str, Module]) -> list[Module]:
    return [module for module in code.values() if not module.within("fastvideo.tests")]


def running(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below ``node`` that can run: not those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from running(other)
            continue
        yield child
        yield from running(child)


def imports(module: Module, code: dict[str, Module]) -> set[str]:
    """Own modules that a module imports, at its top or in functions, with the packages above them."""
    named = set()
    for node in running(module.tree):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parents = {".".join(name.split(".")[:depth]) for name in named for depth in range(1, name.count(".") + 2)}
    return parents & set(code)


def has_code(module: Module) -> bool:
    """True unless the file holds a docstring alone."""
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in module.tree.body)


def closure(starts: Sequence[str], code: dict[str, Module], facade: str | None = None) -> list[Module]:
    """Own files with code that ``starts`` reach by imports.

    Args:
        facade: a module of the engine whose imports inside the engine are not followed; it counts itself.
    """
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        if (name := waiting.pop()) in found:
            continue
        found.add(name)
        reached = imports(code[name], code)
        waiting += [other for other in reached if name != facade or not code[other].within(ENGINE)]
    return [code[name] for name in sorted(found) if has_code(code[name])]


def core(code: dict[str, Module]) -> list[Module]:
    """Files to read for DMD2 on Wan: the engine up to its façade, if it has one."""
    return closure(CORE, code, facade=RUNTIME if RUNTIME in code else None)


def lines(files: Iterable[Module]) -> int:
    return sum(file.lines for file in files)


def functions(module: Module) -> Iterator[Function]:
    """Every function of a file, also inside classes and other functions."""
    return (node for node in ast.walk(module.tree) if isinstance(node, Function))


def velocity_definitions(code: dict[str, Module]) -> list[str]:
    """Each ``def velocity`` outside families (``adapters/``), closures included."""
    outside = [module for module in library(code) if not module.within(ADAPTERS)]
    return [f"{m.path}:{node.lineno}" for m in outside for node in functions(m) if node.name == "velocity"]


def called(node: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls below ``node``, each with the last part of its name."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name | ast.Attribute):
            yield call.func.id if isinstance(call.func, ast.Name) else call.func.attr, call


def samplers_in(module: Module, code: dict[str, Module]) -> set[str]:
    """Local names of imported rollout functions that take ``times``."""
    found: set[str] = set()
    for node in (node for node in running(module.tree) if isinstance(node, ast.ImportFrom)):
        for alias in node.names:
            if node.module in ROLLOUTS and alias.name in stepping(code, node.module):
                found.add(alias.asname or alias.name)
            found |= stepping(code, f"{node.module}.{alias.name}")
    return found


def stepping(code: dict[str, Module], rollout: str) -> set[str]:
    """Functions of a rollout module that take ``times``; none for another module."""
    if rollout not in ROLLOUTS or rollout not in code:
        return set()
    return {node.name for node in functions(code[rollout]) if "times" in {given.arg for given in node.args.args}}


def feeds_back(loop: ast.For | ast.While) -> bool:
    """True if a network call reads a name that the previous pass set: a loop from noise to data.

    The past of a causal call is not its input: a loop over given chunks carries it and samples nothing.
    """
    calls = [call for name, call in called(loop) if name in NETWORK_CALLS]
    inputs = [part for call in calls for part in (*call.args, *(k for k in call.keywords if k.arg != "context"))]
    asked = {part.id for node in inputs for part in ast.walk(node) if isinstance(part, ast.Name)}
    return bool(asked & carried(loop.body))


def carried(body: Sequence[ast.stmt]) -> set[str]:
    """Names that statements read before they set them."""
    read: set[str] = set()
    stored: set[str] = set()
    for statement in body:
        names = [part for part in ast.walk(statement) if isinstance(part, ast.Name)]
        read |= {part.id for part in names if isinstance(part.ctx, ast.Load)} - stored
        stored |= {part.id for part in names if isinstance(part.ctx, ast.Store)}
    return read & stored


def samples(function: Function, samplers: set[str]) -> bool:
    """True if a function calls one of the rollout's samplers, or has a loop of its own."""
    if any(name in samplers for name, _ in called(function)):
        return True
    return any(feeds_back(node) for node in ast.walk(function) if isinstance(node, ast.For | ast.While))


def outermost(module: Module) -> Iterator[Function]:
    """Functions and methods outside other functions."""

    def below(nodes: Sequence[ast.AST]) -> Iterator[Function]:
        for node in nodes:
            if isinstance(node, Function):
                yield node
            else:
                yield from below(list(ast.iter_child_nodes(node)))

    return below(module.tree.body)


def sampling_loops(code: dict[str, Module]) -> list[str]:
    """Sampling functions outside methods and rollouts; ``sample.py`` counts as one."""
    found = []
    for module in library(code):
        if module.within(METHODS, *ROLLOUTS):
            continue
        samplers = samplers_in(module, code)
        names = [node.name for node in outermost(module) if samples(node, samplers)]
        found += [f"{module.path}::{name}" for name in (names[:1] if module.name == SAMPLE else names)]
    return found


def classes(code: dict[str, Module]) -> dict[str, ast.ClassDef]:
    """Classes of the package without tests, by name."""
    nodes = (node for module in library(code) for node in ast.walk(module.tree))
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def members(name: str, known: dict[str, ast.ClassDef]) -> set[str]:
    """Public attributes of a class and of its own bases: methods, properties, class and instance attributes."""
    if name not in known:
        return set()
    found: set[str] = set()
    for base in known[name].bases:
        root = base.value if isinstance(base, ast.Subscript) else base
        found |= members(ast.unparse(root).split(".")[-1], known)
    for node in known[name].body:
        if isinstance(node, Function):
            found |= {node.name, *_set_on_self(node)}
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {member for member in found if not member.startswith("_")}


def _set_on_self(function: Function) -> set[str]:
    nodes = (node for node in ast.walk(function) if isinstance(node, ast.Attribute))
    return {n.attr for n in nodes if isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self"}


def length(function: Function) -> int:
    """Lines of a function, its docstring included and its decorators not."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def longest_function(code: dict[str, Module]) -> int:
    return max(length(function) for module in code.values() for function in functions(module))


MEASURES: dict[str, Callable[[dict[str, Module]], int]] = {
    "dmd2_lines": lambda code: lines(closure([DMD2], code)),
    "dmd2_files": lambda code: len(closure([DMD2], code)),
    "core_lines": lambda code: lines(core(code)),
    "core_files": lambda code: len(core(code)),
    "velocity_definitions": lambda code: len(velocity_definitions(code)),
    "sampling_loops": lambda code: len(sampling_loops(code)),
    "adapter_members": lambda code: len(members("DistillAdapter", classes(code))),
    "longest_function": longest_function,
    "package_lines": lambda code: lines(library(code)),
}


@dataclass(frozen=True)
class Budget:
    """Upper bound of a measure now, and its goal."""

    now: int
    goal: int

    def complaint(self, name: str, value: int) -> str | None:
        """Message for a value above the budget, or so far below that the budget must follow; ``None`` if fine."""
        if value > self.now:
            return f"{name} is {value}, its budget is {self.now}: the code may only become smaller"
        if (least := max(value, self.goal)) < 0.95 * self.now:
            return f"{name} is {value}, its budget {self.now}: lower the budget in tools/shape.py to {least}"
        return None


BUDGETS = {
    "dmd2_lines": Budget(1400, goal=1400),
    "dmd2_files": Budget(12, goal=12),
    "core_lines": Budget(2900, goal=2900),
    "core_files": Budget(22, goal=22),
    "velocity_definitions": Budget(2, goal=2),
    "sampling_loops": Budget(1, goal=1),
    "adapter_members": Budget(14, goal=14),
    "longest_function": Budget(60, goal=60),
    "package_lines": Budget(49550, goal=19000),
}
"""Lower a budget in the commit that earns it; raise it for a feature alone, in a commit that names it."""


def measured(root: Path = ROOT) -> dict[str, int]:
    """Every measure of the tree at ``root``."""
    code = modules(root)
    return {name: measure(code) for name, measure in MEASURES.items()}


def main() -> int:
    """Print the table and the JSON object; 1 if a budget does not hold."""
    found = measured()
    print(f"{'measure':<24}{'today':>8}{'budget':>8}{'goal':>8}")
    for name, value in found.items():
        print(f"{name:<24}{value:>8}{BUDGETS[name].now:>8}{BUDGETS[name].goal:>8}")
    complaints = [text for name, value in found.items() if (text := BUDGETS[name].complaint(name, value))]
    print(*complaints, json.dumps(found), sep="\n")
    return int(bool(complaints))


if __name__ == "__main__":
    raise SystemExit(main())
