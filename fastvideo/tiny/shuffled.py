"""A tiny pipeline that takes each digit and each colour for another: the control of what reads captions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from fastvideo.tiny.captions import COLOURS, DIGITS

TOKENIZER = "tokenizer.json"


def with_shuffled_words(folder: Path, out: Path) -> Path:
    """Write a copy of the pipeline in ``folder`` to ``out`` whose tokenizers give each digit and colour the next one's
    token; returns ``out``."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    for file in out.glob(f"tokenizer*/{TOKENIZER}"):
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = vocabulary | _turned(vocabulary, DIGITS) | _turned(vocabulary, COLOURS)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return out


def _turned(vocabulary: dict[str, int], words: Sequence[str]) -> dict[str, int]:
    return {word: vocabulary[after] for word, after in zip(words, (*words[1:], words[0]), strict=True)}
