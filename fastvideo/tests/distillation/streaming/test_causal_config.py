"""A student that generates chunk by chunk, from the config to the sampler: refusals, recipe, loading."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.chunks import Reach
from fastvideo.distillation.config.causal import reach_of
from fastvideo.distillation.config.reading import config_of
from fastvideo.distillation.denoiser import Denoiser
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.methods.fine_tuning.causal_sft import CausalSFTMethod
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, sample
from fastvideo.errors import UserError
from fastvideo.evaluation.rows import RowSpec, comparison_rows
from fastvideo.inference.loading import OpenedModel, open_model
from fastvideo.inference.recipe import result_recipe
from fastvideo.tests.distillation.tiny import wan_config

REACH = Reach(1, window=2, sink=1)


DMD2_ROLES = {name: {"trainable": name != "teacher"} for name in ("student", "teacher", "critic")}


def values(folder: Path, **reach: Any) -> dict[str, Any]:
    model = {"path": str(folder), "height": 16, "width": 32, "num_frames": 17, "max_sequence_length": 8}
    method = {"reach": reach or {"chunk": 1, "window": 2, "sink": 1}, "context_time": 0.1}
    names = {"distill_model": "wan", "distill_method": "causal_sft", "output": "out"}
    return {**names, "model": model, "roles": {"student": {"trainable": True}}, "method": method}


@pytest.mark.parametrize(
    ("reach", "message"),
    [
        ({"chunk": 0}, r"method.reach: chunk: at least 1"),
        ({"chunk": 2, "window": 1}, r"method.reach: window: a positive multiple of chunk 2, got 1"),
        ({"chunk": 2, "window": 4, "sink": 1}, r"method.reach: sink: 0 or a multiple of chunk 2"),
        ({"sink": 1}, r"method.reach: sink: a sink needs a window"),
        ({"chnk": 2}, r"method.reach.chnk: unknown key; did you mean 'chunk'"),
        ({"chunk": 1.5}, r"method.reach.chunk: .* valid integer"),
        ({"positions": "relative"}, r"method.reach.positions: .*'window' or 'absolute'"),
    ],
)
def test_a_reach_that_is_none_is_named_with_its_key(reach: dict[str, Any], message: str, tiny_wan: Path) -> None:
    with pytest.raises(UserError, match=message):
        config_of(values(tiny_wan, **reach), "here")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("causal_sft", {"forcing": "diffusion"}, "`context_time` is noise on a clean past"),
        ("causal_kd", {"forcing": "diffusion"}, "`context_time` is noise on a clean past"),
        ("causvid", {"teacher_guidance": 2.0}, r"method.context_time: must be 0 for this method"),
    ],
)
def test_noise_on_the_past_is_refused_where_no_training_meets_it(
    method: str, options: dict[str, Any], message: str, tiny_wan: Path
) -> None:
    """The result's recipe would give it to every stream."""
    given = values(tiny_wan)
    given |= {"distill_method": method, "method": {**given["method"], **options}, "roles": DMD2_ROLES}
    if method != "causvid":
        given["roles"] = {"student": {"trainable": True}}
    with pytest.raises(UserError, match=message):
        config_of(given, "here")


def test_a_model_that_goes_on_from_frames_does_not_stream(tiny_wan: Path) -> None:
    given = values(tiny_wan)
    given["model"]["given_frames"] = 1
    config = config_of(given, "here")
    with pytest.raises(UserError, match=r"method.reach: .* given frames \(1\), and streams have text alone"):
        build_method(config, build_adapter(config))


def test_flags_reach_into_it(tiny_wan: Path) -> None:
    flags = {"method.reach.window": ["3"], "method.reach.positions": ["absolute"]}
    config = config_of(values(tiny_wan), "here", flags)
    assert config.method.reach == Reach(1, window=3, sink=1, positions="absolute")
    assert config_of(config.model_dump(mode="json"), "written") == config
    with pytest.raises(UserError, match=r"did you mean '--method.reach.window'"):
        config_of(values(tiny_wan), "here", {"method.reach.windw": ["3"]})


@pytest.mark.parametrize(
    ("changes", "context", "message"),
    [
        ({"num_frames": 9}, 1, r"method.reach.chunk: a video of 3 latent frames has no chunk of 4"),
        ({}, 2, r"parallel.context: causal_sft attends chunk by chunk"),
        (
            {"distill_method": "self_forcing", "roles": DMD2_ROLES, "method": {"scored_frames": 6}},
            1,
            "method.scored_frames: the model's videos have 5 latent frames",
        ),
        (
            {"distill_model": "cogvideox", "model": {"path": "tiny_cogvideox"}, "method": {"forcing": "diffusion"}},
            1,
            "causal_sft needs frame_times of the model family, which cogvideox does not have",
        ),
    ],
)
def test_a_run_that_cannot_go_chunk_by_chunk_is_refused(
    changes: dict[str, Any], context: int, message: str, tiny_wan: Path
) -> None:
    given = values(tiny_wan, chunk=4)
    if "num_frames" in changes:
        given["model"]["num_frames"] = changes["num_frames"]
    else:
        given |= changes
    config = config_of(given, "here")
    processes = Processes() if context == 1 else dataclasses.replace(Processes(), world_size=2, context=2)
    with pytest.raises(UserError, match=message):
        build_method(config, build_adapter(config), processes)


def test_a_teacher_of_whole_videos_is_refused(tiny_wan: Path, tmp_path: Path) -> None:
    """Where its recipe does not say that it streams; with the recipe, or the user's word, it is taken."""
    given = {**values(tiny_wan), "distill_method": "causal_cd", "ladder": {"times": [1.0, 0.5]}}
    given["roles"] = {"student": {"trainable": True}, "teacher": {"trainable": False}}

    def refused(**changes: Any) -> str:
        config = config_of({**given, **changes}, "here")
        adapter = build_adapter(config)
        try:
            build_method(config, adapter, networks=dict.fromkeys(config.roles, adapter.folder.load_network()))
        except UserError as error:
            return str(error)
        return ""

    assert "roles.teacher.path" in refused()
    assert "causal_sft" in refused()
    assert not refused(method={**given["method"], "allow_bidirectional_teacher": True})
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_wan, teacher)
    (teacher / "recipe.json").write_text(json.dumps({"streaming": {"chunk": 1, "context_time": 0.1}}))
    roles = {**given["roles"], "teacher": {"trainable": False, "path": str(teacher)}}
    assert not refused(roles=roles)
    assert "every chunk starts from pure noise" in refused(roles=roles, ladder={"times": [0.9, 0.5]})
    assert "trained with noise up to 0.1 on its past" in refused(
        roles=roles, method={**given["method"], "context_time": 0.2}
    )
    (teacher / "recipe.json").write_text(json.dumps({"streaming": {"chunk": 3}}))
    assert "trained on chunks of 3 (its recipe.json says so); set method.reach.chunk: 3" in refused(roles=roles)
    (teacher / "recipe.json").write_text(json.dumps({"streaming": {"chunk": 2, "sink": 1}}))
    assert "is not what a stream needs: reach.sink: 0 or a multiple of chunk 2, got 1" in refused(roles=roles)
    (teacher / "recipe.json").write_text(json.dumps({"streaming": 3}))
    assert f"roles.teacher.path {teacher}: recipe.json: streaming 3 is not what a stream needs" in refused(roles=roles)
    (teacher / "recipe.json").write_text(json.dumps({"streaming": {"chunk": 3}}))
    for ema in ({"enabled": False}, {"roles": []}):
        assert "ema: causal_cd trains on the average of the student" in refused(roles=roles, ema=ema)
    starts = {**given["roles"], "student": {"trainable": True, "path": str(teacher)}}
    assert "roles.student.path" in refused(
        roles=starts, method={**given["method"], "allow_bidirectional_teacher": True}
    )


def recipe_of(folder: Path) -> dict[str, Any]:
    config = config_of(values(folder), "here")
    return result_recipe(config, build_adapter(config).folder, "live", 3)


def test_the_result_says_how_it_streams(tiny_wan: Path) -> None:
    streaming = {"chunk": 1, "window": 2, "sink": 1, "positions": "window", "context_time": 0.1}
    assert recipe_of(tiny_wan)["streaming"] == streaming
    plain = config_of({**values(tiny_wan), "distill_method": "sft", "method": {}}, "here")
    assert "streaming" not in result_recipe(plain, build_adapter(plain).folder, "live", 3)


def test_a_loaded_model_is_sampled_as_its_recipe_says(tiny_wan: Path) -> None:
    opened = open_model(str(tiny_wan), {"height": 16, "width": 32, "num_frames": 17, "max_sequence_length": 8})
    assert opened.sampler(steps=3).reach is None
    streaming = OpenedModel(opened.source, opened.adapter, recipe_of(tiny_wan))
    spec = streaming.sampler(steps=3, guidance=1.0)
    assert (spec.reach, spec.context_time) == (REACH, 0.1)
    assert (spec.network_calls, spec.calls_of(5)) == (3, 15)
    student = OpenedModel(opened.source, opened.adapter, {**recipe_of(tiny_wan), "ladder": [1.0, 0.5]})
    assert student.sampler().reach == REACH
    assert RowSpec("x", ladder=(1.0, 0.5)).sampler(student).reach == REACH


@pytest.mark.parametrize("wrong", [3, {"chunk": 0}, {"chunk": 1, "sink": 1}, {"context_time": 2}, {"chunk": "x"}])
def test_a_recipe_that_says_no_stream_is_refused(wrong: Any, tiny_wan: Path) -> None:
    opened = open_model(str(tiny_wan), {"height": 16, "width": 32, "num_frames": 17, "max_sequence_length": 8})
    with pytest.raises(UserError, match=r"recipe.json: streaming"):
        OpenedModel(opened.source, opened.adapter, {"streaming": wrong}).sampler()


def test_the_teachers_weights_are_compared_in_the_students_chunks(
    monkeypatch: pytest.MonkeyPatch, tiny_wan: Path
) -> None:
    recipe = {"ladder": [1.0, 0.5], "streaming": {"chunk": 1, "window": 2, "sink": 1}}
    monkeypatch.setattr("fastvideo.evaluation.rows.load_recipe", lambda folder: recipe)
    opened = open_model(str(tiny_wan), {"height": 16, "width": 32, "num_frames": 17, "max_sequence_length": 8})
    rows = comparison_rows(str(tiny_wan), "student")
    assert rows["untrained_2"].sampler(opened).reach == REACH
    assert rows["teacher_50"].sampler(opened).reach is None


def test_chunks_are_committed_with_the_noise_of_the_recipe(tiny_wan: Path) -> None:
    """Each past is committed once per chunk at ``context_time``, and both see the same noise."""
    adapter = WanFamily(wan_config(tiny_wan, num_frames=9))
    committed: list[tuple[torch.Tensor, float]] = []

    class Spy(Denoiser):
        def commit(self, past: Any, x0: torch.Tensor, condition: Any, t: float = 0.0) -> Any:
            committed.append((x0, t))
            return super().commit(past, x0, condition, t)

    network = adapter.folder.load_network()
    condition = adapter.conditioner.encode_prompts(["a red seven"])
    spec = SamplerSpec((1.0,), 2.0, "euler", Reach(1), context_time=0.25)
    shape = adapter.codec.latent_shape
    noisy = sample(Spy(adapter, network), SampleNoise([1]), shape, spec, condition, condition)
    assert [t for _, t in committed] == [0.25] * 4
    assert all(torch.equal(committed[i][0], committed[i + 1][0]) for i in (0, 2))
    noise = SampleNoise([1])
    for _ in range(2):  # the starts of this chunk and of the next one come first
        noise.like(noisy[:, :, :1])
    torch.testing.assert_close(committed[0][0], 0.75 * noisy[:, :, :1] + 0.25 * noise.like(noisy[:, :, :1]))
    clean = dataclasses.replace(spec, context_time=0.0)
    assert not torch.equal(sample(Denoiser(adapter, network), SampleNoise([1]), shape, clean, condition), noisy)


def test_only_methods_of_chunks_have_a_reach() -> None:
    from fastvideo.distillation.registry import METHODS, load_method

    found = {name for name in METHODS if reach_of(load_method(name).Config()) is not None}
    assert "causal_sft" in found
    assert not found & {"sft", "kd", "dmd2", "cm"}
    assert CausalSFTMethod.needs_of(CausalSFTMethod.Config()) == {"chunks"}
