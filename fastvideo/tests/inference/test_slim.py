"""Results copy what training does not change, or link it when they are slim."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from fastvideo.distillation.config.reading import config_of
from fastvideo.errors import UserError
from fastvideo.inference.generate import generate_video
from fastvideo.inference.loading import load_model
from fastvideo.tests.inference.exporting import PROMPTS, export
from fastvideo.tests.inference.test_export import stock
from fastvideo.training.run import run


def test_a_result_is_a_copy(distilled: Path, tmp_path: Path) -> None:
    """Whoever writes into a result, such as an editor or another tool, must not change the base model."""
    export(distilled, tmp_path / "whole")
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        assert not file.is_symlink()
        assert file.stat().st_nlink == 1


def test_a_slim_export_makes_the_same_video_and_stores_its_own_weights_alone(
    distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(distilled, tmp_path / "whole")
    export(distilled, tmp_path / "slim", "--slim")
    said = capsys.readouterr().err
    assert "whole on this machine alone" in said
    assert "rsync -aL" in said
    links = sorted(item.name for item in (tmp_path / "slim").iterdir() if item.is_symlink())
    assert links == ["text_encoder", "tokenizer", "vae"]
    assert (stock(tmp_path / "whole", 4) == stock(tmp_path / "slim", 4)).all()
    whole, slim = (load_model(str(tmp_path / name)) for name in ("whole", "slim"))
    assert torch.equal(*(generate_video(model, PROMPTS[0], model.sampler(), 1) for model in (whole, slim)))


def test_a_slim_folder_that_was_moved_says_what_to_do(distilled: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(distilled / "student", base)
    export(base, tmp_path / "slim", "--slim")
    shutil.copytree(tmp_path / "slim", tmp_path / "followed")
    shutil.rmtree(base)
    load_model(str(tmp_path / "followed"))
    with pytest.raises(UserError, match=r"slim: \w+ is a link to .*/base/\w+, which is not there.*cp -rL"):
        load_model(str(tmp_path / "slim"))


def test_a_run_leaves_a_slim_result_where_asked(distilled: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((distilled / "config.yaml").read_text()) | {"output": str(tmp_path / "run")}
    values["trainer"] |= {"max_steps": 1, "slim_result": True}
    student = run(config_of(values, "test"))
    assert sorted(item.name for item in student.iterdir() if item.is_symlink()) == ["text_encoder", "tokenizer", "vae"]
    assert load_model(str(student)).is_student
