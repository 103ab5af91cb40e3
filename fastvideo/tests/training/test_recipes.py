"""Recipes by name, in a clone and in a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from fastvideo.cli import main
from fastvideo.distillation.config import recipes as module
from fastvideo.distillation.config.reading import read_config
from fastvideo.distillation.config.recipes import IN_CLONE, IN_WHEEL, PACKAGE, find_config, recipes
from fastvideo.errors import UserError
from fastvideo.wording import PAGE

NAMES = sorted(path.stem for path in IN_CLONE.glob("*.yaml"))


def test_every_example_is_a_recipe_by_name() -> None:
    assert sorted(recipes()) == NAMES
    for name in NAMES:
        assert find_config(name) == find_config(f"{name}.yaml") == IN_CLONE / f"{name}.yaml"


def test_a_file_wins_over_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny_wan_dmd2.yaml").write_text("")
    assert find_config("tiny_wan_dmd2.yaml") == Path("tiny_wan_dmd2.yaml")
    assert find_config("tiny_wan_dmd2") == IN_CLONE / "tiny_wan_dmd2.yaml"


def test_a_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"config tiny_wan_dmd: .*did you mean 'tiny_wan_dmd2'"):
        find_config("tiny_wan_dmd")


def test_a_recipe_brings_its_prompts_to_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = read_config("wan2.1_t2v_1.3b_dmd2")
    assert config.data.prompts == str(IN_CLONE / "prompts.txt")


def test_the_wheel_puts_the_examples_where_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    places = {PACKAGE.parent / source: PACKAGE.parent / target for source, target in included.items()}
    page = (PACKAGE.parent / "docs" / PAGE, PACKAGE / PAGE)
    assert places == dict([(IN_CLONE, IN_WHEEL), page])
    shutil.copytree(IN_CLONE, tmp_path / "recipes")
    monkeypatch.setattr(module, "IN_WHEEL", tmp_path / "recipes")
    monkeypatch.setattr(module, "IN_CLONE", tmp_path / "nowhere")
    assert sorted(recipes()) == NAMES
    assert read_config("wan2.1_t2v_1.3b_dmd2").data.prompts is not None


def test_a_built_wheel_holds_them(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=PACKAGE.parent, check=True)
    held = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    inside = [Path(name) for name in held if Path(name).parent == Path("fastvideo/recipes")]
    assert sorted(name.stem for name in inside if name.suffix == ".yaml") == NAMES
    assert not [name for name in held if name.startswith("fastvideo/tests")]


def test_the_verb_lists_each_with_method_family_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    named = {row[0]: row[1:] for row in rows if row and row[0]}
    assert sorted(named) == NAMES
    assert named["tiny_wan_dmd2"][:3] == ["dmd2", "wan", "CPU"]
    assert named["tiny_wan_dmd2"][3].startswith("Distils the tiny world")
    published = [f"wan2.1_t2v_{name}" for name in ("1.3b_dmd2", "1.3b_dmd2_lora", "14b_dmd2")]
    assert [named[name][2] for name in published] == ["from 8 GPUs", "from 1 GPU", "from 64 GPUs"]
