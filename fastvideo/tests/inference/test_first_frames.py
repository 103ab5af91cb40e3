"""Going on from an image, from the command line to the video: what is given is kept, and what is missing is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastvideo.cli.generate import GenerateArguments, run_generate
from fastvideo.data.video_io import write_video
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import run_schema
from fastvideo.distillation.sample import SamplerSpec
from fastvideo.distillation.types import UserError
from fastvideo.evaluation.evaluate import evaluate_rows
from fastvideo.evaluation.judge import Judge
from fastvideo.evaluation.rows import RowSpec
from fastvideo.inference.first_frames import first_frames, read_first_frames
from fastvideo.inference.generate import generate_video
from fastvideo.inference.loading import load_model, load_recipe
from fastvideo.tiny.world import TinyWorld
from fastvideo.training.run import run

LADDER = (1.0, 0.5)


def student_folder(root: Path, given_frames: int) -> str:
    """The shipped weights with the recipe of a student that goes on from given frames."""
    adapter = WanFamily(WanFamilyConfig(given_frames=given_frames))
    model = {**load_recipe("tiny")["model"], "given_frames": given_frames}
    adapter.folder.save(root, adapter.folder.load_network(), {"ladder": LADDER, "sampler": "renoise", "model": model})
    return str(root)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return student_folder(tmp_path_factory.mktemp("models") / "image", 1)


@pytest.fixture(scope="module")
def clip_student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return student_folder(tmp_path_factory.mktemp("models") / "clip", 2)


@pytest.fixture(scope="module")
def video() -> Tensor:
    """A real video ``[3, 9, 32, 32]``."""
    return TinyWorld("heldout").sample(1, seed=4).videos[0]


def save_image(path: Path, frame: Tensor) -> Path:
    pixels = ((frame.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)
    return path


def psnr(one: Tensor, other: Tensor) -> float:
    return float(10 * torch.log10(4 / (one - other).square().mean()))


def test_a_video_begins_with_its_image(student: str, video: Tensor, tmp_path: Path) -> None:
    image = save_image(tmp_path / "first.png", video[:, 0])
    output = tmp_path / "v.apng"
    line = run_generate(GenerateArguments(student, "a red three moving up", out=output, image=image, scale=1))
    assert "9 frames of 32x32" in line
    written = read_first_frames(output, 32, 32, 1)[0]
    model = load_model(student)
    frames = first_frames(model, image)
    assert frames is not None
    kept = model.adapter.codec.decode(model.adapter.codec.encode(frames))[0]
    torch.testing.assert_close(written[:, 0], kept[:, 0].clamp(-1, 1), rtol=0, atol=1.01 / 127.5)
    assert psnr(written[:, 0], video[:, 0]) > psnr(written[:, 0], video[:, -1]) + 3


def test_a_clip_gives_as_many_frames_as_the_model_takes(clip_student: str, video: Tensor, tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.apng", video)
    model = load_model(clip_student)
    frames = first_frames(model, path)
    assert frames is not None
    assert frames.shape == (1, 3, 5, 32, 32)
    torch.testing.assert_close(frames[0], video[:, :5], rtol=0, atol=0.51 / 127.5)
    made = generate_video(model, "a red three", model.sampler(), frames=frames)
    kept = model.adapter.codec.decode(model.adapter.codec.encode(frames))[0].clamp(-1, 1)
    torch.testing.assert_close(made[:, :5], kept, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="too short: 1 frames, 5 are needed"):
        first_frames(model, save_image(tmp_path / "one.png", video[:, 0]))


def test_an_image_of_another_size_is_scaled_until_it_fills_and_cropped(tmp_path: Path) -> None:
    pixels = np.zeros((64, 256, 3), np.uint8)
    pixels[:, 96:160] = 255  # the middle square of a wide image
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (read_first_frames(tmp_path / "wide.png", 32, 32, 1) > 0.8).all()


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: show it turned a quarter to the right
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=turned, quality=95)
    upright = read_first_frames(tmp_path / "photo.jpg", 32, 32, 1)[0, :, 0]
    assert upright[:, :, 20:].mean() > 0.9
    assert upright[:, :, :12].mean() < -0.9


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), (b"", "cannot be decoded"), (b"no image", "cannot be decoded")]
)
def test_a_bad_image_is_refused_before_anything_is_written(
    content: bytes | None, message: str, student: str, tmp_path: Path
) -> None:
    image = tmp_path / "first.png"
    if content is not None:
        image.write_bytes(content)
    arguments = GenerateArguments(student, "a red three", out=tmp_path / "v.mp4", image=image)
    with pytest.raises(UserError, match=rf"image .*first\.png:? {message}"):
        run_generate(arguments)
    assert not (tmp_path / "v.mp4").exists()


def test_a_model_and_an_image_that_do_not_go_together_are_refused(
    student: str, clip_student: str, video: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="needs an image: give it with --image"):
        run_generate(GenerateArguments(student, "a red three", out=tmp_path / "v.mp4"))
    with pytest.raises(UserError, match="needs a clip of 5 frames: give it with --image"):
        run_generate(GenerateArguments(clip_student, "a red three", out=tmp_path / "v.mp4"))
    image = save_image(tmp_path / "first.png", video[:, 0])
    with pytest.raises(UserError, match="generates from text alone"):
        run_generate(GenerateArguments("tiny", "a red three", out=tmp_path / "v.mp4", image=image))


def test_evaluation_goes_on_from_the_real_videos_of_its_prompts(student: str) -> None:
    judge = Judge(8, seed=1, reference=64)
    result = evaluate_rows({"student": RowSpec(student)}, judge=judge, keep_videos=8, batch_size=3)
    made, real = result.videos["student"][:, :, 0], judge.real_videos()[:, :, 0]
    for index in range(8):
        assert psnr(made[index], real[index]) > psnr(made[index], real[index - 1])
    assert result.rows["student"].samples == 8


def sft_values(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "distill_model": "wan",
        "distill_method": "sft",
        "output": str(root / "run"),
        "model": {"path": "tiny", "given_frames": 1},
        "roles": {"student": {"trainable": True}},
        "ladder": {"times": LADDER},
        "method": {},
        "data": {"path": "tiny", "size": 8, "batch_size": 2, "cache": str(root / "cache")},
        "trainer": {"max_steps": 2, "log_every": 1},
        **changes,
    }


@pytest.mark.parametrize("own", [False, True], ids=["world", "own images"])
def test_a_run_trains_and_validates_on_given_frames_and_says_so_in_its_recipe(
    own: bool, video: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvideo.training.validation.VALIDATION_REFERENCE", 64)  # its figures are not under test
    image = str(save_image(tmp_path / "first.png", video[:, 0]))
    validation = {"prompts": ["a red three"], "images": [image]} if own else {"world_prompts": 2}
    values = sft_values(tmp_path, validation={"every": 2, **validation})
    folder = run(validate(run_schema("wan", "sft"), values, "test"))
    assert len(list((tmp_path / "run" / "validation").glob("step-*.mp4"))) == 2
    model = load_model(str(folder))
    assert model.adapter.conditioner.first_frames == (1,)
    assert model.sampler(steps=2) == SamplerSpec.teacher(
        model.adapter.folder.teacher_times(2), model.sampler().guidance
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": {"every": 2, "prompts": ["a red three"]}}, r"validation\.images: this model goes on"),
        (
            {"validation": {"every": 2, "prompts": ["a"], "images": ["x.png"]}, "model": {"path": "tiny"}},
            r"validation\.images: this model generates from text alone",
        ),
        ({"validation": {"every": 2, "prompts": ["a"], "images": ["x", "y"]}}, "2 files for 1 prompts"),
        ({"data": {"prompts": "PROMPTS", "batch_size": 2}}, "goes on from given frames|trains on videos"),
    ],
)
def test_a_run_that_lacks_its_frames_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red three\n")
    if "data" in changes:
        changes["data"]["prompts"] = str(tmp_path / "prompts.txt")
    with pytest.raises(UserError, match=message):
        run(validate(run_schema("wan", "sft"), sft_values(tmp_path, **changes), "test"))


def test_simulated_rollouts_of_a_model_with_given_frames_read_videos(tmp_path: Path) -> None:
    """DMD2 needs prompts alone, but not for a model that goes on from frames."""
    roles = {role: {"trainable": role != "teacher"} for role in ("student", "teacher", "critic")}
    values = sft_values(tmp_path, distill_method="dmd2", roles=roles, method={"generator_update_interval": 1})
    folder = run(validate(run_schema("wan", "dmd2"), values, "test"))
    assert load_model(str(folder)).recipe["model"]["given_frames"] == 1
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red three\n")
    alone = {**values, "output": str(tmp_path / "other"), "data": {"prompts": str(prompts), "batch_size": 2}}
    with pytest.raises(UserError, match="goes on from given frames"):
        run(validate(run_schema("wan", "dmd2"), alone, "test"))
