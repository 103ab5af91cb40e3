"""Settings of a text encoder that its embeddings depend on: a stored text is used only where they are equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvideo.distillation.adapters.diffusers.conditioner import FOLDER
from fastvideo.distillation.adapters.diffusers.pipeline import Pipeline

VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.json")
"""Files that hold a tokenizer's vocabulary; the first that there is tells tokenizers apart."""
VOLATILE = {"transformers_version", "dtype", "torch_dtype", "architectures"}
"""Entries of an encoder's config that say who wrote it, not what it computes."""
SAMPLE = 2**16
"""Bytes at the beginning, middle and end of a weights file that tell it from others: a whole one has gigabytes."""


def encoder_settings(pipeline: Pipeline[Any], suffix: str = "") -> Mapping[str, Any]:
    """Values that an embedding depends on besides its prompt, as JSON; ``None`` for what the folder does not hold.

    ``suffix`` is the end of the encoder's and the tokenizer's names in a pipeline that has several.

    They are those of the files, not of their place: a copied or moved model is the same one.
    """
    folder = Path(pipeline.source)
    return {
        "encoder": pipeline.spec.text_encoder,
        "encoder_config": _config_hash(folder / f"{FOLDER}{suffix}" / "config.json"),
        "encoder_weights": weights_hash(folder / f"{FOLDER}{suffix}"),
        "tokenizer": _vocabulary_hash(folder / f"tokenizer{suffix}"),
        "max_sequence_length": pipeline.config.max_sequence_length,
    }


def _config_hash(file: Path) -> str | None:
    if not file.is_file():
        return None
    kept = {
        key: value
        for key, value in json.loads(file.read_text(encoding="utf-8")).items()
        if key[0] != "_" and key not in VOLATILE
    }
    return _short(json.dumps(kept, sort_keys=True).encode())


def weights_hash(folder: Path) -> str | None:
    """Hash of the sizes of the weights' files and of samples of their bytes."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for place in (0, size // 2, max(0, size - SAMPLE)):
                stream.seek(place)
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:12] if files else None


def _vocabulary_hash(folder: Path) -> str | None:
    found = next((folder / name for name in VOCABULARIES if (folder / name).is_file()), None)
    return None if found is None else _short(found.read_bytes())


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
