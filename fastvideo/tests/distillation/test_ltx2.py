"""LTX-2: a video and its sound in one state, both equal to stock diffusers, both trained."""

from __future__ import annotations

import copy
import json
import shutil
import wave
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvideo.cli import main
from fastvideo.cli.generate import GenerateArguments, run_generate
from fastvideo.data.sound_io import read_sound
from fastvideo.data.video_io import write_video
from fastvideo.distillation.adapters.ltx2.adapter import LTX2Adapter
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.frame_bridge import FrameUse
from fastvideo.distillation.frame_roles import frame_bridge
from fastvideo.distillation.registry import load_exporter, run_schema
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.sample import SampleNoise, prompt_seeds
from fastvideo.distillation.samplers import euler
from fastvideo.distillation.sound import Sound
from fastvideo.distillation.types import UserError
from fastvideo.inference.export import run_export
from fastvideo.inference.generate import generate_sounded, generate_video
from fastvideo.inference.loading import load_model
from fastvideo.tests.distillation.test_flow_families import config_of, sizes
from fastvideo.tests.distillation.tiny import made_family, wan_config
from fastvideo.training.run import run

PROMPTS = ["a green seven moving up", "red three"]
CLOSE = 1e-5
pytestmark = pytest.mark.slow


@pytest.fixture
def family(tiny_wan: Path) -> LTX2Adapter:
    found = made_family("ltx2", tiny_wan.parent)
    assert isinstance(found, LTX2Adapter)
    return found


def like(family: LTX2Adapter, **options: Any) -> LTX2Adapter:
    """Another adapter over the same folder, or over one that is named."""
    return LTX2Adapter(validate(type(family.config), {**family.config.model_dump(), **options}, "test"))


@torch.no_grad()
def ours(adapter: LTX2Adapter, noise: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
    """Video in [0, 1] and waveform of four steps."""
    adapter.ensure_negative_conditioning()
    role = RoleHandle("teacher", adapter, adapter.folder.load_network())
    condition, negative = adapter.conditioner.encode_prompts(PROMPTS), adapter.conditioner.negative(2)
    velocity = partial(role.guided_velocity, condition=condition, negative=negative, guidance=guidance)
    times = adapter.folder.teacher_times(4)
    latents = euler(lambda x, t, r=None: velocity(x, t), noise, times)
    video = (adapter.codec.decode(latents).clamp(-1, 1) + 1) / 2
    return video.transpose(1, 2), adapter.codec.decode_sound(latents).waveform


def stock(adapter: LTX2Adapter, noise: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
    """The same of the stock pipeline, with its own scheduler."""
    from diffusers import DiffusionPipeline

    pipeline, exporter = DiffusionPipeline.from_pretrained(adapter.config.path), load_exporter(adapter.config)
    pipeline.set_progress_bar_config(disable=True)
    call = exporter.call_arguments(4, guidance) | exporter.latent_arguments(noise, adapter.codec.parts) | sizes(adapter)
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * 2
    return pipeline(prompt=PROMPTS, output_type="pt", return_dict=False, **call)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("factor", "rescale", "rate"), [(1.0, 0.0, 24.0), (3.0, 0.7, 12.5)])
@pytest.mark.parametrize("name", ["ltx2", "ltx2-2.3"])
def test_guided_steps_give_the_video_and_the_sound_of_the_stock_pipeline(
    name: str, factor: float, rescale: float, rate: float, tiny_wan: Path
) -> None:
    options = {"audio_guidance_factor": factor, "guidance_rescale": rescale, "frame_rate": rate}
    adapter = made_family(name, tiny_wan.parent, **options)
    assert isinstance(adapter, LTX2Adapter)
    noise = normal((2, *adapter.codec.latent_shape), seeded(6))
    (video, sound), (stock_video, stock_sound) = ours(adapter, noise, 2.5), stock(adapter, noise, 2.5)
    assert float((video - stock_video).abs().max()) <= CLOSE
    assert float((sound - stock_sound).abs().max()) <= CLOSE
    assert float(stock_sound.std(dim=-1).min()) > 0.01  # there is something to hear
    weaker = ours(like(adapter, audio_guidance_factor=0.5), noise, 2.5)[1]
    other = ours(like(adapter, guidance_rescale=1.0), noise, 2.5)
    assert float((weaker - stock_sound).abs().max()) > 100 * CLOSE
    assert all(float((a - b).abs().max()) > 10 * CLOSE for a, b in zip(other, (video, sound), strict=True))


@pytest.mark.parametrize(("frames", "rate"), [(9, 24.0), (121, 24.0), (121, 25.0), (97, 23.976), (17, 60.0), (1, 30.0)])
def test_the_sound_is_as_long_as_in_the_stock_pipeline(family: LTX2Adapter, frames: int, rate: float) -> None:
    adapter, made = like(family, num_frames=frames, frame_rate=rate, height=32, width=32), dict[str, Any]()

    class Seen(Exception):
        pass

    def prepare(*args: Any, audio_latent_length: int, **options: Any) -> Tensor:
        made["length"] = audio_latent_length
        raise Seen

    from diffusers import LTX2Pipeline

    pipeline = LTX2Pipeline.from_pretrained(adapter.config.path)
    pipeline.prepare_audio_latents = prepare
    with pytest.raises(Seen):
        pipeline(prompt="red", height=32, width=32, num_frames=frames, frame_rate=rate, max_sequence_length=12)
    assert adapter.codec.parts.members[1].shape[0] == made["length"]


def test_prompts_of_other_lengths_reach_the_network_as_in_the_stock_pipeline(family: LTX2Adapter) -> None:
    """Both of one batch, and each alone: Gemma's padding is on the left, and becomes registers."""
    from diffusers import LTX2Pipeline

    pipeline = LTX2Pipeline.from_pretrained(family.config.path)
    hidden, mask, *_ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=12)
    assert mask.sum(1).unique().numel() == 2
    video, audio, _ = pipeline.connectors(hidden, mask, padding_side="left")
    own = family.conditioner.encode_prompts(PROMPTS).of(family.conditioner.key)
    torch.testing.assert_close(own["prompt_embeds"], video)
    torch.testing.assert_close(own["audio_prompt_embeds"], audio)


def test_a_waveform_becomes_the_spectrum_of_its_definition(family: LTX2Adapter) -> None:
    """Magnitudes of a windowed transform in bands of the slaney scale, and their logarithm; the stock pipeline takes
    the latents back to those of its autoencoder."""
    from diffusers import LTX2Pipeline
    from transformers.audio_utils import mel_filter_bank

    codec, seen = family.codec, list[Tensor]()
    vae = codec.audio_vae
    vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    waveform = 0.3 * normal((1, 2, 16_000), seeded(2))
    waveform[..., 1500:4500] = 0.0  # longer than a window
    latents = codec.encode_sound(waveform)
    length, width = codec.parts.members[1].shape
    assert latents.shape == (1, length, width)
    assert seen[0].shape == (1, 2, 4 * length - 3, 8)
    raw = LTX2Pipeline._pack_audio_latents(vae.encode(seen[0]).latent_dist.mode())
    torch.testing.assert_close(LTX2Pipeline._denormalize_audio_latents(latents, vae.latents_mean, vae.latents_std), raw)
    window = torch.hann_window(1024, dtype=torch.float64)
    options = {"center": True, "pad_mode": "reflect", "return_complex": True}
    magnitudes = torch.stft(waveform[0].double(), 1024, 160, window=window, **options).abs()
    bands = torch.from_numpy(mel_filter_bank(513, 8, 0.0, 8000.0, 16_000, "slaney", "slaney"))
    wanted = (magnitudes.mT @ bands).clamp_min(1e-5).log()[:, : 4 * length - 3]
    torch.testing.assert_close(seen[0][0].double()[:, :-4], wanted[:, :-4], rtol=1e-4, atol=1e-4)  # ours ends there
    short = torch.nn.functional.pad(waveform[..., :500], (0, 2000))
    assert torch.equal(codec.encode_sound(waveform[..., :500]), codec.encode_sound(short))
    assert not torch.equal(codec.encode_sound(short), latents)


def test_a_video_that_comes_alone_has_silence(family: LTX2Adapter) -> None:
    """Beside its own latents, which the stock pipeline takes back to those of its autoencoder."""
    from diffusers import LTX2Pipeline

    codec, vae, videos = family.codec, family.codec.vae, normal((2, 3, 9, 64, 96), seeded(1)).clamp(-1, 1)
    pictures, sounds = codec.parts.split(codec.encode(videos))
    assert torch.equal(sounds, codec.encode_sound(torch.zeros(1, 2, 100)).expand(2, -1, -1))
    statistics = vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    raw = LTX2Pipeline._denormalize_latents(pictures, *statistics)
    torch.testing.assert_close(raw, vae.encode(videos).latent_dist.mode(), rtol=1e-4, atol=1e-5)


def test_the_sound_weighs_in_losses_as_the_config_says(family: LTX2Adapter) -> None:
    assert family.codec.parts.shares == [0.5, 0.5]
    assert like(family, audio_weight=3.0).codec.parts.shares == [0.25, 0.75]


@torch.no_grad()
def test_another_autoencoder_of_sound_is_another_space_and_other_connectors_make_other_texts(
    family: LTX2Adapter, tmp_path: Path
) -> None:
    """Stored latents and texts of the one are refused by the other."""
    other = like(family, path=str(shutil.copytree(family.config.path, tmp_path / "other")))
    for module, part in ((family.codec.audio_vae, "audio_vae"), (family.conditioner.text_encoder, "connectors")):
        changed = copy.deepcopy(getattr(module, part, module))
        next(changed.parameters()).add_(1.0)
        changed.save_pretrained(tmp_path / "other" / part)
    assert other.codec.latent_key != family.codec.latent_key
    found, before = other.conditioner.text_settings, family.conditioner.text_settings
    assert {name for name in before if found[name] != before[name]} == {"connectors"}


def test_tokens_of_both_parts_are_judged(family: LTX2Adapter) -> None:
    network, noise = family.folder.load_network(), normal((2, *family.codec.latent_shape), seeded(3))
    condition, t, parts = family.conditioner.encode_prompts(PROMPTS), torch.tensor([0.4, 0.8]), family.codec.parts
    seen = list[Tensor]()
    hook = network.transformer_blocks[0].register_forward_hook(lambda _, inputs, output: seen.append(output[1]))
    _, (tokens,) = family.features(network, noise, t, condition, (0,))
    hook.remove()
    video, sound = (part.shape for part in parts.members)
    count = video[1] * video[2] * video[3]
    assert tokens.shape == (2, count + sound[0] * max(1, count // sound[0]), 16)
    assert torch.equal(tokens[:, count : count + sound[0], : seen[0].shape[2]], seen[0])
    (gradient,) = torch.autograd.grad(
        family.features(network, noise.requires_grad_(), t, condition, (0,))[1][0][:, count:].square().sum(), noise
    )
    assert parts.split(gradient)[1].any()
    with pytest.raises(UserError, match="the sound's tokens have 9 channels and the video's 8"):
        family._tokens(noise, (torch.zeros(1, 4, 8), torch.zeros(1, 2, 9)))


def test_registers_that_do_not_fill_the_padding_are_refused(family: LTX2Adapter) -> None:
    odd = like(family, max_sequence_length=7)
    with pytest.raises(UserError, match="must be a multiple of the connectors' 2 registers, such as 6 or 8, got 7"):
        odd.conditioner.encode_prompts(["red"])


def test_connectors_without_registers_are_refused(family: LTX2Adapter, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(family.config.path, copy)
    folder = copy / "connectors"
    config = json.loads((folder / "config.json").read_text()) | {"audio_connector_num_learnable_registers": None}
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["audio_connector.learnable_registers"]
    save_file(tensors, weights)
    with pytest.raises(UserError, match="the audio connector has no registers"):
        like(family, path=str(copy)).conditioner.encode_prompts(["red"])


def test_several_sizes_are_refused_before_anything_is_written(
    family: LTX2Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "videos", tmp_path / "data"
    write_video(folder / "one.mp4", torch.zeros(3, 9, 64, 96), 24)
    (folder / "one.txt").write_text("a red three")
    call = ["preprocess", str(folder), "--model", family.config.path, "--out", str(out), "--workers", "1"]
    call += ["--num-frames", "9", "--height", "64", "--width", "96", "--max-sequence-length", "12"]
    assert main([*call, "--buckets", "64x96x9", "96x64x9"]) == 2
    assert "--buckets 64x96x9, 96x64x9: latents of video and audio have one size: give one" in capsys.readouterr().err
    assert not out.exists()


def test_a_teacher_of_another_space_and_frames_are_refused(family: LTX2Adapter, tmp_path: Path) -> None:
    config = config_of(family, "ltx2", "dmd2", tmp_path).model_dump()
    other = {"family": "wan", "path": "tiny", "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
    for role in ("teacher", "critic"):
        config["roles"][role] = {**config["roles"][role], "model": other}
    with pytest.raises(UserError, match=r"roles\.\w+\.model: video and audio cross to no other latent space"):
        run(validate(run_schema("ltx2", "dmd2"), config, "test"))


def test_a_model_with_sound_scores_no_single_frames(family: LTX2Adapter, tiny_wan: Path) -> None:
    main = WanFamily(wan_config(tiny_wan, height=64, width=96))
    use = FrameUse(("frame_teacher",), "auto", count=1, first=True, times=(0.02, 0.5), resize=False)
    with pytest.raises(UserError, match=r"roles\.frame_teacher\.model: its samples are video and audio, and single"):
        frame_bridge(use, main, {"frame_teacher": family})


@pytest.mark.parametrize("method", ["sft", "cm", "tcm", "scm", "rcm", "dmd2_gan", "f_distill", "ladd", "phased_dmd"])
def test_methods_for_whole_videos_train_both_parts(family: LTX2Adapter, method: str, tmp_path: Path) -> None:
    student = run(config_of(family, "ltx2", method, tmp_path))
    after = like(family, path=str(student)).folder.load_network().state_dict()
    before = family.folder.load_network().state_dict()
    for name in ("proj_in.weight", "audio_proj_in.weight"):
        assert not torch.equal(after[name], before[name])
        assert after[name].isfinite().all()


def test_a_student_is_exported_with_its_sound_and_goes_on_after_a_stop(family: LTX2Adapter, tmp_path: Path) -> None:
    """Adapters of both streams: the run of two steps ends where one of one step, resumed, does."""
    targets = ["to_q", "to_v", "ff.net.2", "audio_ff.net.2"]
    config = config_of(family, "ltx2", "dmd2", tmp_path, lora={"rank": 2, "targets": targets}).model_dump()
    config["model"] |= {"height": 64, "width": 64}
    config["checkpoint"] |= {"every": 1, "keep": 2}
    validated = partial(validate, run_schema("ltx2", "dmd2"))
    student = run(validated(config, "test"))
    short = {**config, "output": str(tmp_path / "short")}
    run(validated({**short, "trainer": {**config["trainer"], "max_steps": 1}}, "test"))
    again = run(validated(short, "test"), resume=True)
    one, other = (like(family, path=str(folder)).folder.load_network().state_dict() for folder in (student, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    run_export(str(tmp_path / "run"), tmp_path / "out")
    model = load_model(str(tmp_path / "out"))
    adapter = model.adapter
    noise = SampleNoise(prompt_seeds(3, [PROMPTS[0]]), adapter.device).draw(adapter.codec.latent_shape)
    from diffusers import LTX2Pipeline

    pipeline, exporter = LTX2Pipeline.from_pretrained(tmp_path / "out"), load_exporter(adapter.config)
    call = json.loads((tmp_path / "out" / "recipe.json").read_text())["stock_call"]
    call |= exporter.latent_arguments(noise, adapter.codec.parts) | sizes(adapter)
    # Its sampler draws noise between its steps: its first step alone is the same everywhere.
    first = {**call, "num_inference_steps": 1, "sigmas": call["sigmas"][:1]}
    video, sound = pipeline(prompt=PROMPTS[0], output_type="pt", return_dict=False, **first)
    clip = generate_sounded(model, PROMPTS[0], model.sampler(1), seed=3)
    assert clip.sound is not None
    assert float(((clip.video + 1) / 2 - video[0].transpose(0, 1)).abs().max()) <= CLOSE
    assert float((clip.sound.waveform - sound).abs().max()) <= CLOSE
    vocoder = model.adapter.codec.vocoder
    vocoder.register_forward_pre_hook(lambda *_: pytest.fail("a sound is made that nobody hears"))
    assert torch.equal(generate_video(model, PROMPTS[0], model.sampler(1), seed=3), clip.video)


def test_generate_writes_the_sound_into_the_video_or_beside_it(family: LTX2Adapter, tmp_path: Path) -> None:
    import av

    options = {"height": 64, "width": 96, "frames": 9, "steps": 2, "max_sequence_length": 12}
    arguments = partial(GenerateArguments, family.config.path, "a red three", **options)
    line = run_generate(arguments(out=tmp_path / "a.mp4"))
    assert "0.33 s of sound at 8000 Hz" in line
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert file.streams.video[0].average_rate == 24
        heard = np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1)
    assert heard.shape[0] == 2
    assert heard.shape[1] / 8000 == pytest.approx(0.33, abs=0.2)  # whole packets
    line = run_generate(arguments(out=tmp_path / "b.gif"))
    assert f"0.33 s of sound at 8000 Hz in {tmp_path / 'b.wav'}" in line
    with wave.open(str(tmp_path / "b.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 8000, 2640)
        exact = np.frombuffer(file.readframes(2640), np.int16).reshape(-1, 2).T / 32768
    assert np.corrcoef(exact[0], heard[0, : exact.shape[1]])[0, 1] > 0.9
    with pytest.raises(UserError, match="--fps 8: sound and pictures of this model fit at 24: leave --fps out"):
        run_generate(arguments(out=tmp_path / "c.mp4", fps=8))
    (tmp_path / "c.wav").mkdir()
    with pytest.raises(UserError, match=r"c.gif: its sound goes into .*c.wav, which is a folder: choose another name"):
        run_generate(arguments(out=tmp_path / "c.gif"))
    assert not [*tmp_path.glob("c.[mg]*")]


def test_videos_with_sound_are_prepared_and_trained_on(family: LTX2Adapter, tmp_path: Path) -> None:
    """Three videos, of which one is silent and left out."""
    folder = tmp_path / "videos"
    sounds = [Sound(0.3 * normal((1, 2, 8000), seeded(i)), 16_000) for i in range(2)]
    for name, sound in {"one": sounds[0], "two": sounds[1], "mute": None}.items():
        write_video(folder / f"{name}.mp4", normal((3, 9, 64, 96), seeded(7)).clamp(-1, 1), 24, sound=sound)
        (folder / f"{name}.txt").write_text("a red three")
    sizes = ["--height", "64", "--width", "96", "--num-frames", "9", "--max-sequence-length", "12"]
    call = ["preprocess", str(folder), "--model", family.config.path, "--out", str(tmp_path / "data"), *sizes]
    assert main([*call, "--workers", "1"]) == 1  # something is left out
    (skipped,) = (tmp_path / "data" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped) == {"file": "mute.mp4", "reason": "no sound"}
    rows = pq.read_table(next((tmp_path / "data").glob("*.parquet"))).to_pylist()
    codec, found = family.codec, dict[str, Tensor]()
    for row in rows:
        flat = torch.from_numpy(np.frombuffer(row["vae_latent_bytes"], np.float32).copy())
        found[row["file_name"]] = codec.parts.split(flat.view(1, *codec.latent_shape))[1]
    assert found.keys() == {"one.mp4", "two.mp4"}
    wanted = codec.encode_sound(read_sound(folder / "one.mp4", 0.0, 9 / 24, 16_000, 2).waveform)
    torch.testing.assert_close(found["one.mp4"], wanted)
    assert float((found["one.mp4"] - found["two.mp4"]).abs().max()) > 0.01
    config = config_of(family, "ltx2", "sft", tmp_path).model_dump()
    config["model"] |= {"height": 64, "width": 96}
    config["data"] = {"path": str(tmp_path / "data"), "batch_size": 2}
    run(validate(run_schema("ltx2", "sft"), config, "test"))
