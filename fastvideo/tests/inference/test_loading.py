"""What a model folder says about how it is sampled, and what is said when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.types import UserError
from fastvideo.inference.cli import GenerateArguments
from fastvideo.inference.generate import run_generate
from fastvideo.inference.loading import LoadedModel, load_model

LADDER = [1.0, 0.75, 0.5, 0.25]


def model(**recipe: Any) -> LoadedModel:
    adapter = AnalyticAdapter(AnalyticConfig())
    return LoadedModel("somewhere", adapter, adapter.load_network(), recipe)


def test_student_runs_its_ladder_without_guidance() -> None:
    spec = model(ladder=LADDER, sampler="renoise").sampler()
    assert spec.times == tuple(LADDER)
    assert (spec.kind, spec.guidance, spec.network_calls) == ("renoise", 1.0, 4)


def test_student_in_one_step_runs_the_first_rung() -> None:
    assert model(ladder=LADDER).sampler(steps=1).times == (1.0,)


@pytest.mark.parametrize("steps", [2, 3, 5, 50])
def test_steps_that_are_not_in_the_ladder_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match=rf"--steps 4 or --steps 1, not {steps}"):
        model(ladder=LADDER).sampler(steps=steps)


def test_teacher_defaults() -> None:
    spec = model().sampler()
    assert (spec.kind, len(spec.times), spec.guidance, spec.network_calls) == ("euler", 50, 5.0, 100)


def test_teacher_with_its_own_guidance() -> None:
    assert model(sampler="euler", guidance=1.5).sampler().guidance == 1.5
    assert model(sampler="euler", guidance=1.5).sampler(guidance=3.0).guidance == 3.0


@pytest.mark.parametrize("recipe", [{}, {"ladder": LADDER}])
def test_zero_steps_are_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="at least 1"):
        model(**recipe).sampler(steps=0)


def test_missing_folder() -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_model("./nowhere")


def test_folder_that_is_not_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json"):
        load_model(str(tmp_path))


def test_pipeline_of_an_unknown_family(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="StableDiffusionPipeline"):
        load_model(str(tmp_path))


def test_damaged_recipe(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    (tmp_path / "recipe.json").write_text('{"ladder": [1.0,')
    with pytest.raises(UserError, match=r"recipe\.json is not valid JSON"):
        load_model(str(tmp_path))


def test_wrong_option_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(UserError, match=r"(?s)of the model in .*height"):
        load_model(str(tmp_path), {"height": 31})


def test_file_name_is_checked_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=r"seven\.avi"):
        run_generate(GenerateArguments("./nowhere", "a seven", output=Path("seven.avi")))
