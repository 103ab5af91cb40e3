"""Results share what training does not change with their base model: large files by link, all of it when slim."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
import yaml

from fastvideo import files
from fastvideo.distillation.config.reading import config_of
from fastvideo.errors import UserError
from fastvideo.files import LINKED_FROM, link_or_copy, replacing_folder
from fastvideo.inference.generate import generate_video
from fastvideo.inference.loading import load_model
from fastvideo.tests.inference.exporting import PROMPTS, export
from fastvideo.tests.inference.test_export import stock
from fastvideo.training.run import run


def test_large_files_are_linked_and_small_ones_copied(tmp_path: Path) -> None:
    """Through the links of the hub's cache, and with the permissions of the file that was there first."""
    blob, config = tmp_path / "blob", tmp_path / "config.json"
    blob.write_bytes(bytes(LINKED_FROM))
    blob.chmod(0o444)
    config.write_text("{}")
    (tmp_path / "weights").symlink_to(blob)
    with replacing_folder(tmp_path / "result") as partial:
        link_or_copy(str(tmp_path / "weights"), str(partial / "weights"))
        link_or_copy(str(config), str(partial / "config.json"))
    assert (tmp_path / "result" / "weights").samefile(blob)
    assert not (tmp_path / "result" / "weights").is_symlink()
    assert not (tmp_path / "result" / "config.json").samefile(config)
    assert stat.S_IMODE(blob.stat().st_mode) == 0o444


def test_another_disk_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    (tmp_path / "weights").write_bytes(b"w" * LINKED_FROM)
    monkeypatch.setattr(files.os, "link", refuse)
    link_or_copy(str(tmp_path / "weights"), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "weights").read_bytes()
    assert os.stat(tmp_path / "copy").st_nlink == 1


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
