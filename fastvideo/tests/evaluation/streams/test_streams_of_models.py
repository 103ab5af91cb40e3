"""Streams of a toy Wan: batches against single streams, real pasts, and a whole measurement by command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastvideo.cli.evaluate import EvaluateArguments, run_evaluate
from fastvideo.data.video_io import to_frames
from fastvideo.distillation.chunks import Reach
from fastvideo.distillation.sample import SamplerSpec, prompt_seeds
from fastvideo.distillation.types import UserError
from fastvideo.evaluation.streams.exposure import exposure_places
from fastvideo.evaluation.streams.measure import switch_latent
from fastvideo.evaluation.streams.world import StreamJudge
from fastvideo.inference.loading import LoadedModel, load_model
from fastvideo.inference.locks import lock_of
from fastvideo.inference.sampler import Sampling, sample_latents
from fastvideo.inference.stream_batches import Change, StreamBatch, continued, stream_frames
from fastvideo.inference.streaming import Streamer
from fastvideo.sampling_ranges import OnSwitch
from fastvideo.tests.distillation.tiny import wan_folder

PROMPTS = ("a green seven moving left", "a red three")
REACH = Reach(1, window=2, sink=1)
SIZE = {"height": 32, "width": 32, "num_frames": 25, "max_sequence_length": 8}
STREAMING = {"chunk": 1, "window": 2, "sink": 1, "positions": "window", "context_time": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A streaming student: random weights and a recipe."""
    folder = tmp_path_factory.mktemp("models") / "student"
    shutil.copytree(wan_folder(tmp_path_factory.mktemp("wan")), folder)
    recipe = {"ladder": [1.0, 0.6], "guidance": 1.0, "sampler": "renoise", "streaming": STREAMING, "model": SIZE}
    recipe |= {"steps": 7, "weights": "live"}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return str(folder)


@pytest.fixture(scope="module")
def model(folder: str) -> LoadedModel:
    return load_model(folder)


def batch(model: LoadedModel, sampler: SamplerSpec, prompts: Sequence[str] = PROMPTS) -> StreamBatch:
    return StreamBatch(model, sampler, prompts, prompt_seeds(3, prompts))


def frames(made: StreamBatch, count: int, change: Change | None = None) -> Tensor:
    return torch.cat([piece.frames for piece in stream_frames(made, count, change)], dim=2)


@pytest.mark.parametrize("reach", [REACH, Reach(3), None], ids=str)
def test_streams_are_samples_decoded_whole(model: LoadedModel, reach: Reach | None) -> None:
    sampler = SamplerSpec((1.0, 0.6), 1.5, "euler", reach)
    latents = sample_latents(model.adapter, model.denoiser, Sampling(PROMPTS, sampler, 3))
    assert torch.equal(frames(batch(model, sampler), 25), model.adapter.codec.decode(latents).clamp(-1, 1))


@pytest.mark.parametrize("policy", get_args(OnSwitch))
def test_a_switch_is_that_of_a_single_stream(model: LoadedModel, policy: OnSwitch) -> None:
    """The third chunk, frame 9, is the first under the new prompt; a cut begins a new video."""
    sampler = model.sampler()
    found = frames(batch(model, sampler), 17, Change(("a three", "a three"), 3, policy))
    with Streamer(model, sampler, seed=3).open(PROMPTS[0]) as stream:
        chunks = [next(stream) for _ in range(3)]
        stream.prompt("a three", policy)
        chunks += [next(stream) for _ in range(3)]
    alone = torch.cat([torch.from_numpy(chunk) for chunk in chunks])[:17]
    ours = torch.from_numpy(to_frames(found[0]))
    assert ours.shape == alone.shape
    assert int((ours.int() - alone.int()).abs().max()) <= 1
    assert not torch.equal(found[:, :, 9:], frames(batch(model, sampler), 17)[:, :, 9:])


def test_continuations_see_the_real_past_and_nothing_else(model: LoadedModel) -> None:
    sampler = model.sampler()
    real = torch.randn(2, 4, 7, 4, 4, generator=torch.Generator().manual_seed(0))
    places = exposure_places(25, REACH, 4, 8)
    assert places == (3, 5)  # windows from frame 8 and 16: the last frame of the past, and eight new ones
    found = dict(continued(batch(model, sampler), real, places, 8))
    decoded = model.adapter.codec.decode(real)
    assert all(torch.equal(found[place][:, :, 0], decoded[:, :, 4 * place - 4]) for place in places)
    changed = real.clone()
    changed[:, :, 3:] = 0.0
    other = dict(continued(batch(model, sampler), changed, places, 8))
    assert found[3].shape == (2, 3, 9, 32, 32)
    assert torch.equal(other[3], found[3])
    assert not torch.equal(other[5][:, :, 1:], found[5][:, :, 1:])


def test_every_call_has_the_networks_lock(model: LoadedModel) -> None:
    """A page that plays the same model in another thread waits meanwhile."""
    free = []

    def take() -> bool:
        if taken := (lock := lock_of(model.network)).acquire(blocking=False):
            lock.release()
        return taken

    def look(*_: object) -> None:
        with ThreadPoolExecutor(1) as other:
            free.append(other.submit(take).result())

    made, real = batch(model, model.sampler()), torch.zeros(2, 4, 7, 4, 4)
    with model.network.register_forward_pre_hook(look):
        frames(made, 9, Change(PROMPTS, 1, "recache"))
        list(continued(made, real, (5,), 8))
    assert free
    assert not any(free)


def test_places() -> None:
    assert exposure_places(129, Reach(1), 4, 16) == tuple(range(5, 31, 4))
    assert exposure_places(33, Reach(3), 4, 16) == (6,)
    assert exposure_places(129, None, 4, 16) == ()
    assert switch_latent(129, Reach(1), 4) == 16
    assert switch_latent(33, Reach(3), 4) == 3
    with pytest.raises(UserError, match="window of 9 frames before it and one after"):
        switch_latent(17, Reach(1), 4)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few reference windows behind the command."""
    monkeypatch.setattr("fastvideo.evaluation.streams.world.StreamJudge", partial(StreamJudge, reference=96))


@pytest.mark.usefixtures("quick")
def test_command_measures_streams(folder: str, tmp_path: Path) -> None:
    console = Console(width=200, record=True)
    arguments = EvaluateArguments((folder, f"{folder}:1"), long=25, switches=2, prompts=2, seed=1, out=tmp_path / "out")
    run_evaluate(arguments, console)
    text = console.export_text()
    assert "2 streams of 25 frames" in text
    assert "2 prompt switches (flush)" in text
    values = json.loads((tmp_path / "out" / "metrics.json").read_text())
    row = values[folder]
    assert row["network_calls"] == 2
    assert row["streaming"]["window"] == 2
    assert row["series"]["frechet"]["at"] == row["series"]["real_frechet"]["at"] == [0, 16]
    assert len(row["series"]["ink"]["value"]) == 25
    assert row["series"]["frechet_bias"]["at"] == [16]
    assert {"speed_last", "seam_acceleration", "switch_median", "frechet_last_floor"} <= set(row)
    assert values["evaluation"]["frames"] == 25
    assert values["students"][f"{folder}:1"] == {"folder": folder, "steps": 7, "weights": "live"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 models side by side" in page
    assert page.count('class="strip frames"') == 4
    with pytest.raises(UserError, match="holds figures already"):
        run_evaluate(arguments, console)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"switches": 4}, "add --long"),
        ({"on_switch": "cut"}, "add --long"),
        ({"long": 25, "on_switch": "cut"}, "--on-switch cut: no prompt changes: add --switches"),
        ({"long": 26}, "such as 25 or 29"),
        ({"long": 17}, "at least 25"),
        ({"long": 25, "switches": 1}, "at least 2"),
        ({"long": 25, "prompts": 1}, "at least 2 prompts"),
        ({"long": 25, "teacher": "tiny"}, "leave out --teacher"),
        ({"long": 25, "sweep_guidance": "1,2"}, "leave out --sweep-guidance"),
        ({"long": 25, "prompts": "prompts.txt"}, "number of prompts"),
    ],
)
def test_bad_arguments(folder: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_evaluate(EvaluateArguments((folder,), **{"prompts": 2, **arguments}))  # type: ignore[arg-type]


def test_models_of_another_size_are_refused(folder: str, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    shutil.copytree(folder, wide)
    recipe = json.loads((wide / "recipe.json").read_text())
    (wide / "recipe.json").write_text(json.dumps({**recipe, "model": {**SIZE, "height": 16}}))
    with pytest.raises(UserError, match=r"whose frames are 32x32; .*wide makes 16x32"):
        run_evaluate(EvaluateArguments((str(wide),), long=25, prompts=2))


def test_models_of_whole_videos_are_measured_at_their_own_length() -> None:
    with pytest.raises(UserError, match=r"tiny makes whole videos of 9 frames.*no `streaming`"):
        run_evaluate(EvaluateArguments(("tiny",), long=25, prompts=2))
