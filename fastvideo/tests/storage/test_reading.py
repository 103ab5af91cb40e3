"""Datasets, prompts and model folders at URLs: the same samples, few bytes, one message for what cannot be reached."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from huggingface_hub import HfFileSystem

from fastvideo import storage
from fastvideo.cli import main
from fastvideo.data.faults import Faults
from fastvideo.data.fits import DataRequirements
from fastvideo.data.index import dataset_files, has_tars
from fastvideo.data.order import SampleStream, Shard
from fastvideo.data.parquet import ParquetSource
from fastvideo.data.prompts import read_prompts
from fastvideo.data.tars import TarSource
from fastvideo.distillation.adapters.diffusers.sources import resolve_pipeline
from fastvideo.distillation.config.reading import config_of
from fastvideo.errors import RunError, UserError
from fastvideo.storage import Remote
from fastvideo.tests.data.test_parquet import SHAPE, row_of, write
from fastvideo.tests.data.test_tars import pack, sample
from fastvideo.tests.storage.server import Proxy
from fastvideo.training.run import run

TINY = Path(storage.__file__).parent / "tiny" / "weights" / "pipeline"
WANTED = DataRequirements(SHAPE, normalise=lambda x: x)


def upload(folder: Path, url: str) -> str:
    fsspec.filesystem("s3").put(str(folder), url, recursive=True)
    return url


def model_folder(folder: Path) -> Path:
    """The part of a pipeline folder that is read before its networks, and a file of weights."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights" * 1000)
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Eleven rows in nested files whose names sort as paths, and not as texts."""
    folder = tmp_path / "data"
    for i, name in enumerate(("a/z", "a.b", "b")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / f"{name}.parquet", [row_of(4 * i + j) for j in range(4 if i < 2 else 3)], group=2)
    return folder


def test_a_dataset_in_a_bucket_gives_the_same_batches_and_resumes_exactly(dataset: Path, bucket: str) -> None:
    url = upload(dataset, f"{bucket}/data")
    streams = [SampleStream(ParquetSource(p, WANTED), 3, Shard(2), ahead=1) for p in (str(dataset), url)]
    pairs = [tuple(map(next, streams)) for _ in range(12)]
    assert all(a.captions == b.captions and torch.equal(a.latents, b.latents) for a, b in pairs)
    resumed = SampleStream(ParquetSource(url, WANTED), 3, Shard(2))
    resumed.load_state_dict(streams[0].state_dict())
    assert next(resumed).captions == next(streams[0]).captions


def test_tar_shards_in_a_bucket_give_the_same_batches(bucket: str, tmp_path: Path, server: Proxy) -> None:
    for number in range(2):
        files = {name: data for i in range(4) for name, data in sample(4 * number + i).items()}
        pack(tmp_path / "tars" / f"{number}.tar", files)
    url = upload(tmp_path / "tars", f"{bucket}/tars")
    assert has_tars(url)
    streams = [SampleStream(TarSource(path, WANTED), 3, Shard(2)) for path in (str(tmp_path / "tars"), url)]
    pairs = [tuple(map(next, streams)) for _ in range(8)]
    assert all(a.captions == b.captions and torch.equal(a.latents, b.latents) for a, b in pairs)


def test_one_row_group_is_read_without_the_others(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = DataRequirements((4, 2, 64, 64), normalise=lambda x: x)
    latent = torch.zeros(big.latents).numpy()
    changes = {"vae_latent_bytes": latent.tobytes(), "vae_latent_shape": list(latent.shape)}
    (tmp_path / "big").mkdir()
    file = write(tmp_path / "big" / "a.parquet", [row_of(i, **changes) for i in range(24)], group=2)
    source = ParquetSource(upload(tmp_path / "big", f"{bucket}/big"), big)
    fetched: list[int] = []
    whole = Remote.read_bytes
    monkeypatch.setattr(
        Remote, "read_bytes", lambda self, start, end: fetched.append(end - start) or whole(self, start, end)
    )
    source.read([0, 1])
    assert sum(fetched) < file.stat().st_size / 8
    assert len(fetched) <= 3


def test_prompts_and_a_model_folder_are_read_from_a_bucket(bucket: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\nzwölf\n", encoding="utf-8")
    upload(tmp_path / "prompts.txt", f"{bucket}/prompts.txt")
    assert read_prompts(f"{bucket}/prompts.txt") == ("one", "zwölf")
    url = upload(model_folder(tmp_path / "tiny"), f"{bucket}/model")
    folder = Path(resolve_pipeline(url, ("WanPipeline",)))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.is_file()
    assert folder.is_relative_to(tmp_path / "cache")

    monkeypatch.setattr(storage, "download", lambda *_: pytest.fail("fetched twice"))
    assert Path(resolve_pipeline(url, ("WanPipeline",))) == folder
    monkeypatch.undo()


def test_a_prompts_file_is_read_again_when_it_changes(bucket: str) -> None:
    file = fsspec.filesystem("s3")
    for text in ("one", "two"):
        file.pipe_file(f"{bucket}/prompts.txt", text.encode("utf-16"))
        assert read_prompts(f"{bucket}/prompts.txt") == (text,)


def test_texts_that_were_encoded_beforehand_train_from_a_bucket(bucket: str, tmp_path: Path, capsys) -> None:
    """By a pipeline without its text encoder, from prompts that lie in the bucket too."""
    bare = Path(shutil.copytree(TINY, tmp_path / "bare"))
    fsspec.filesystem("s3").pipe_file(f"{bucket}/prompts.txt", b"a red seven\na blue three\n")
    call = ["preprocess", "--prompts", f"{bucket}/prompts.txt", "--validation-prompts", f"{bucket}/prompts.txt"]
    assert main([*call, "--model", str(bare), "--out", str(tmp_path / "texts")]) == 0
    shutil.rmtree(bare / "text_encoder")
    values = {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(tmp_path / "run"),
        "model": {"path": str(bare)},
        "roles": {name: {"trainable": name != "teacher"} for name in ("student", "teacher", "critic")},
        "method": {},
        "data": {"path": upload(tmp_path / "texts", f"{bucket}/texts"), "batch_size": 2},
        "trainer": {"max_steps": 1, "threads": 1},
        "tracking": {"backends": []},
    }
    run(config_of(values, "test"))
    assert "training on 2 stored text embeddings of s3://" in " ".join(capsys.readouterr().err.split())


def test_a_damaged_or_outdated_model_folder_is_fetched_again(bucket: str, tmp_path: Path) -> None:
    url = upload(model_folder(tmp_path / "tiny"), f"{bucket}/model")
    folder = storage.local_folder(url)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(b"")
    assert storage.local_folder(url) == folder
    assert weights.stat().st_size == size
    fsspec.filesystem("s3").pipe_file(f"{url}/model_index.json", b"{}")
    assert storage.local_folder(url) != folder


def test_what_is_not_there_or_not_allowed_is_one_message(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"s3://no-such-bucket/data: The specified bucket does not exist"):
        dataset_files("s3://no-such-bucket/data")
    with pytest.raises(UserError, match=r"data.path: .*/nothing' has no .parquet file"):
        dataset_files(f"{bucket}/nothing")
    with pytest.raises(UserError, match="does not exist"):
        resolve_pipeline(f"{bucket}/nothing", ("WanPipeline",))
    fsspec.filesystem("s3").pipe_file(f"{bucket}/wan.safetensors", b"weights")
    with pytest.raises(UserError, match="is a file, a folder is expected"):
        resolve_pipeline(f"{bucket}/wan.safetensors", ("WanPipeline",))
    with pytest.raises(UserError, match=r"prompts\.txt"):
        read_prompts(f"{bucket}/prompts.txt")
    with pytest.raises(UserError, match=r"s4://: unknown protocol"):
        dataset_files("s4://bucket/data")


def test_a_protocol_without_its_package_is_named_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for protocol, package in (("gs", "gcsfs"), ("s3", "s3fs")):
        storage._system.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
        extra = {"gs": "gcs", "s3": "s3"}[protocol]
        with pytest.raises(UserError, match=rf"{protocol}://.*pip install 'fastvideo-distillation\[{extra}\]'"):
            dataset_files(f"{protocol}://bucket/data")
    storage._system.cache_clear()


def test_hub_urls_are_those_of_huggingface_hub() -> None:
    """Nothing to install, and nothing is asked of the hub before a file is."""
    found = storage.place("hf://datasets/owner/name/data")
    assert isinstance(found, storage.Remote)
    assert isinstance(found.system, HfFileSystem)
    assert (found / "train.parquet").url == "hf://datasets/owner/name/data/train.parquet"


def test_missing_credentials_are_named(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    storage._system.cache_clear()
    with pytest.raises(UserError, match="renew the credentials"):
        dataset_files(f"{bucket}/data")


def test_a_lost_server_is_no_damaged_row(
    dataset: Path, bucket: str, server: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults("skip", 100)
    source = ParquetSource(upload(dataset, f"{bucket}/data"), WANTED, faults)
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    server.cut()
    with pytest.raises(RunError, match=r"data/a/z\.parquet cannot be reached"):
        source.read([0])
    assert not len(faults)
    server.mend()
    assert source.read([0]).captions


def test_a_truncated_remote_file_is_named(dataset: Path, bucket: str) -> None:
    url = upload(dataset, f"{bucket}/data")
    fsspec.filesystem("s3").pipe_file(f"{url}/b.parquet", (dataset / "b.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"b\.parquet is not a whole Parquet file"):
        ParquetSource(url, WANTED)


def test_an_unfinished_remote_dataset_is_refused(dataset: Path, bucket: str) -> None:
    (dataset / "preprocess.json").write_text(json.dumps({"files": 3}))
    with pytest.raises(UserError, match="has 2 of 3 files"):
        dataset_files(upload(dataset, f"{bucket}/data"))
    shutil.rmtree(dataset)
