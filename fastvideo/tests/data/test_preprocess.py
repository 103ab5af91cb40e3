"""From a folder of videos to Parquet: what is stored, by how many processes, through kills, with bad files in it."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastvideo.cli import main
from fastvideo.data.captions import Video
from fastvideo.data.clips import Policy, Size, read_clips
from fastvideo.data.faults import VideoError
from fastvideo.data.model import ModelChoice, choose_model
from fastvideo.data.preprocess import Job, make_job, preprocess
from fastvideo.data.schema import LATENT, TEXT, floats, metadata_of, schema_with
from fastvideo.data.shards import rows_of
from fastvideo.errors import UserError
from fastvideo.tests.data.conftest import TOY, MakeJob, write_clip
from fastvideo.tests.distillation.tiny_images import i2v_folder

SIZES = [part for name in TOY for part in (f"--{name.replace('_', '-')}", str(TOY[name]))]


def stored(out: Path) -> list[dict[str, Any]]:
    """All rows, in order."""
    return [row for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def tensor(row: dict[str, Any], name: str) -> Tensor:
    return torch.from_numpy(floats(row[f"{name}_bytes"], row[f"{name}_shape"], row[f"{name}_dtype"]).copy())


def test_latents_and_embeddings_are_those_that_the_model_computes_to_the_bit(job: MakeJob) -> None:
    work = job()
    assert preprocess(work, workers=1).skipped == []
    adapter = work.choice.adapter("cpu")
    rows = {row["file_name"]: row for row in stored(work.out)}
    assert sorted(rows) == [video.name for video in work.videos]
    for video in work.videos:
        row = rows[video.name]
        (clip,) = read_clips(video.path, work.policy)
        assert torch.equal(tensor(row, LATENT), adapter.codec.encode(clip.tensor[None])[0])
        (expected,) = adapter.conditioner.encode_prompts([row["caption"]]).of(adapter.conditioner.key)["prompt_embeds"]
        embedding = tensor(row, TEXT)
        assert torch.equal(embedding, expected[: len(embedding)])
        assert not expected[len(embedding) :].any()


def test_columns_are_those_that_fastvideo_publishes(job: MakeJob) -> None:
    work = job()
    preprocess(work, workers=1)
    file = pq.ParquetFile(work.out / "videos-00000.parquet")
    assert file.schema_arrow.remove_metadata() == schema_with(())
    assert file.schema_arrow.names == [
        "id", "vae_latent_bytes", "vae_latent_shape", "vae_latent_dtype", "text_embedding_bytes",
        "text_embedding_shape", "text_embedding_dtype", "file_name", "caption", "media_type", "width", "height",
        "num_frames", "duration_sec", "fps",
    ]  # fmt: skip
    row = stored(work.out)[0]
    assert (row["height"], row["width"], row["num_frames"], row["fps"], row["duration_sec"]) == (16, 32, 5, 8.0, 0.625)
    assert (row["vae_latent_shape"], row["vae_latent_dtype"], row["media_type"]) == ([4, 2, 2, 4], "float32", "video")


def test_the_metadata_says_how_a_file_was_made(job: MakeJob) -> None:
    work = job(policy=Policy((Size(16, 32, 5),), fit="pad", fps=8.0))
    preprocess(work, workers=1)
    made = metadata_of(pq.read_metadata(work.out / "videos-00001.parquet").metadata)
    assert made["codec_key"] == work.choice.adapter("cpu").codec.latent_key
    assert (made["latents"], made["fit"], made["fps"], made["sizes"]) == ("normalised", "pad", 8.0, ["16x32x5"])
    assert made["model"] == work.model


@pytest.mark.slow
def test_two_processes_write_the_same_files_as_one(job: MakeJob) -> None:
    one, two = job("one"), job("two")
    preprocess(one, workers=1)
    preprocess(two, workers=2)
    assert [file.name for file in sorted(one.out.iterdir())] == [file.name for file in sorted(two.out.iterdir())]
    for file in one.out.glob("*.parquet"):
        assert file.read_bytes() == (two.out / file.name).read_bytes()


def in_a_process(job: Job) -> Any:
    """The work, forked: it has everything imported already and starts at once."""
    process = multiprocessing.get_context("fork").Process(target=preprocess, args=(job,), kwargs={"workers": 1})
    process.start()
    return process


def test_killed_at_any_moment_and_called_again_it_ends_with_the_same_rows(job: MakeJob) -> None:
    whole, killed = job("whole"), job("killed")
    begin = time.monotonic()
    preprocess(whole, workers=1)
    length = time.monotonic() - begin
    draw, kills = random.Random(0), 0
    for _ in range(8):
        process = in_a_process(killed)
        process.join(draw.uniform(0.02, 0.5) * length)
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 3
    preprocess(killed, workers=1)
    assert stored(killed.out) == stored(whole.out)
    assert {file.name for file in killed.out.iterdir()} == {file.name for file in whole.out.iterdir()}


def test_what_is_done_is_not_done_again(job: MakeJob) -> None:
    work = job()
    preprocess(work, workers=1)
    kept = (work.out / "videos-00000.parquet").stat().st_mtime_ns
    (work.out / "videos-00002.parquet").unlink()
    assert preprocess(work, workers=1).encoded == 2
    assert (work.out / "videos-00000.parquet").stat().st_mtime_ns == kept
    assert preprocess(work, workers=1).encoded == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda job: job(policy=Policy((Size(16, 32, 5),), fit="stretch")), "fit: crop -> stretch"),
        (lambda job: job(policy=Policy((Size(32, 16, 5),))), r"sizes: \['16x32x5'\] -> \['32x16x5'\]"),
        (lambda job: job(per_file=3), "videos_per_file: 2 -> 3"),
    ],
)
def test_another_policy_is_not_mixed_in(change: Callable[[MakeJob], Job], message: str, job: MakeJob) -> None:
    preprocess(job(), workers=1)
    before = {path: path.read_bytes() for path in job().out.iterdir()}
    with pytest.raises(UserError, match=message):
        preprocess(change(job), workers=1)
    assert {path: path.read_bytes() for path in job().out.iterdir()} == before
    assert preprocess(change(job), workers=1, overwrite=True).encoded == 9


def test_videos_that_came_later_are_not_mixed_in(job: MakeJob, videos: Path) -> None:
    preprocess(job(), workers=1)
    write_clip(videos / "new.mp4").with_suffix(".txt").write_text("red")
    with pytest.raises(UserError, match="videos or captions: 9 files before, 10 now"):
        preprocess(job(), workers=1)


def test_bad_files_are_counted_and_listed_and_the_rest_goes_on(job: MakeJob, videos: Path, toy: Path) -> None:
    (videos / "0.txt").write_text("a " * 20)
    (videos / "2.txt").unlink()
    (videos / "nested" / "1.webm").write_bytes(b"")
    write_clip(videos / "nested" / "3.gif", frames=2)
    work = job()
    summary = preprocess(work, workers=1)
    assert (summary.rows, len(summary.skipped)) == (5, 4)
    listed = [json.loads(line) for line in (work.out / "skipped.jsonl").read_text().splitlines()]
    assert [entry["file"] for entry in listed] == ["0.mp4", "2.mov", "nested/1.webm", "nested/3.gif"]
    reasons = (
        "prompt has 21 tokens, the text encoder takes 8",
        "no caption: 2.txt",
        "cannot be decoded",
        "too short: 2",
    )
    for entry, reason in zip(listed, reasons, strict=True):
        assert reason in entry["reason"]


def add_image(folder: Path, name: str = "photo.png", caption: str | None = "red three") -> Path:
    path = folder / name
    Image.new("RGB", (96, 48), (200, 40, 40)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def test_an_image_is_a_video_of_one_frame(job: MakeJob, videos: Path) -> None:
    path = add_image(videos)
    work = job()
    summary = preprocess(work, workers=1)
    assert (summary.rows, summary.skipped) == (10, [])
    row = next(row for row in stored(work.out) if row["file_name"] == "photo.png")
    assert (row["media_type"], row["num_frames"], row["vae_latent_shape"]) == ("image", 1, [4, 1, 2, 4])
    (clip,) = read_clips(path, work.policy)
    assert torch.equal(tensor(row, LATENT), work.choice.adapter("cpu").codec.encode(clip.tensor[None])[0])


def test_an_image_without_a_caption_is_listed(job: MakeJob, videos: Path) -> None:
    add_image(videos, caption=None)
    assert preprocess(job(), workers=1).skipped == [
        {"file": "photo.png", "reason": "no caption: photo.txt does not exist"}
    ]


def test_a_model_that_starts_from_frames_leaves_images_out(videos: Path, tmp_path: Path) -> None:
    image = add_image(videos)
    folder = i2v_folder(tmp_path, clip=False)
    video = Video(image, image.name, "red three")
    adapter = choose_model(str(folder), TOY).adapter("cpu")
    with pytest.raises(VideoError, match="the model needs videos"):
        list(rows_of(video, adapter.codec, adapter.conditioner, Policy((Size(16, 32, 5),))))


def test_a_model_that_takes_no_single_frame_leaves_images_out(videos: Path, tmp_path: Path, toy: Path) -> None:
    class Picky(ModelChoice):
        def sized(self, height: int, width: int, num_frames: int) -> ModelChoice:
            if num_frames < 5:
                raise UserError("num_frames must be at least 5")
            return super().sized(height, width, num_frames)

    add_image(videos)
    known = choose_model(str(toy), TOY)
    choice = Picky(known.family, known.fields)
    work = make_job(videos, None, choice, Policy((Size(16, 32, 5),)), tmp_path / "out", 20, "cpu")
    (skipped,) = preprocess(work, workers=1).skipped
    assert skipped["file"] == "photo.png"
    assert "num_frames must be at least 5" in skipped["reason"]


def test_clips_before_a_damaged_part_stay_and_the_rest_is_listed(job: MakeJob, videos: Path) -> None:
    """The end of an MP4 file that begins with its index is missing, as after a broken download."""
    shutil.rmtree(videos)
    whole, path = write_clip(videos / "whole.mp4", frames=60), videos / "a.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        copied = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = copied
                out.mux(packet)
    whole.unlink()
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.9)])
    path.with_suffix(".txt").write_text("red three")
    work = job(policy=Policy((Size(16, 32, 5),), every_clip=True))
    summary = preprocess(work, workers=1)
    assert 0 < summary.rows < 12
    assert [row["id"] for row in stored(work.out)] == [f"a.mp4#{number}" for number in range(summary.rows)]
    ((_, reason),) = (entry.values() for entry in summary.skipped)
    assert reason.startswith(f"after {summary.rows} clips that are in: cannot be decoded: Invalid data")


def test_the_command_says_what_it_did_and_how_it_went(
    videos: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["preprocess", str(videos), "--model", str(toy), "--out", str(tmp_path / "out"), *SIZES]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "9 videos, frames as they are, crop to 16x32x5" in shown.err
    assert "9 clips of 9 videos" in shown.out
    (videos / "0.mp4").write_bytes(b"x")
    assert main([*command, "--overwrite"]) == 1
    assert "8 clips of 8 videos" in (out := capsys.readouterr().out)
    assert "1 skipped, see" in out
    assert main([*command, "--height", "17"]) == 2
    assert "height must be a multiple of 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers must be from 1 to 1024, got 0"),
        (["--fps", "-1"], "--fps must be above 0"),
        (["--buckets", "16x16"], "is not HEIGHTxWIDTHxFRAMES"),
        (["--buckets", "16x20x5"], "width must be a multiple of 16"),
        (["--captions", "absent.csv"], "No such file"),
    ],
)
def test_a_mistake_in_the_call_writes_nothing(
    flags: list[str], message: str, videos: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["preprocess", str(videos), "--model", str(toy), "--out", str(out), *SIZES, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_of_somebody_else_is_left_alone(job: MakeJob) -> None:
    work = job()
    work.out.mkdir()
    (work.out / "precious").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="was not made by fastvideo preprocess"):
            preprocess(work, workers=1, overwrite=overwrite)
    assert [path.name for path in work.out.iterdir()] == ["precious"]


def test_no_caption_at_all_is_a_mistake_of_the_user(job: MakeJob, videos: Path) -> None:
    for path in videos.rglob("*.txt"):
        path.unlink()
    with pytest.raises(UserError, match="none of 9 videos has a caption"):
        preprocess(job(), workers=1)
