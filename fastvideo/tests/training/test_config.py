"""Configs: strict, helpful, and the same after a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastvideo.distillation.config.reading import read_yaml, validate
from fastvideo.distillation.config.schema import LadderConfig
from fastvideo.distillation.registry import run_schema
from fastvideo.errors import UserError
from fastvideo.training.distillation import parse


def parsed(values: dict[str, Any]) -> Any:
    return validate(run_schema(values["distill_model"], values["distill_method"]), values, "run.yaml")


def write(path: Any, values: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize(
    ("section", "wrong", "right"),
    [
        ("method", "teacher_guidence", "teacher_guidance"),
        ("trainer", "max_step", "max_steps"),
        ("model", "mean", "means"),
        (None, "ladders", "ladder"),
    ],
)
def test_unknown_key_names_file_path_and_nearest(analytic_values: dict, section: str, wrong: str, right: str) -> None:
    target = analytic_values[section] if section else analytic_values
    target[wrong] = 1
    path = f"{section}.{wrong}" if section else wrong
    with pytest.raises(UserError, match=rf"run.yaml:\n  {path}: unknown key; did you mean '{right}'"):
        parsed(analytic_values)


def test_unknown_key_inside_a_role_is_named(analytic_values: dict) -> None:
    analytic_values["roles"]["student"]["trainabel"] = True
    with pytest.raises(UserError, match=r"roles\.student\.trainabel: unknown key; did you mean 'trainable'"):
        parsed(analytic_values)


def test_all_problems_are_reported_at_once(analytic_values: dict) -> None:
    analytic_values["trainer"] = {"max_steps": 0, "log_evry": 1}
    analytic_values["method"]["generator_update_interval"] = -1
    with pytest.raises(UserError) as caught:
        parsed(analytic_values)
    for part in ("trainer.max_steps", "trainer.log_evry", "method.generator_update_interval"):
        assert part in str(caught.value)


def test_zero_stays_zero(analytic_values: dict) -> None:
    analytic_values["method"] |= {"teacher_guidance": 0.0, "weight_decay": 0}
    config = parsed(analytic_values)
    assert config.method.teacher_guidance == 0.0
    assert config.method.weight_decay == 0.0


def test_round_trip_through_yaml_is_identity(analytic_values: dict) -> None:
    config = parsed(analytic_values)
    again = parsed(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again == config


def test_published_guidance_is_converted_once(analytic_values: dict) -> None:
    analytic_values["method"]["teacher_guidance"] = {"extra": 3.5}
    config = parsed(analytic_values)
    assert config.method.teacher_guidance == 4.5
    assert parsed(config.model_dump(mode="json")).method.teacher_guidance == 4.5


def test_ladder_forms() -> None:
    warped = LadderConfig.model_validate({"steps": [1000, 750, 500, 250], "shift": 5.0})
    assert warped.times == pytest.approx((1, 0.9375, 0.8333, 0.625), abs=1e-4)
    assert LadderConfig.model_validate({"count": 4}).times == (1.0, 0.75, 0.5, 0.25)
    again = LadderConfig.model_validate(warped.model_dump())
    assert again == warped  # a saved ladder is real times: it is never warped twice


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        ({"times": [0.5, 0.75]}, "rises"),
        ({"times": [1.0, 0.5, 0.5]}, "repeats"),
        ({"times": [1000, 500]}, "above 1"),
        ({"times": []}, "at least one"),
        ({"steps": [1000], "times": [1.0]}, "steps"),
        ({"count": 4, "warp": True}, "count"),
        ({"count": 0}, r"run\.yaml:\n  ladder: ladder: at least one"),
        ({"count": 10**30}, r"run\.yaml:\n  ladder: count 1000000000000000000000000000000 is more than 10000 steps"),
        ({"steps": 1000}, "not iterable"),
        ({"steps": [250, 750]}, r"run\.yaml:\n  ladder: .*rises"),
    ],
)
def test_bad_ladder_is_refused_with_the_reason(analytic_values: dict, ladder: dict, message: str) -> None:
    analytic_values["ladder"] = ladder
    with pytest.raises(UserError, match=message):
        parsed(analytic_values)


@pytest.mark.parametrize("guidance", [{"extra": None}, {"extra": 1, "standard": 2}, {"cfg": 3}, "much"])
def test_bad_guidance_is_refused_by_key(analytic_values: dict, guidance: object) -> None:
    analytic_values["method"]["teacher_guidance"] = guidance
    with pytest.raises(UserError, match=r"method\.teacher_guidance"):
        parsed(analytic_values)


def test_a_falling_range_is_refused(analytic_values: dict) -> None:
    analytic_values["method"]["score_time_range"] = [0.98, 0.02]
    with pytest.raises(UserError, match=r"method\.score_time_range: a range must not fall"):
        parsed(analytic_values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "method:\n  a: 1\nseed: 2\nmethod:\n  b: 2\n",
            "method is there twice, in line 1 and in line 4; only the last",
        ),
        ("roles:\n  student: {lora: {rank: 8, rank: 16}}\n", r"roles\.student\.lora\.rank is there twice, in line 2"),
        ("stages:\n- {a: 1}\n- a: 1\n  'a': 2\n", r"stages\.1\.a is there twice, in line 3 and in line 4"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "a.yaml")


def test_keys_of_anchors_may_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: 1}\nb: &b {x: 2}\nc:\n  <<: [*a, *b]\n  y: 3\nd: *a\n")
    assert read_yaml(tmp_path / "a.yaml")["c"] == {"x": 1, "y": 3}
    (tmp_path / "a.yaml").write_text("a: &a [1, *a]\n")
    assert list(read_yaml(tmp_path / "a.yaml")) == ["a"]


def test_missing_and_malformed_files(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_yaml(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="found list"):
        read_yaml(tmp_path / "list.yaml")


def test_flags_override_the_file(analytic_values: dict, tmp_path: Any) -> None:
    path = write(tmp_path / "run.yaml", analytic_values)
    _, config = parse(["--config", path, "--method.student-learning-rate", "2e-5", "--trainer.max-steps", "7"])
    assert config.method.student_learning_rate == 2e-5
    assert config.trainer.max_steps == 7
    assert config.method.critic_learning_rate == 0.01


def test_names_on_the_command_line_win(analytic_values: dict, tmp_path: Any) -> None:
    del analytic_values["distill_model"]
    path = write(tmp_path / "run.yaml", analytic_values)
    with pytest.raises(UserError, match="distill_model is missing"):
        parse(["--config", path])
    _, config = parse(["--config", path, "--distill-model", "analytic", "--distill-method", "dmd2"])
    assert config.distill_model == "analytic"


@pytest.mark.parametrize(("key", "value", "near"), [("distill_model", "wam", "wan"), ("distill_method", "dmd", "dmd2")])
def test_unknown_names_list_what_there_is(
    analytic_values: dict, tmp_path: Any, key: str, value: str, near: str
) -> None:
    path = write(tmp_path / "run.yaml", analytic_values | {key: value})
    with pytest.raises(UserError, match=f"unknown .* '{value}': one of .*did you mean '{near}'"):
        parse(["--config", path])
