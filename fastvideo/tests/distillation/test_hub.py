"""Models on the Hub: one process of a machine downloads, and a failure is a message."""

from __future__ import annotations

import itertools
import shutil
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from fastvideo.distillation.adapters.diffusers.sources import resolve_pipeline
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.tiny import wan_folder
from fastvideo.tests.launch import in_world

NAME = "someone/a-model"


def download(folder: Path, name: str) -> str:
    """Stand for a download that takes a while, and note when it began and ended."""
    began = time.time()
    time.sleep(0.3)
    with (folder / "downloads").open("a") as file:
        file.write(f"{began} {time.time()}\n")
    return str(folder / "model")


def resolve(rank: int, size: int, folder: Path) -> list[str]:
    """The folder behind the name, asked for twice."""
    with (
        patch("huggingface_hub.snapshot_download", partial(download, folder)),
        patch("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache")),
    ):
        return [resolve_pipeline(NAME, ("WanPipeline",)) for _ in range(2)]


def test_processes_download_one_after_the_other_and_ask_once(tmp_path: Path) -> None:
    shutil.copytree(wan_folder(tmp_path / "source"), tmp_path / "model")
    found = in_world(3, partial(resolve, folder=tmp_path), tmp_path / "world")
    assert found == [[str(tmp_path / "model")] * 2] * 3
    spans = sorted([float(x) for x in line.split()] for line in (tmp_path / "downloads").read_text().splitlines())
    assert len(spans) == 3
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_a_cache_that_cannot_be_written_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    with (
        patch("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache")),
        pytest.raises(UserError, match="someone/another"),
    ):
        resolve_pipeline("someone/another", ("WanPipeline",))
