"""Methods and families of other packages are named in a config by module and class, in every command."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from fastvideo.cli import main
from fastvideo.conformance.run import find_method
from fastvideo.data.model import choose_model, find_model
from fastvideo.distillation import registry
from fastvideo.distillation.registry import load_adapter, load_exporter, load_method
from fastvideo.errors import UserError
from fastvideo.evaluation.report_run import read_run
from fastvideo.inference.loading import load_model
from fastvideo.tests.distillation.tiny import wan_folder
from fastvideo.tests.faults.runs import analytic_run

OWN = """
from typing import ClassVar

from fastvideo.distillation.adapters.analytic import AnalyticAdapter
from fastvideo.distillation.adapters.export.wan import WanExporter
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Config, DMD2Method

class Config(DMD2Config):
    note: str = ""

class Method(DMD2Method):
    Config = Config

class Family(AnalyticAdapter):
    pass

class VideosConfig(WanFamilyConfig):
    pipelines: ClassVar[tuple[str, ...]] = ("MochiPipeline",)
    exporter: ClassVar[str] = "own_classes:VideosExporter"

class Videos(WanFamily):
    Config = VideosConfig

class VideosExporter(WanExporter):
    pass

class Unfinished(DistillMethod):
    sampler = "euler"

class Plain(DMD2Method):
    Config = dict

VALUE = 1
"""


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_classes.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_own_families", {})


def test_a_method_and_a_family_of_a_file_here_train_and_resume_by_command(tmp_path: Path) -> None:
    values = analytic_run(tmp_path) | {"distill_model": "own_classes:Family", "distill_method": "own_classes:Method"}
    values["method"] |= {"note": "mine"}
    values |= {"output": str(tmp_path / "run"), "trainer": {"max_steps": 4, "log_every": 1, "threads": 1}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    assert main(["distill", "--config", "own.yaml"]) == 0
    assert main(["distill", "--config", "run/config.yaml", "--resume", "--trainer.max-steps", "8"]) == 0
    assert (tmp_path / "run" / "checkpoints" / "step-8").is_dir()
    assert read_run(tmp_path / "run").recipe == "Method \u00d7 Family", "in titles as it is written"


def test_a_model_folder_is_read_by_the_family_that_its_recipe_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pipeline is unknown without the recipe, and has its exporter; so are students of a family of your own."""
    folder = shutil.copytree(wan_folder(tmp_path), tmp_path / "student")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "MochiPipeline"}))
    with pytest.raises(UserError, match="MochiPipeline"):
        load_model(str(folder))
    size = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8}
    recipe = {"distill_model": "own_classes:Videos", "model": size, "ladder": [1.0, 0.5], "sampler": "renoise"}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    adapter = load_model(str(folder)).adapter
    assert type(adapter).__name__ == "Videos"
    assert type(load_exporter(adapter.config)).__name__ == "VideosExporter"
    assert choose_model(str(folder), {}).family == "own_classes:Videos"
    monkeypatch.setattr(registry, "_own_families", {})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: str(folder))
    assert find_model("someone/their-student") == (str(folder), "own_classes:Videos"), "by its recipe on the Hub too"
    assert main(["generate", str(folder), "--prompt", "a red seven", "--out", str(tmp_path / "a.mp4")]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_file:Method", r"cannot import 'no_such_file' \(from .*\): No module named"),
        (":Method", "cannot import ''"),
        ("own_classes:Methud", "module 'own_classes' has no class 'Methud'; it has Method, .*; did you mean 'Method'"),
        ("own_classes:VALUE", "'own_classes:VALUE' is no class, but of type int"),
        (
            "own_classes:Unfinished",
            "own_classes:Unfinished does not declare Config, trainable_roles, summary, as every",
        ),
        (
            "own_classes:Plain",
            r"own_classes:Plain\.Config is no subclass of .*MethodConfig, whose fields are the options",
        ),
        ("own_classes:Family", "'own_classes:Family' is not a subclass of .*DistillMethod"),
        ("dmd", r"unknown method 'dmd': one of .*, or package\.module:Class of your own; did you mean 'dmd2'"),
    ],
)
def test_what_is_no_method_is_a_sentence(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef f(:\n", r"broken\.py:2: SyntaxError: invalid syntax$"),
        ("import no_such_package\n", r"broken\.py:1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("\nfrom own_classes import Methods\n", r"broken\.py:2: ImportError: cannot import name 'Methods'"),
        ("class Method(DMD2Method):\n    pass\n", r"broken\.py:1: NameError: name 'DMD2Method' is not defined"),
        ("import json\n\njson.loads('{')\n", r"broken\.py:3: JSONDecodeError: "),
        ("import sys\nsys.exit(0)\n", r"broken\.py:2: SystemExit: 0"),
    ],
)
def test_a_module_that_fails_at_import_is_a_sentence_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    """Whoever wants the traceback has it as the cause; the command has its exit code of a mistake."""
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=message) as caught:
        load_method("broken:Method")
    assert caught.value.__cause__ is not None
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(analytic_run(tmp_path) | {"distill_method": "broken:Method"}))
    assert main(["distill", "--config", "own.yaml"]) == 2
    assert "broken.py:" in capsys.readouterr().err


def test_a_method_is_no_family() -> None:
    with pytest.raises(UserError, match=r"'own_classes:Method' is not a subclass of .*DistillAdapter"):
        load_adapter("own_classes:Method")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dmd", r"unknown name 'dmd': families are .*; methods .*; did you mean 'dmd2'"),
        ("own_classes:Config", "'own_classes:Config' is neither a DistillMethod nor a DistillAdapter"),
    ],
)
def test_what_is_neither_is_not_examined(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_method(name)
