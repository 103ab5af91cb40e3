"""Texts that were encoded beforehand: whose they are, and those that sampling needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastvideo.data.index import dataset_files, has_tars, open_parquet
from fastvideo.data.schema import METADATA_KEY, TEXT, metadata_of, text_column
from fastvideo.distillation.abilities import of_texts
from fastvideo.distillation.adapters.base import Conditioner
from fastvideo.errors import UserError
from fastvideo.files import replacing
from fastvideo.storage import Place, at_hand, is_file, place

SAMPLING = "sampling_texts.safetensors"
"""File in a dataset's folder with the texts of negative and validation prompts."""
Texts = Mapping[str, Mapping[str, Any]]
"""Settings of each text column, by its name."""
NAMES = {
    "encoder": "text encoder",
    "encoder_config": "config of the text encoder",
    "encoder_weights": "weights of the text encoder",
    "tokenizer": "tokenizer",
    "max_sequence_length": "model.max_sequence_length",
    "width": "width",
}
"""Settings that decide if a text is a model's, and their names in messages."""


def write_sampling_texts(
    folder: Path, made: Texts, prompts: Sequence[Sequence[str]], texts: Sequence[Sequence[Tensor]]
) -> None:
    """Write prompts and texts of each family, in the order of its columns."""
    columns = [text_column(number) for number in range(len(prompts))]
    tensors = {f"{column}.{i}": text for column, own in zip(columns, texts, strict=True) for i, text in enumerate(own)}
    described = {"texts": made, "prompts": dict(zip(columns, map(list, prompts), strict=True))}
    with replacing(folder / SAMPLING) as temporary:
        save_file(tensors, temporary, {METADATA_KEY.decode(): json.dumps(described)})


def hold_sampling_texts(path: str, conditioners: Sequence[Conditioner]) -> None:
    """Give conditioners the texts of negative and validation prompts that lie beside a dataset, if there are any.

    Raises:
        UserError: if the file cannot be read.
    """
    file = place(path) / SAMPLING
    if not is_file(file):
        return
    try:
        with at_hand(file) as local, safe_open(local, "pt") as stored:
            made = json.loads(stored.metadata()[METADATA_KEY.decode()])
            for conditioner in conditioners:
                column = column_of(made["texts"], conditioner)
                prompts = made["prompts"].get(column, ())
                texts = {text: stored.get_tensor(f"{column}.{i}") for i, text in enumerate(prompts)}
                of_texts(conditioner).hold_texts(texts)
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is damaged ({error}); run fastvideo preprocess with --overwrite again") from error


def texts_made(path: str) -> Texts:
    """Settings of the text columns of a dataset, from its first readable file; empty if it names none, as tar shards.

    Raises:
        UserError: if there is no file.
    """
    if has_tars(path):
        return {}
    for file in dataset_files(path):
        try:
            with open_parquet(file) as opened:
                found: Texts = metadata_of(opened.metadata.metadata).get("texts", {})
                return found
        except (pa.ArrowException, OSError):
            continue
    return {}


def column_of(made: Texts, conditioner: Conditioner) -> str | None:
    """The column that holds a conditioner's own texts, or ``None``."""
    wanted = of_texts(conditioner).text_settings
    return next((column for column, found in made.items() if wanted and not _differences(found, wanted)), None)


def check_own_texts(path: str, made: Texts, conditioner: Conditioner, model: str) -> str:
    """The column of a model's own texts; :data:`TEXT` for a dataset that does not say whose they are.

    Raises:
        UserError: with all differences, if the dataset holds texts of other encoders alone.
    """
    if not made or not of_texts(conditioner).text_settings:
        return TEXT
    column = column_of(made, conditioner)
    if column is None:
        wanted = of_texts(conditioner).text_settings
        closest = min(made.values(), key=lambda found: len(_differences(found, wanted)))
        wrong = "; ".join(
            f"{NAMES[name]} {closest[name]}, the model's is {wanted[name]}" for name in _differences(closest, wanted)
        )
        raise UserError(
            f"data.path: the text embeddings in {path} were made for another model ({closest.get('model')}): {wrong}. "
            f"Make them again with fastvideo preprocess (--config CONFIG, or --model {model} with this length), or "
            "configure what they were made with"
        )
    return column


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Settings that are known on both sides and differ: a folder without its encoder knows less of it."""
    known = [name for name in NAMES if found.get(name) is not None and wanted.get(name) is not None]
    return [name for name in known if found[name] != wanted[name]]


def check_same_texts(file: Place, found: Texts, wanted: Texts) -> None:
    """Refuse a file whose texts are not those of the dataset's other files.

    Raises:
        UserError: with the first difference.
    """
    for column in found.keys() & wanted.keys():
        for name in (*NAMES, "dtype"):
            if found[column].get(name) != wanted[column].get(name):
                raise UserError(
                    f"{file}: its text embeddings are not those of the other files: {NAMES.get(name, name)} "
                    f"{found[column].get(name)}, elsewhere {wanted[column].get(name)}"
                )
