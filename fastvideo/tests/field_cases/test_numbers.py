"""Numbers at the edge, in every argument of every verb and every field of every config: in their range or a message."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import random
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import annotated_types
import pytest
from pydantic.fields import FieldInfo

from fastvideo.cli import VERBS, main
from fastvideo.cli.arguments import check_ranges, parse, ranges_in
from fastvideo.distillation.config.base import Section
from fastvideo.distillation.config.overrides import kinds, section_in
from fastvideo.distillation.config.reading import config_of
from fastvideo.distillation.registry import ADAPTERS, METHODS, run_schema
from fastvideo.errors import UserError

WORDS = [
    *("-1", "0", "1", "2", "7", "-0", "+3", "1000", "65536", "1e3", "1_000", "0x10", "0o7", "1e-5", "-1e-5", "1e-320"),
    *("2147483648", "-2147483649", "9223372036854775807", "9223372036854775808", "18446744073709551616", "1e30"),
    *(
        "nan",
        "NaN",
        ".nan",
        "inf",
        "-inf",
        ".inf",
        "1e400",
        "-1e400",
        "0.0",
        "-0.0",
        "0.5",
        "1.0",
        "1.0000001",
        "0.9999",
    ),
    *("", " ", " 5", "5 ", "\u00b2", "\u0661\u0662", "five", "1,5", "1/2", "5%", "None", "true", "1" * 400, "9" * 5000),
    *("10000000000000000000000000000000", "-" * 3, "1e", "e1", ".", "0.1.2", "2026-02-30", "[1]", "{a: 1}", "!!int ''"),
]


def draw_word(draw: random.Random) -> str:
    """A word of the list, or another number of any size."""
    kind = draw.randrange(6)
    if kind == 0:
        return str(draw.randint(-(2**70), 2**70) >> draw.randrange(70))
    if kind == 1:
        return repr(draw.uniform(-2, 2) * 10.0 ** draw.randint(-40, 40))
    return draw.choice(WORDS)


def arguments_of(verb: str) -> type[Any]:
    """The dataclass of a verb's arguments."""
    module = import_module(VERBS[verb][0])
    found = [
        one for one in vars(module).values() if dataclasses.is_dataclass(one) and one.__module__ == module.__name__
    ]
    return next(one for one in found if one.__name__ == "Launch" or one.__name__.endswith("Arguments"))


def numbers_of(arguments: type[Any]) -> dict[str, Any]:
    """Types of the arguments that hold numbers."""
    hints = get_type_hints(arguments, include_extras=True)
    return {name: hint for name, hint in hints.items() if {int, float} & set(plain_kinds(hint))}


def plain_kinds(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    yield hint
    for inner in get_args(hint):
        yield from plain_kinds(inner)


ARGUMENTS = [(verb, name) for verb in VERBS for name in numbers_of(arguments_of(verb))]
NEEDED = {
    "average": ["run"],
    "generate": ["tiny", "--prompt", "x"],
    "preprocess": ["v", "--model", "tiny", "--out", "o"],
    "precompute-trajectories": ["--config", "c", "--out", "o"],
    "buckets": ["show", "d"],
    "evaluate": ["tiny"],
    "export": ["run", "--out", "o"],
    "live": ["tiny_stream"],
    "plan": ["--config", "c"],
    "schedule": ["show", "c"],
}


def test_every_argument_has_a_range() -> None:
    """But for times of a ladder, which the ladder checks."""
    without = {(v, n) for v, n in ARGUMENTS if not list(ranges_in(numbers_of(arguments_of(v))[n]))}
    assert without == {("generate", "ladder"), ("evaluate", "ladder")}
    assert len(ARGUMENTS) > 25


def try_argument(verb: str, name: str, word: str) -> None:
    """Parse a verb's arguments; numbers that get through are finite and in their range."""
    arguments = arguments_of(verb)
    message = ""
    try:
        parsed = parse(arguments, [*NEEDED[verb], f"--{name.replace('_', '-')}", word], verb)
    except UserError as error:
        message = str(error)
    except SystemExit as stop:
        message = f"--{name.replace('_', '-')} must be" if stop.code == 2 else "no message"
    if message:
        assert f"--{name.replace('_', '-')} must be" in message
        return
    value = vars(parsed)[name]
    for one in value if isinstance(value, tuple) else (value,):
        assert one is None or isinstance(one, Path | str) or math.isfinite(one)  # evaluate --prompts takes a file too


def fields_of(schema: type[Section], before: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Fields with numbers, by dotted key; of the roles those of the student."""
    for name, field in schema.model_fields.items():
        inner = section_in(field.annotation)
        role = "student." if get_origin(field.annotation) is dict else ""
        if inner is not None:
            yield from fields_of(inner, f"{before}{name}.{role}")
        elif {int, float} & set(kinds(field.annotation)):
            yield f"{before}{name}", field


PAIRS = [("wan", method) for method in METHODS] + [(family, "sft") for family in ADAPTERS]


@cache
def every_field() -> list[tuple[str, str, str]]:
    """Family, method and key; not made while tests are collected, which takes every schema some seconds."""
    return [(family, method, key) for family, method in PAIRS for key, _ in fields_of(run_schema(family, method))]


def limits(field: FieldInfo) -> list[Any]:
    """Bounds of a field, at any depth of its type."""

    def inside(hint: Any) -> Iterator[Any]:
        for one in getattr(hint, "__metadata__", ()):
            yield from one.metadata if isinstance(one, FieldInfo) else (one,)
        for inner in get_args(hint):
            yield from inside(inner)

    found = [*field.metadata, *inside(field.annotation)]
    bounds = annotated_types.Interval, annotated_types.Ge, annotated_types.Gt, annotated_types.Le, annotated_types.Lt
    return [one for one in found if isinstance(one, bounds)]


def test_every_field_has_a_range() -> None:
    without = {key for pair in PAIRS for key, field in fields_of(run_schema(*pair)) if not limits(field)}
    assert without == {"ladder.times", *(f"method.reach.{name}" for name in ("chunk", "window", "sink"))}


def config_values(family: str, method: str) -> dict[str, Any]:
    """The least that a config says; roles are checked later."""
    values = {"distill_model": family, "distill_method": method, "output": "o", "model": {}, "method": {}}
    values["roles"] = {"student": {"trainable": True, "lora": {"rank": 4}}}
    if family not in ("analytic", "wan"):  # which have a model of their own
        values["model"] = {"path": "tiny_cogvideox"}
    return values | ({"method": {"teacher_path": "tiny"}} if method == "kd" else {})


def try_field(family: str, method: str, key: str, words: list[str]) -> None:
    """Read a config; numbers that get through are finite."""
    message = ""
    try:
        config = config_of(config_values(family, method), "run.yaml", {key: words})
    except UserError as error:
        message = str(error)
    if message:
        assert key.rpartition(".")[2] in message or key.split(".")[0] in message
        return
    for value in leaves(config.model_dump(mode="json")):
        assert not isinstance(value, float) or math.isfinite(value)


def leaves(value: Any) -> Iterator[Any]:
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from leaves(inner)
    if not isinstance(value, dict | list | tuple):
        yield value


def try_numbers(count: int, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(count):
        word = draw_word(draw)
        with contextlib.redirect_stderr(io.StringIO()):
            if draw.random() < 0.3:
                verb, name = draw.choice(ARGUMENTS)
                print(f"fastvideo {verb} {name} {word!r}"[:300])
                try_argument(verb, name, word)
            else:
                place = draw.choice(every_field())
                words = [word, draw_word(draw)] if draw.random() < 0.2 else [word]
                print(f"{place} {words!r}"[:300])
                try_field(*place, words)


def test_numbers() -> None:
    try_numbers(200, 0)


@pytest.mark.nightly
def test_five_thousand_numbers() -> None:
    """Others every time; ``FUZZ_SEED`` repeats them."""
    seed = int(os.environ.get("FUZZ_SEED", random.randrange(10**6)))
    print(f"FUZZ_SEED={seed}")
    try_numbers(5000, seed)


def test_the_ladder_of_a_config() -> None:
    for key in ("ladder.count", "ladder.steps", "ladder.times"):
        for shift in ("1.0", "0", "-1", ".nan", ".inf", "1e308"):
            for word in WORDS[::3]:
                with contextlib.suppress(UserError):
                    words = {key: [word, "500"] if key != "ladder.count" else [word]}
                    config_of(config_values("wan", "sft"), "run.yaml", words | {"ladder.shift": [shift]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "tiny", "--prompt", "x", "--seed", "-1"], "--seed must be from 0 to 9223372036854775807, got -1"),
        (["generate", "tiny", "--prompt", "x", "--fps", "0"], "--fps must be from 1 to 1000, got 0"),
        (["evaluate", "tiny:\u00b2"], "is not a number of steps"),
        (["evaluate", "tiny:0"], "'tiny:0': the steps must be from 1 to 10000, got 0"),
        (["evaluate", "tiny", "--sweep-guidance", "1,nan"], "--sweep-guidance must be from 0 to 1000, got nan"),
        (["plan", "--config", "tiny_wan_dmd2", "--gpu-memory", "."], "--gpu-memory '.' is no size"),
        (["plan", "--config", "tiny_wan_dmd2", "--gpu-memory", "9" * 400], "is no size"),
        (["plan", "--config", "tiny_wan_dmd2", "--bandwidth", "0"], "--bandwidth must be above 0, up to 1e+18, got 0"),
        (["preprocess", ".", "--model", "tiny", "--out", "o", "--buckets", "\u00b2x1x1"], "is not HEIGHTxWIDTHxFRAMES"),
        (["distill", "--config", "tiny_wan_dmd2", "--seed", "-1"], "seed: Input should be greater than or equal to 0"),
        (["distill", "--config", "tiny_wan_dmd2", "--seed", str(2**64)], "seed: Input should be less than or equal to"),
        (
            ["distill", "--config", "tiny_wan_dmd2", "--method.betas", "0.9", "1"],
            "betas.1: Input should be less than 1",
        ),
    ],
)
def test_a_number_out_of_range_is_a_message(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--config", "tiny_wan_dmd2", "--output", "s3://b/run"], "output: s3://b/run is a URL"),
        (["preprocess", "--prompts", "p", "--model", "tiny", "--out", "s3://b/x"], "out: s3://b/x is a URL"),
        (["preprocess", "gs://b/videos", "--model", "tiny", "--out", "o"], "folder: gs://b/videos is a URL"),
        (["evaluate", "tiny", "--teacher", "tiny", "--out", "s3://b/x"], "out: s3://b/x is a URL"),
        (
            ["evaluate", "tiny", "--teacher", "tiny", "--prompts", "nope://b/p", "--out", "o"],
            "nope://: unknown protocol",
        ),
    ],
)
def test_a_url_in_place_of_a_path_is_a_message(
    arguments: list[str], message: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else a folder of the name ``s3:`` holds the result, on a machine that is given back."""
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_range_is_in_the_type() -> None:
    @dataclasses.dataclass
    class Some:
        good: Annotated[float | None, annotated_types.Interval(gt=0, lt=1)]

    for good in (None, 0.5):
        check_ranges(Some(good))
    for bad in (0.0, 1.0, math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match=r"--good must be above 0, below 1, got"):
            check_ranges(Some(bad))
