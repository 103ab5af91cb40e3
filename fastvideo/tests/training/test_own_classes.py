"""Methods and families of other packages are named in a config by module and class, in every command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from fastvideo.cli import main
from fastvideo.distillation.registry import load_adapter, load_method
from fastvideo.errors import UserError
from fastvideo.tests.faults.runs import analytic_run

OWN = """
from fastvideo.distillation.adapters.analytic import AnalyticAdapter
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Config, DMD2Method

class Config(DMD2Config):
    note: str = ""

class Method(DMD2Method):
    Config = Config

class Family(AnalyticAdapter):
    pass

VALUE = 1
"""


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_classes.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_method_and_a_family_of_a_file_here_train_and_resume_by_command(tmp_path: Path) -> None:
    values = analytic_run(tmp_path) | {"distill_model": "own_classes:Family", "distill_method": "own_classes:Method"}
    values["method"] |= {"note": "mine"}
    values |= {"output": str(tmp_path / "run"), "trainer": {"max_steps": 4, "log_every": 1, "threads": 1}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    assert main(["distill", "--config", "own.yaml"]) == 0
    assert main(["distill", "--config", "run/config.yaml", "--resume", "--trainer.max-steps", "8"]) == 0
    assert (tmp_path / "run" / "checkpoints" / "step-8").is_dir()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_file:Method", r"cannot import 'no_such_file' \(from .*\): No module named"),
        (":Method", "cannot import ''"),
        ("own_classes:Methud", "module 'own_classes' has no class 'Methud'"),
        ("own_classes:VALUE", "'own_classes:VALUE' is not a subclass of .*DistillMethod"),
        ("own_classes:Family", "'own_classes:Family' is not a subclass of .*DistillMethod"),
        ("dmd", r"unknown method 'dmd': one of .*, or package\.module:Class of your own; did you mean 'dmd2'"),
    ],
)
def test_what_is_no_method_is_a_sentence(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method(name)


def test_a_method_is_no_family() -> None:
    with pytest.raises(UserError, match=r"'own_classes:Method' is not a subclass of .*DistillAdapter"):
        load_adapter("own_classes:Method")
