"""WebDataset's tar shards: the batches of the same samples in Parquet, exact resume, messages with shard and key."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvideo.data import tars
from fastvideo.data.faults import Faults
from fastvideo.data.index import has_tars
from fastvideo.data.order import SampleStream, Shard
from fastvideo.data.parquet import ParquetSource
from fastvideo.data.tars import TarSource
from fastvideo.errors import UserError
from fastvideo.tests.data.test_parquet import WANTED, WIDTH, latent_of, row_of, write


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVIDEO_CACHE", str(tmp_path / "cache"))


def npy(value: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, value)
    return stream.getvalue()


def pth(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def pack(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def sample(i: int) -> dict[str, bytes]:
    """The files of one key, in the spellings and formats of several programs."""
    text = torch.full((1 + i % 3, WIDTH), float(i))
    caption = f"caption {i}"
    if i % 2:
        files = {"latents.npy": npy(latent_of(i)), "text_embedding.npy": npy(text.numpy()), "txt": caption.encode()}
    else:
        files = {"json": json.dumps({"caption": caption}).encode(), "mp4": b"video" * 9, "txt_emb.pth": pth(text)}
        files["latent.pth"] = pth(torch.from_numpy(latent_of(i)))
    return {f"{i:04d}.{extension}": data for extension, data in files.items()}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number, rows in enumerate((range(5), range(5, 12))):
        pack(tmp_path / "shards" / f"{number:05d}.tar", {k: v for i in rows for k, v in sample(i).items()})
    return tmp_path / "shards"


def test_samples_are_those_of_the_same_dataset_in_parquet(shards: Path, tmp_path: Path) -> None:
    assert has_tars(str(shards))
    other = ParquetSource(
        str(write(tmp_path / "a.parquet", [row_of(i) for i in range(12)]).parent / "a.parquet"), WANTED
    )
    source = TarSource(str(shards), WANTED)
    rows = [3, 0, 11, 6]
    ours, theirs = source.read(rows), other.read(rows)
    assert ours.captions == theirs.captions
    assert torch.equal(ours.latents, theirs.latents)
    assert torch.equal(ours.extras["text_embedding"], theirs.extras["text_embedding"])
    assert source.captions() == [f"caption {i}" for i in range(12)]
    assert [bucket.name for bucket in source.buckets] == [bucket.name for bucket in other.buckets]


def test_the_order_is_a_function_of_the_seed_and_resumes_exactly(shards: Path) -> None:
    streams = [SampleStream(TarSource(str(shards), WANTED), 7, Shard(2)) for _ in range(2)]
    seen = [next(streams[0]).captions for _ in range(9)]
    assert {caption for batch in seen[:6] for caption in batch} == {f"caption {i}" for i in range(12)}
    assert seen == [next(streams[1]).captions for _ in range(9)]
    resumed = SampleStream(TarSource(str(shards), WANTED), 7, Shard(2))
    resumed.load_state_dict(streams[0].state_dict())
    assert next(resumed).captions == next(streams[0]).captions


def test_a_shard_is_indexed_once_and_again_when_it_changes(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[str] = []
    scan = tars._scan
    monkeypatch.setattr(tars, "_scan", lambda file, stream: scanned.append(file.name) or scan(file, stream))
    for _ in range(2):
        TarSource(str(shards), WANTED)
    assert scanned == ["00000.tar", "00001.tar"]
    pack(shards / "00001.tar", sample(1))
    assert len(TarSource(str(shards), WANTED)) == 6


def test_files_of_a_key_may_lie_apart(tmp_path: Path) -> None:
    files = {**sample(1), **sample(3)}
    mixed = dict(sorted(files.items(), key=lambda item: item[0].partition(".")[2]))
    source = TarSource(str(pack(tmp_path / "a.tar", mixed)), WANTED)
    assert torch.equal(
        source.read([0, 1]).latents, WANTED.normalise(torch.from_numpy(np.stack(list(map(latent_of, (1, 3))))))
    )


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: cut(file, 1200), r"a\.tar is cut off in '0001\.text_embedding\.npy'|a\.tar is cut off"),
        (lambda file: cut(file, 512 * 2), "cut off"),
        (lambda file: file.write_bytes(b"no tar at all" * 99), r"a\.tar is no whole tar file"),
        (lambda file: pack(file, {**sample(1), "0001.latent.npy": b"x"}), r"a\.tar, key '0001': two files"),
        (lambda file: pack(file, {**sample(1), "0001.latents.npy": b"x"}), r"'0001': \.latents\.npy cannot be read"),
        (lambda file: pack(file, {**sample(2), "0002.latent.pth": b"x"}), r"key '0002': \.latent\.pth cannot be read"),
        (lambda file: pack(file, {**sample(2), "0002.latent.pth": pth([1])}), r"key '0002': .* a list, one tensor"),
        (lambda file: pack(file, {"1.txt": b"a", "1.mp4": b"b"}), r"no vae_latent in it; one is expected as KEY\."),
        (lambda file: pack(file, {**sample(1), "0001.txt": b"\xff"}), r"key '0001': \.txt, line 1: not UTF-8"),
        (lambda file: pack(file, {**sample(2), "0002.json": b'{"text": ["a"]}'}), r"key '0002': .* a list, a text is"),
        (lambda file: pack(file, {}), "holds no sample|cut off"),
    ],
)  # fmt: skip
def test_a_bad_shard_is_one_message_with_its_key(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    damage(pack(tmp_path / "a.tar", sample(1)))
    with pytest.raises(UserError, match=message):
        TarSource(str(tmp_path / "a.tar"), WANTED)


def test_a_shard_without_its_end_is_refused(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.tar", sample(1))
    with tarfile.open(file) as tar:
        last = tar.getmembers()[-1]
    cut(file, last.offset_data + 512)
    with pytest.raises(UserError, match=r"a\.tar is cut off after '0001\.txt': the end"):
        TarSource(str(file), WANTED)


def test_a_bad_shard_is_skipped_within_the_bound(shards: Path) -> None:
    cut(shards / "00001.tar", 700)
    assert len(TarSource(str(shards), WANTED, Faults("skip", 1))) == 5
