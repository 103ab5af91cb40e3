"""Datasets whose columns other programs rewrote in other Arrow types: the same values, or one message."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fastvideo.data.fits import DataRequirements
from fastvideo.data.parquet import ParquetSource
from fastvideo.errors import UserError

SIZE = (16, 3, 4, 4)
LATENTS = np.random.default_rng(0).standard_normal((3, *SIZE)).astype("<f4")
PLAIN = {
    "id": pa.array(["a", "b", "c"]),
    "caption": pa.array(["a cat", "a größe 漢", "a cat"]),
    "vae_latent_bytes": pa.array([latent.tobytes() for latent in LATENTS], pa.binary()),
    "vae_latent_shape": pa.array([list(SIZE)] * 3, pa.list_(pa.int64())),
    "vae_latent_dtype": pa.array(["float32"] * 3),
}
LENGTH = LATENTS[0].nbytes


def listed(name: str, kind: pa.DataType) -> pa.Array:
    return pa.array([np.frombuffer(value, "u1") for value in PLAIN[name].to_pylist()], kind)


def dictionaries_in_lists() -> pa.Array:
    sizes = PLAIN["vae_latent_shape"].flatten().dictionary_encode()
    return pa.ListArray.from_arrays(pa.array([0, 4, 8, 12], pa.int32()), sizes)


FORMS = {
    "dictionary text": ("caption", PLAIN["caption"].dictionary_encode()),
    "large text": ("caption", PLAIN["caption"].cast(pa.large_string())),
    "text views": ("caption", PLAIN["caption"].cast(pa.string_view())),
    "text without its mark": ("caption", PLAIN["caption"].cast(pa.binary())),
    "dictionary dtype": ("vae_latent_dtype", PLAIN["vae_latent_dtype"].dictionary_encode()),
    "large dictionary": (
        "vae_latent_dtype",
        PLAIN["vae_latent_dtype"].cast(pa.dictionary(pa.int8(), pa.large_string())),
    ),
    "large binary": ("vae_latent_bytes", PLAIN["vae_latent_bytes"].cast(pa.large_binary())),
    "binary views": ("vae_latent_bytes", PLAIN["vae_latent_bytes"].cast(pa.binary_view())),
    "fixed binary": ("vae_latent_bytes", PLAIN["vae_latent_bytes"].cast(pa.binary(LENGTH))),
    "dictionary binary": ("vae_latent_bytes", PLAIN["vae_latent_bytes"].dictionary_encode()),
    "bytes in lists": ("vae_latent_bytes", listed("vae_latent_bytes", pa.list_(pa.uint8()))),
    "bytes in fixed lists": ("vae_latent_bytes", listed("vae_latent_bytes", pa.list_(pa.uint8(), LENGTH))),
    "large list": ("vae_latent_shape", PLAIN["vae_latent_shape"].cast(pa.large_list(pa.int64()))),
    "fixed list": ("vae_latent_shape", PLAIN["vae_latent_shape"].cast(pa.list_(pa.int64(), 4))),
    "small numbers": ("vae_latent_shape", PLAIN["vae_latent_shape"].cast(pa.list_(pa.uint16()))),
    "dictionary in lists": ("vae_latent_shape", dictionaries_in_lists()),
}


def opened(path: Path, column: str, values: pa.Array) -> ParquetSource:
    pq.write_table(pa.table(PLAIN | {column: values}), path, row_group_size=2)
    return ParquetSource(str(path), DataRequirements(SIZE, normalise=lambda latents: latents))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_values_reads_alike(form: str, tmp_path: Path) -> None:
    source = opened(tmp_path / "a.parquet", *FORMS[form])
    assert source.captions() == PLAIN["caption"].to_pylist()
    batch = source.read([2, 0, 1])
    assert batch.captions == ("a cat", "a cat", "a größe 漢")
    assert batch.latents is not None
    assert torch.equal(batch.latents, torch.from_numpy(LATENTS[[2, 0, 1]]))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("caption", pa.array([1, 2, 3]), "column 'caption' has type int64, string is expected"),
        ("caption", pa.array([["a"], ["b"], ["c"]]), "column 'caption' has type list<.*>, string is expected"),
        ("vae_latent_dtype", pa.array([{"a": 1}] * 3), "column 'vae_latent_dtype' has type struct<.*>, string is"),
        ("vae_latent_bytes", pa.array(["a"] * 3), "column 'vae_latent_bytes' has type string, binary is expected"),
        ("vae_latent_shape", pa.array([[1.5]] * 3), "has type list<.*double>, list of int64 is expected"),
        ("vae_latent_shape", pa.array(["[16, 3, 4, 4]"] * 3), "has type string, list of int64 is expected"),
        ("vae_latent_shape", pa.array([[16, None, 4, 4]] * 3), r"row 0: vae_latent_shape is \[16, None, 4, 4\]"),
        (
            "vae_latent_shape",
            pa.array([[16, 3, 4, 4], [16, -3, -4, 4]] * 2)[:3],
            r"row 1: vae_latent_shape is \[16, -3",
        ),
        ("caption", pa.nulls(3), "row 0: no caption"),
    ],
)
def test_other_values_are_one_message(column: str, values: pa.Array, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "a.parquet", column, values).captions()


def test_a_column_that_is_there_twice_is_one_message(tmp_path: Path) -> None:
    """As a join of two tables leaves it."""
    pq.write_table(pa.table(PLAIN).append_column("caption", PLAIN["caption"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: column 'caption' is there 2 times"):
        ParquetSource(str(tmp_path / "a.parquet"), DataRequirements(SIZE))
