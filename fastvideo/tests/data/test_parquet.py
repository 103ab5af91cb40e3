"""Reading Parquet: every dtype, any row groups, what is refused when a dataset is opened, and what a run gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import fastvideo.data.parquet as parquet_module
from fastvideo.data.fits import DataRequirements
from fastvideo.data.order import SampleStream, Shard
from fastvideo.data.parquet import ParquetSource
from fastvideo.data.schema import schema_with
from fastvideo.errors import UserError

SHAPE, WIDTH = (4, 2, 2, 4), 16
WANTED = DataRequirements(SHAPE, extras={"text_embedding": (None, WIDTH)}, normalise=lambda x: (x - 1) / 2)


def latent_of(i: int) -> np.ndarray:
    return np.random.default_rng(i).standard_normal(SHAPE).astype(np.float32)


def row_of(i: int, dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    """A row as FastVideo writes it: raw latents, the text embedding as long as the caption."""
    torch_dtype = getattr(torch, dtype)
    latent = torch.from_numpy(latent_of(i)).to(torch_dtype)
    text = torch.full((1 + i % 3, WIDTH), float(i)).to(torch_dtype)
    row = {"id": str(i), "caption": f"caption {i}", "file_name": f"{i}.mp4"}
    for name, value in (("vae_latent", latent), ("text_embedding", text)):
        data = value.view(torch.uint8).numpy().tobytes() if value.numel() else b""
        row |= {f"{name}_bytes": data, f"{name}_shape": list(value.shape), f"{name}_dtype": dtype}
    return row | changes


def write(path: Path, rows: list[dict[str, Any]], group: int = 3, schema: pa.Schema | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema or schema_with(())), path, row_group_size=group)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [1, 3, 100])
def test_every_row_is_read_as_it_was_written(dtype: str, group: int, tmp_path: Path) -> None:
    """Three files, two of them in nested folders; rows in a mixed order."""
    for part, name in enumerate(("b.parquet", "x/a.parquet", "x/y/c.parquet")):
        write(tmp_path / name, [row_of(7 * part + i, dtype) for i in range(7)], group)
    source = ParquetSource(str(tmp_path), WANTED)
    assert len(source) == 21
    rows = [20, 0, 7, 13, 14, 3]
    batch = source.read(rows)
    assert batch.captions == tuple(f"caption {i}" for i in rows)
    for k, i in enumerate(rows):
        exact = torch.from_numpy(latent_of(i)).to(getattr(torch, dtype)).float()
        torch.testing.assert_close(batch.latents[k], (exact - 1) / 2, rtol=0, atol=0)
        text, length = batch.extras["text_embedding"][k], 1 + i % 3
        assert (text[:length] == i).all()
        assert not text[length:].any()
    assert batch.extras["text_embedding"].shape == (6, 3, WIDTH)
    assert batch.latents.dtype == torch.float32


def test_normalised_latents_are_left_as_they_are(tmp_path: Path) -> None:
    made = schema_with(()).with_metadata({"fastvideo.preprocess": '{"latents": "normalised", "codec_key": "k"}'})
    write(tmp_path / "a.parquet", [row_of(0)], schema=made)
    write(tmp_path / "b.parquet", [row_of(1)])
    latents = ParquetSource(str(tmp_path), WANTED).read([0, 1]).latents
    np.testing.assert_array_equal(latents[0].numpy(), latent_of(0))
    np.testing.assert_array_equal(latents[1].numpy(), (latent_of(1) - 1) / 2)


def test_latents_stay_on_disk_for_a_method_that_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns: list[list[str]] = []
    read = pq.ParquetFile.read_row_group

    def recorded(self: Any, i: int, columns: list[str], **options: Any) -> pa.Table:
        seen.append(columns)
        return read(self, i, columns=columns, **options)

    seen = columns
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", recorded)
    write(tmp_path / "a.parquet", [row_of(i) for i in range(4)])
    batch = ParquetSource(str(tmp_path), DataRequirements(extras={"text_embedding": (None, WIDTH)})).read([1, 2])
    assert batch.latents is None
    assert seen == [["caption", "text_embedding_bytes"]]


def test_a_row_group_is_read_once_per_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_module, "CACHE_BYTES", 3000)
    write(tmp_path / "a.parquet", [row_of(i) for i in range(40)], group=4)
    source, reads = ParquetSource(str(tmp_path), WANTED), []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda s, i, **o: reads.append(i) or read(s, i, **o))
    stream = SampleStream(source, 0, Shard(4))
    captions = [caption for _ in range(10) for caption in next(stream).captions]
    assert len(set(captions)) == 40
    assert sorted(reads) == list(range(10))


def test_a_batch_of_1_and_images_and_other_metadata_are_read_like_fastvideo_does(tmp_path: Path) -> None:
    row = row_of(0) | {"vae_latent_shape": [1, *SHAPE], "text_embedding_shape": [1, 1, WIDTH]}
    write(tmp_path / "a.parquet", [row])
    batch = ParquetSource(str(tmp_path), WANTED).read([0])
    assert (tuple(batch.latents.shape), tuple(batch.extras["text_embedding"].shape)) == ((1, *SHAPE), (1, 1, WIDTH))
    image = row_of(0) | {"vae_latent_shape": [4, 4, 4]}
    write(tmp_path / "b" / "a.parquet", [image])
    wanted = DataRequirements((4, 1, 4, 4), normalise=WANTED.normalise)
    assert ParquetSource(str(tmp_path / "b"), wanted).read([0]).latents.shape == (1, 4, 1, 4, 4)


def without(*names: str) -> pa.Schema:
    return pa.schema([f for f in schema_with(()) if f.name not in names])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "schema", "message"),
    [
        ({}, without("vae_latent_shape"), r"column 'vae_latent_shape' is missing; it has id, vae_latent_bytes"),
        ({}, without("caption"), "column 'caption' is missing"),
        ({"vae_latent_dtype": "int8"}, None, "row 0: vae_latent_dtype is 'int8', one of float32, float16, bfloat16"),
        ({"vae_latent_bytes": b"12"}, None, r"row 0: vae_latent_bytes has 2 bytes, shape \[4, 2, 2, 4\] of float32"),
        ({"vae_latent_bytes": None}, None, "row 0: vae_latent_bytes has 0 bytes"),
        ({"vae_latent_shape": []}, None, "row 0: no vae_latent, which the model needs"),
        ({"vae_latent_shape": [4, 2, 4, 2]}, None, r"shape \(4, 2, 4, 2\) \(C, F, H, W\).*for \(4, 2, 2, 4\)"),
        ({"vae_latent_shape": [16, 1, 2, 2]}, None, "latents have 16 channels, the model's codec has 4"),
        ({"text_embedding_shape": [2, 8]}, None, r"text_embedding has shape \[2, 8\], the model takes \['any', 16\]"),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused_when_it_is_opened(
    change: dict[str, Any], schema: pa.Schema | None, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "bad.parquet", [row_of(0) | change], schema=schema)
    with pytest.raises(UserError, match=f"bad.parquet.*{message}"):
        ParquetSource(str(tmp_path), WANTED)


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    fields = [pa.field(f.name, pa.string()) if f.name == "vae_latent_bytes" else f for f in schema_with(())]
    write(tmp_path / "bad.parquet", [row_of(0) | {"vae_latent_bytes": "text"}], schema=pa.schema(fields))
    with pytest.raises(UserError, match="column 'vae_latent_bytes' has type string, binary is expected"):
        ParquetSource(str(tmp_path), WANTED)


def test_large_arrow_types_are_read_too(tmp_path: Path) -> None:
    large = {
        pa.binary(): pa.large_binary(),
        pa.string(): pa.large_string(),
        pa.list_(pa.int64()): pa.large_list(pa.int64()),
    }
    schema = pa.schema([pa.field(f.name, large.get(f.type, f.type)) for f in schema_with(())])
    write(tmp_path / "a.parquet", [row_of(0)], schema=schema)
    assert ParquetSource(str(tmp_path), WANTED).read([0]).captions == ("caption 0",)


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b""), lambda path: path.write_text("no")])
def test_a_file_that_is_not_whole_is_named(damage: Any, tmp_path: Path) -> None:
    damage(write(tmp_path / "bad.parquet", [row_of(i) for i in range(5)]))
    write(tmp_path / "good.parquet", [row_of(0)])
    with pytest.raises(UserError, match=r"bad\.parquet is not a whole Parquet file"):
        ParquetSource(str(tmp_path), WANTED)


def test_a_damaged_row_is_named_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "bad.parquet", [row_of(0), row_of(1), row_of(2, vae_latent_bytes=b"123")], group=2)
    source = ParquetSource(str(tmp_path), WANTED)
    source.read([0, 1])
    with pytest.raises(UserError, match=r"bad\.parquet, row 2: vae_latent_bytes has 3 bytes.*takes 256"):
        source.read([2])


def test_text_embeddings_of_a_part_of_the_rows_are_refused_and_of_none_are_done_without(tmp_path: Path) -> None:
    bare = {"text_embedding_bytes": b"", "text_embedding_shape": [], "text_embedding_dtype": ""}
    path = write(tmp_path / "a.parquet", [row_of(0), row_of(1) | bare])
    with pytest.raises(UserError, match="1 of 2 rows have no text embedding"):
        ParquetSource(str(tmp_path), WANTED)
    write(path, [row_of(i) | bare for i in range(2)])
    source = ParquetSource(str(tmp_path), WANTED)
    assert not source.has_text
    assert source.captions() == ["caption 0", "caption 1"]
    write(path, [row_of(0, caption=None) | bare])
    with pytest.raises(UserError, match="row 0: no caption"):
        ParquetSource(str(tmp_path), WANTED).captions()


def test_a_text_embedding_that_is_too_long_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [row_of(2)])
    wanted = DataRequirements(extras=WANTED.extras, text_length=2)
    with pytest.raises(UserError, match="has 3 tokens, the model takes 2"):
        ParquetSource(str(tmp_path), wanted)


def test_latents_of_another_codec_are_refused(tmp_path: Path) -> None:
    made = schema_with(()).with_metadata({"fastvideo.preprocess": '{"codec_key": "one", "model": "some/model"}'})
    write(tmp_path / "a.parquet", [row_of(0)], schema=made)
    with pytest.raises(UserError, match=r"another VAE \(of some/model, one\) than the model's \(two\)"):
        ParquetSource(str(tmp_path), DataRequirements(SHAPE, codec_keys=("two", "three")))
    assert len(ParquetSource(str(tmp_path), DataRequirements(SHAPE, codec_keys=("two", "one")))) == 1, "an earlier key"


def test_folders_without_parquet_files_and_unfinished_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="does not exist; 'tiny', 'tiny_stream', 'tiny_soft', 'tiny_stills', a Parquet file or a folder"
    ):
        ParquetSource(str(tmp_path / "absent"), WANTED)
    with pytest.raises(UserError, match=r"has no \.parquet file; make one from videos with: fastvideo preprocess"):
        ParquetSource(str(tmp_path), WANTED)
    write(tmp_path / "a.parquet", [row_of(0)])
    (tmp_path / "preprocess.json").write_text('{"files": 3}')
    with pytest.raises(UserError, match="has 1 of 3 files: its preprocessing was interrupted"):
        ParquetSource(str(tmp_path), WANTED)
