"""A pipeline whose words mean others."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoTokenizer

from fastvideo.tiny.paths import PIPELINE_FOLDER
from fastvideo.tiny.shuffled import with_shuffled_words


def test_digits_and_colours_are_taken_for_others_and_directions_are_not(tmp_path: Path) -> None:
    shutil.copytree(PIPELINE_FOLDER / "tokenizer", tmp_path / "own" / "tokenizer_2")
    other = AutoTokenizer.from_pretrained(with_shuffled_words(tmp_path / "own", tmp_path / "other") / "tokenizer_2")
    own = AutoTokenizer.from_pretrained(tmp_path / "own" / "tokenizer_2")
    for said, meant in (("a white nine moving up", "a red zero moving up"), ("a digit", "a digit"), ("", "")):
        assert other(said).input_ids == own(meant).input_ids
