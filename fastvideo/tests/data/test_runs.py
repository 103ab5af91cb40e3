"""Runs on real videos: mp4 to Parquet to a training step, with one size and with buckets, resumed, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastvideo.cli import main
from fastvideo.data.clips import Policy, Size, read_clips
from fastvideo.data.preprocess import preprocess
from fastvideo.data.schema import floats
from fastvideo.distillation.builder import build_adapter
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.registry import load_adapter, run_schema
from fastvideo.distillation.types import RawBatch
from fastvideo.errors import UserError
from fastvideo.tests.data.conftest import TOY, MakeJob, write_clip
from fastvideo.tests.data.test_tars import npy, pack
from fastvideo.tests.preparing import preparer
from fastvideo.training.data import build_data, open_source
from fastvideo.training.run import run

WIDE, TALL = Size(16, 32, 5), Size(32, 16, 5)


@pytest.fixture
def values(toy: Path, tmp_path: Path) -> dict[str, Any]:
    """SFT of the toy Wan on the videos."""
    return {
        "distill_model": "wan",
        "distill_method": "sft",
        "output": str(tmp_path / "run"),
        "model": {**TOY, "path": str(toy)},
        "roles": {"student": {"trainable": True}},
        "method": {},
        "data": {"path": str(tmp_path / "out"), "batch_size": 2},
        "trainer": {"max_steps": 3, "log_every": 1, "threads": 1},
    }


def config_of(values: dict[str, Any], **changes: Any) -> Any:
    return validate(run_schema(values["distill_model"], values["distill_method"]), values | changes, "test")


def dmd2(values: dict[str, Any]) -> dict[str, Any]:
    roles = {name: {"trainable": name != "teacher"} for name in ("student", "teacher", "critic")}
    return values | {"distill_method": "dmd2", "roles": roles}


def test_videos_train(job: MakeJob, values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(job(), workers=1)
    folder = run(config_of(values))
    shown = " ".join(capsys.readouterr().err.split())
    assert "training on 9 videos of" in shown
    assert "(5 files) with stored text embeddings, latents: 9 of 4x2x2x4 (CxFxHxW), in batches of 2" in shown
    lines = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    assert all(line["student/loss"] > 0 for line in lines)


def test_tar_shards_train(
    job: MakeJob, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of a Parquet dataset as WebDataset has them: the config says that their latents are normalised."""
    work = job()
    preprocess(work, workers=1)
    rows = [row for file in sorted(work.out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    files = {}
    for number, row in enumerate(rows):
        for name in ("vae_latent", "text_embedding"):
            files[f"{number:04d}.{name}.npy"] = npy(floats(row[f"{name}_bytes"], row[f"{name}_shape"], "float32"))
        files[f"{number:04d}.txt"] = row["caption"].encode()
    monkeypatch.setenv("FASTVIDEO_CACHE", str(work.out.parent / "cache"))
    pack(work.out.parent / "tars" / "0.tar", files)
    data = values["data"] | {"path": str(work.out.parent / "tars"), "latents": "normalised"}
    run(config_of(values, data=data))
    shown = " ".join(capsys.readouterr().err.split())
    assert "training on 9 videos of" in shown
    assert "(1 file) with stored text embeddings, latents: 9 of 4x2x2x4 (CxFxHxW), in batches of 2" in shown


def add_images(videos: Path, count: int = 4) -> None:
    """Images beside the videos, with captions of their own."""
    for number in range(count):
        path = videos / f"photo{number}.png"
        Image.new("RGB", (96, 48), (40 * number, 80, 120)).save(path)
        path.with_suffix(".txt").write_text("red three")


def test_images_train_among_videos_in_a_bucket_of_their_own(
    job: MakeJob, videos: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    add_images(videos)
    preprocess(job(), workers=1)
    with pytest.raises(UserError, match=r"data\.buckets: true"):
        run(config_of(values))
    data = values["data"] | {"buckets": True}
    folder = run(config_of(values, data=data, trainer=values["trainer"] | {"max_steps": 6}))
    shown = " ".join(capsys.readouterr().err.split())
    assert "latents: 4 of 4x1x2x4, 9 of 4x2x2x4 (CxFxHxW)" in shown
    lines = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert all(line["student/loss"] > 0 for line in lines)


def test_a_model_of_images_trains_on_images_alone(job: MakeJob, videos: Path, values: dict[str, Any]) -> None:
    shutil.rmtree(videos)
    videos.mkdir()
    add_images(videos)
    preprocess(job(), workers=1)
    model = values["model"] | {"num_frames": 1}
    assert run(config_of(values, model=model)).is_dir()


def test_a_batch_from_disk_is_the_batch_that_is_encoded_now(job: MakeJob, values: dict[str, Any]) -> None:
    """What a method sees is the same to the bit: latents and conditions."""
    work = job()
    preprocess(work, workers=1)
    config = config_of(values)
    adapter = build_adapter(config)
    adapter.ensure_negative_conditioning()
    source, _ = open_source(config, adapter)
    videos = [next(read_clips(video.path, work.policy)).tensor[None] for video in work.videos]
    captions = tuple(video.caption for video in work.videos)
    now = preparer(adapter)(RawBatch(captions, torch.cat([adapter.codec.encode(video) for video in videos])))
    stored = preparer(adapter)(source.read(range(len(videos))))
    assert torch.equal(stored.x0, now.x0)
    one, other = (batch.condition.of(adapter.conditioner.key)["prompt_embeds"] for batch in (stored, now))
    assert torch.equal(one, other)


def test_a_method_without_videos_reads_text_alone(job: MakeJob, values: dict[str, Any]) -> None:
    preprocess(job(), workers=1)
    config = config_of(dmd2(values))
    stream, description = build_data(config, build_adapter(config), Processes())
    raw = next(stream)
    assert raw.latents is None
    assert raw.extras["text_embedding"].shape[0] == 2
    assert description.startswith("9 stored text embeddings of")
    run(config)


def test_a_resumed_run_reads_on_where_it_was(job: MakeJob, values: dict[str, Any], tmp_path: Path) -> None:
    preprocess(job(), workers=1)
    whole = values | {"checkpoint": {"every": 2}, "trainer": values["trainer"] | {"max_steps": 6}}
    parts = whole | {"output": str(tmp_path / "parts")}
    run(config_of(whole))
    run(config_of(parts, trainer=values["trainer"] | {"max_steps": 2}))
    run(config_of(parts), resume=True)
    names = ("run", "parts")
    file = Path("student", "transformer", "diffusion_pytorch_model.safetensors")
    first, second = (load_file(tmp_path / name / file) for name in names)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def buckets(job: MakeJob, tmp_path: Path) -> Path:
    """Six wide and four tall videos."""
    folder = tmp_path / "mixed"
    for i in range(10):
        path = write_clip(folder / f"{i}.mp4", size=(24, 48) if i < 6 else (48, 24), seed=i)
        path.with_suffix(".txt").write_text("red seven")
    preprocess(job(folder=folder, policy=Policy((WIDE, TALL)), per_file=4), workers=1)
    return tmp_path / "out"


def test_every_batch_has_one_size_and_every_size_trains(
    buckets: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    family = load_adapter("wan")
    velocity = family.velocity
    spy = lambda self, network, x, *rest: seen.append(tuple(x.shape[1:])) or velocity(self, network, x, *rest)  # noqa: E731
    monkeypatch.setattr(family, "velocity", spy)
    data = values["data"] | {"buckets": True}
    run(config_of(values, data=data, trainer=values["trainer"] | {"max_steps": 5}))
    assert sorted(seen) == [(4, 2, 2, 4)] * 3 + [(4, 2, 4, 2)] * 2


def test_several_sizes_are_refused_where_buckets_were_not_asked_for(buckets: Path, values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"latents have shape \(4, 2, 4, 2\).*configured for \(4, 2, 2, 4\)"):
        run(config_of(values))
    with pytest.raises(UserError, match="the largest of 2 buckets has 6 samples, fewer than one batch of 8"):
        run(config_of(values, data=values["data"] | {"buckets": True, "batch_size": 8}))


def test_buckets_are_shown_with_what_is_left_out(
    buckets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["buckets", "show", str(buckets), "--batch-size", "2", "--ranks", "2"]) == 0
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = [cells for cells in lines if len(cells) == 5]
    assert rows == [
        ["4 x 2 x 2 x 4", "6", "1", "2", "incomplete last step (2 of 4), others each epoch"],
        ["4 x 2 x 4 x 2", "4", "1", "0", ""],
        ["all", "10", "2", "2", ""],
    ]
    assert main(["buckets", "show", str(buckets), "--batch-size", "3", "--ranks", "2"]) == 0
    assert "fewer than one step takes (6)" in capsys.readouterr().out
    assert main(["buckets", "show", str(buckets), "--ranks", "0"]) == 2


def test_the_wrong_data_is_refused_before_a_step(job: MakeJob, values: dict[str, Any], tmp_path: Path) -> None:
    preprocess(job(), workers=1)
    with pytest.raises(UserError, match=r"`path` .* and `prompts` .*: drop one \(`--data\.prompts None`\)"):
        config_of(values, data=values["data"] | {"prompts": "prompts.txt"})
    with pytest.raises(UserError, match=r"latents have shape \(4, 2, 2, 4\).*configured for \(4, 3, 2, 4\)"):
        run(config_of(values, model=values["model"] | {"num_frames": 9}))
    with pytest.raises(UserError, match=r"another model .*: model\.max_sequence_length 8, the model's is 5"):
        run(config_of(values, model=values["model"] | {"max_sequence_length": 5}))
    with pytest.raises(UserError, match="another VAE"):
        run(config_of(values, model=values["model"] | {"path": str(_other_vae(values, tmp_path))}))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red\n" * 4)
    with pytest.raises(UserError, match=r"wan x sft \(as configured\) trains on videos, a prompts file has none"):
        run(config_of(values, data={"prompts": str(prompts)}))


def _other_vae(values: dict[str, Any], tmp_path: Path) -> Path:
    """The toy pipeline with another normalisation of its latents."""
    folder = shutil.copytree(values["model"]["path"], tmp_path / "other")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latents_std": [1.0, 1.0, 1.0, 1.0]}))
    return Path(folder)
