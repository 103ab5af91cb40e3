"""Data that cannot be read: refused by default, or left out, listed, and without any effect on the order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fastvideo.data.faults import LIST, Faults
from fastvideo.data.fits import DataRequirements
from fastvideo.data.order import SampleStream, Shard
from fastvideo.data.parquet import ParquetSource
from fastvideo.data.schema import schema_with, tensor_columns
from fastvideo.errors import UserError

SHAPE = (2, 1, 2, 2)
WANTED = DataRequirements(latents=SHAPE, normalise=lambda x: x)
ROWS = 6


def write(path: Path, first: int, change: Callable[[dict], None] = lambda row: None, at: int = 2) -> Path:
    """Six rows whose latents are their number; ``change`` spoils one."""
    rows = []
    for i in range(ROWS):
        row = {
            "id": str(i),
            "caption": f"number {first + i}",
            **tensor_columns("vae_latent", np.full(SHAPE, first + i)),
        }
        if i == at:
            change(row)
        rows.append(row)
    schema = schema_with([])
    columns = {field.name: [row.get(field.name) for row in rows] for field in schema}
    captions = pa.array([c if isinstance(c, bytes) else c.encode() for c in columns["caption"]], pa.binary())
    arrays = [captions.view(pa.string()) if f.name == "caption" else pa.array(columns[f.name], f.type) for f in schema]
    pq.write_table(pa.table(arrays, schema=schema), path)
    return path


def shortened(row: dict) -> None:
    row["vae_latent_bytes"] = row["vae_latent_bytes"][:-3]


def not_utf8(row: dict) -> None:
    row["caption"] = b"\xff\xfe broken"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def drop_column(path: Path) -> None:
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.drop_columns(["vae_latent_dtype"]), path)


def other_dtype(path: Path) -> None:
    write(path, 6, lambda row: row.update(vae_latent_dtype="complex64"))


def other_shape(path: Path) -> None:
    write(path, 6, lambda row: row.update(tensor_columns("vae_latent", np.zeros((3, 1, 2, 2)))))


FILES = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "missing column": drop_column,
    "wrong dtype": other_dtype,
    "wrong shape": other_shape,
}
ROW_FAULTS = {"bytes": shortened, "caption": not_utf8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    for i in range(3):
        write(path / f"{i}.parquet", ROWS * i)
    return path


@pytest.mark.parametrize("spoil", FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_used_is_refused_or_left_out(folder: Path, spoil: Callable[[Path], None]) -> None:
    spoil(folder / "1.parquet")
    with pytest.raises(UserError, match=r"1\.parquet"):
        ParquetSource(str(folder), WANTED)
    faults = Faults("skip", 1)
    source = ParquetSource(str(folder), WANTED, faults)
    assert (len(source), len(faults)) == (2 * ROWS, 1)
    assert source.read(range(2 * ROWS)).latents[:, 0, 0, 0, 0].tolist() == [*range(6), *range(12, 18)]


@pytest.mark.parametrize("spoil", ROW_FAULTS.values(), ids=ROW_FAULTS)
def test_a_row_that_cannot_be_read_is_refused_or_replaced(folder: Path, spoil: Callable[[dict], None]) -> None:
    write(folder / "1.parquet", 6, spoil)
    with pytest.raises(UserError, match=r"1\.parquet, row 2"):
        ParquetSource(str(folder), WANTED).read([7, 8])
    faults = Faults("skip", 1)
    source = ParquetSource(str(folder), WANTED, faults)
    for _ in range(2):  # counted once, replaced alike every time
        batch = source.read([7, 8, 9])
        assert batch.captions == ("number 7", "number 7", "number 9")
        assert batch.latents[:, 0, 0, 0, 0].tolist() == [7, 7, 9]
    assert len(faults) == 1


def test_the_bound_holds_and_the_message_says_so(folder: Path, tmp_path: Path) -> None:
    (folder / "0.parquet").write_bytes(b"")
    (folder / "1.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"1\.parquet.*\(after 1 skipped before, data\.max_faults\)"):
        ParquetSource(str(folder), WANTED, Faults("skip", 1))


def test_nothing_usable_is_refused_with_the_first_reason(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"no file of .* can be used; the first: .*0\.parquet is not a whole Parquet"):
        ParquetSource(str(folder), WANTED, Faults("skip", 10))


def test_the_list_names_each_fault_once_across_a_resume(folder: Path, tmp_path: Path) -> None:
    (folder / "0.parquet").write_bytes(b"")
    write(folder / "1.parquet", 6, shortened)
    for rank in (0, 0, 1):
        faults = Faults("skip", 5)
        source = ParquetSource(str(folder), WANTED, faults)
        faults.attach(tmp_path, rank)
        source.read([0, 1, 2, 3])
    lines = [json.loads(line) for line in (tmp_path / LIST).read_text().splitlines()]
    assert {(Path(line["file"]).name, line["row"]) for line in lines} == {("0.parquet", None), ("1.parquet", 2)}
    assert len(lines) == 2


def test_a_bad_row_moves_no_other_row_and_ranks_stay_disjoint(folder: Path) -> None:
    sound = shutil.copytree(folder, folder.with_name("sound"))
    write(folder / "1.parquet", 6, shortened)

    def epoch(path: Path, rank: int) -> list[list[int]]:
        source = ParquetSource(str(path), WANTED, Faults("skip", 5))
        stream = SampleStream(source, 3, Shard(3, rank, 2), ahead=2)
        return [next(stream).latents[:, 0, 0, 0, 0].int().tolist() for _ in range(stream.rounds)]

    for rank in (0, 1):
        for good, found in zip(epoch(sound, rank), epoch(folder, rank), strict=True):
            expected = torch.tensor(good)
            assert len(found) == len(good)
            assert all(a == b or a == 8 for a, b in zip(expected.tolist(), found, strict=True))
    first, second = ([row for batch in epoch(folder, rank) for row in batch] for rank in (0, 1))
    assert not set(first) & set(second)
    assert 8 not in first + second
