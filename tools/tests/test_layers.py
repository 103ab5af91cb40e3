"""The picture of the layers is the code's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.layers import END, PAGE, START, nearest, redrawn

CONTRACT = """# a comment
[importlinter]
root_package = toy

[importlinter:contract:layers]
name = Toy: top above bottom
type = layers
layers =
    (toy.top)
    toy.left | toy.core.right
    toy.bottom
"""
FILES = {
    "top/run.py": "from toy.left import a\nimport toy.bottom\nfrom toy import unknown\n",
    "left.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy import bottom\n",
    "core/right.py": "import os\nfrom toy.core.other import thing\n",
    "core/other.py": "import toy.top\n",
    "bottom.py": "def later():\n    import json\n",
    "tests/test_all.py": "import toy.core.right, toy.top\n",
}
DRAWN = """┌────────────┐
│ top        │ → left
├────────────┤
│ left       │ → bottom
├╌╌╌╌╌╌╌╌╌╌╌╌┤
│ core.right │
├────────────┤
│ bottom     │
└────────────┘"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    (tmp_path / ".importlinter").write_text(CONTRACT)
    for name, text in FILES.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_picture_of_a_toy(toy: Path) -> None:
    """Nearest imports only; those of types count, those of tests and of modules outside the contract do not."""
    page = redrawn(f"before {START}stale{END} after", toy, "toy")
    assert page == f"before {START}\n\n```text\n{DRAWN}\n```\n\n{END} after"
    assert redrawn(page, toy, "toy") == page


def test_a_circle_keeps_its_arrows() -> None:
    imports = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"b", "d"}, "d": set[str]()}
    assert nearest(imports) == {**imports, "a": {"b", "c"}}


def test_the_page_is_drawn_from_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert redrawn(text) == text, "run: make layers"
