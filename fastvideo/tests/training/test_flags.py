"""Flags are the keys of the config file: the same names, the same values, the same messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastvideo.distillation.config.overrides import read_flags
from fastvideo.distillation.config.reading import read_config
from fastvideo.errors import UserError
from fastvideo.training.distillation import parse


def written(values: dict[str, Any], tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("flag", "right"),
    [
        ("--method.student-lr", "--method.student-learning-rate"),
        ("--method.teacher-guidence", "--method.teacher-guidance"),
        ("--student-learning-rate", "--method.student-learning-rate"),
        ("--trainer.max-step", "--trainer.max-steps"),
        ("--ladder.step", "--ladder.steps"),
        ("--roles.student.pth", "--roles.student.path"),
        ("--roles.student.lora.rnk", "--roles.student.lora.rank"),
        ("--resum", "--resume"),
    ],
)
def test_a_wrong_flag_names_the_nearest(analytic_values: dict, tmp_path: Path, flag: str, right: str) -> None:
    """Nothing else is in the message: no list of what there is."""
    with pytest.raises(UserError) as caught:
        parse(["--config", written(analytic_values, tmp_path), flag, "1"])
    assert str(caught.value) == f"{flag}: unknown flag; did you mean {right!r}?"


def test_a_flag_far_from_all_points_to_the_list(analytic_values: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--zzz: unknown flag; `fastvideo distill --config FILE --help` lists all"):
        parse(["--config", written(analytic_values, tmp_path), "--zzz", "1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.max-steps", "many"], r"run\.yaml:\n  trainer\.max_steps: .*\(got 'many'\)"),
        (["--trainer.max-steps"], "--trainer.max-steps: a value is expected"),
        (["--ladder.times", "0.5", "0.75"], r"ladder\.times: .*rises"),
        (["stray"], "'stray': a flag such as"),
        (["--trainer", "1"], "--trainer: unknown flag"),
        (["--roles.judge.path", "x"], "the config has no role 'judge'; it has"),
    ],
)
def test_wrong_words_are_one_message(analytic_values: dict, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(["--config", written(analytic_values, tmp_path), *words])


@pytest.mark.parametrize("ladder", [{"steps": [1000, 750], "shift": 5.0}, {"times": [1.0, 0.5]}, {"count": 3}])
@pytest.mark.parametrize(
    ("words", "section"),
    [
        (["--ladder.steps", "900", "300"], {"steps": [900, 300]}),
        (["--ladder.count", "4", "--ladder.shift", "3"], {"count": 4, "shift": 3}),
        (["--ladder.steps", "900", "300", "--ladder.warp", "false", "--ladder.shift=2"],
         {"steps": [900, 300], "warp": False, "shift": 2}),
        (["--ladder.times", "1.0", "0.25"], {"times": [1.0, 0.25]}),
    ],
)  # fmt: skip
def test_a_ladder_flag_is_the_yaml_key(
    analytic_values: dict, tmp_path: Path, ladder: dict, words: list[str], section: dict
) -> None:
    """It replaces another spelling in the file; the file's shift stays with steps and with a count."""
    file = written(analytic_values | {"ladder": ladder}, tmp_path)
    _, config = parse(["--config", file, *words])
    kept = {"shift": ladder["shift"]} if "shift" in ladder and "times" not in section else {}
    (tmp_path / "same").mkdir()
    same = read_config(written(analytic_values | {"ladder": kept | section}, tmp_path / "same"))
    assert config == same


def test_switches_lists_and_nothing(analytic_values: dict, tmp_path: Path) -> None:
    file = written(analytic_values, tmp_path)
    words = ["--data.buckets", "--health.no-enabled", "--tracking.backends", "--parallel.replicate", "None"]
    _, config = parse(["--config", file, *words, "--ema.roles", "student", "critic", "--tracking.name", "7"])
    assert (config.data.buckets, config.health.enabled) == (True, False)
    assert (config.tracking.backends, config.parallel.replicate) == ((), None)
    assert (config.ema.roles, config.tracking.name) == (("student", "critic"), "7")


def test_flags_are_read_once_for_all_verbs() -> None:
    found = read_flags(["--a.b-c", "1", "-2", "--d=x=y", "--e", "--init-student-from", "p"])
    assert found == {"a.b_c": ["1", "-2"], "d": ["x=y"], "e": [], "roles.student.init_from": ["p"]}


def test_help_lists_fields_without_subcommands(
    analytic_values: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--config", written(analytic_values, tmp_path), "--help"])
    text = capsys.readouterr().out
    assert not stop.value.code
    assert "--method.student-learning-rate" in text
    assert "lora:none" not in text
