"""Draw the layers in docs/architecture.md from the code: `make layers`, or `python -m tools.layers` from the root.

Boxes are the layers contract of `.importlinter`, arrows the actual imports.
"""

from __future__ import annotations

import ast
import configparser
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- layers: drawn by `make layers` -->", "<!-- end of layers -->"

Layers = list[tuple[str, list[str]]]
"""From the top down: separator of a layer's modules (`|` independent, `:` not) and their full names."""
Imports = Mapping[str, set[str]]


def layers_of(contracts: Path) -> Layers:
    """Layers of the first contract of type `layers` in an import-linter file."""
    config = configparser.ConfigParser(comment_prefixes=("#",), delimiters=("=",))
    config.read(contracts, encoding="utf-8")
    contract = next(section for section in config.values() if section.get("type") == "layers")
    lines = [line for line in contract["layers"].splitlines() if line.strip()]
    return [_layer(line) for line in lines]


def _layer(line: str) -> tuple[str, list[str]]:
    between = ":" if ":" in line else "|"
    return between, [name.strip(" ()") for name in line.split(between)]


def imports_of(root: Path, package: str, modules: list[str]) -> Imports:
    """Direct imports between `modules`, of every file of `package` outside its tests, those of types too."""
    found: dict[str, set[str]] = {module: set() for module in modules}
    for path in sorted((root / package).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        owner = _owner(name, modules)
        if owner and not name.startswith(f"{package}.tests"):
            targets = (_owner(target, modules) for target in _targets(path))
            found[owner] |= {target for target in targets if target and target != owner}
    return found


def _owner(name: str, modules: list[str]) -> str | None:
    """The innermost of `modules` that holds the module or the object `name`."""
    holders = [module for module in modules if f"{name}.".startswith(f"{module}.")]
    return max(holders, key=len, default=None)


def _targets(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def nearest(imports: Imports) -> Imports:
    """The imports without those that another import reaches; a circle keeps its arrows."""
    return {module: _nearest(module, targets, imports) for module, targets in imports.items()}


def _nearest(module: str, targets: set[str], imports: Imports) -> set[str]:
    below = {target: _below(target, {**imports, module: set()}) for target in targets}
    return {t for t in targets if not any(t in below[o] and o not in below[t] for o in targets - {t})}


def _below(module: str, imports: Imports) -> set[str]:
    seen: set[str] = set()
    waiting = [*imports[module]]
    while waiting:
        if (target := waiting.pop()) not in seen:
            seen.add(target)
            waiting += imports[target]
    return seen


def picture(layers: Layers, imports: Imports, package: str) -> str:
    """The layers as boxes from the top down, with the nearest imports of each module beside it."""
    modules = [module for _, names in layers for module in names]
    short = {module: module.removeprefix(f"{package}.") for module in modules}
    width = max(map(len, short.values())) + 2
    lines = ["┌" + "─" * width + "┐"]
    for number, (between, names) in enumerate(layers):
        for position, module in enumerate(names):
            if position and between == "|":
                lines.append("├" + "╌" * width + "┤")
            lines.append(f"│ {short[module]:{width - 1}}│{_arrows([m for m in modules if m in imports[module]])}")
        lines.append("└" + "─" * width + "┘" if number == len(layers) - 1 else "├" + "─" * width + "┤")
    return "\n".join(lines)


def _arrows(targets: list[str]) -> str:
    return f" → {', '.join(target.rsplit('.', 1)[-1] for target in targets)}" if targets else ""


def redrawn(page: str, root: Path = ROOT, package: str = "fastvideo") -> str:
    """The page with the picture between its two marks drawn anew."""
    layers = layers_of(root / ".importlinter")
    imports = imports_of(root, package, [module for _, names in layers for module in names])
    before, rest = page.split(START)
    after = rest.split(END)[1]
    drawn = picture(layers, nearest(imports), package)
    return f"{before}{START}\n\n```text\n{drawn}\n```\n\n{END}{after}"


def main() -> None:
    PAGE.write_text(redrawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
