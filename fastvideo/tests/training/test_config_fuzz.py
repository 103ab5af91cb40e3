"""Configs that are changed at random: a config or a message, never a traceback, that names the file and the key."""

from __future__ import annotations

import copy
import datetime
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastvideo.distillation.config import reading
from fastvideo.distillation.config.reading import read_yaml
from fastvideo.errors import UserError
from fastvideo.training.distillation import parse

EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "distillation").glob("*.yaml"))
FILE = "mutated.yaml"
NESTED = {"x": {"y": {"z": [1, {"w": None}]}}}
ODD: list[Any] = [
    *(None, True, False, 0, -1, 10**30, 0.0, -1.5, float("nan"), float("inf"), "", "x", "1e-5", "tiny", "0"),
    *([], [1], [None], [[1.0]], {}, {"a": 1}, NESTED, {1: 2}, {None: 1}, datetime.date(2026, 1, 1), b"bytes"),
    *("x" * 5000, [0.5] * 500, "\u202e", "../..", {"steps": [1000, 1000]}, {"count": -3}, {"extra": "much"}),
]
"""What YAML can hold and a field does not expect."""


def places(values: dict[Any, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all keys of a nested mapping."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def inside(values: dict[Any, Any], path: tuple[Any, ...]) -> dict[Any, Any]:
    """The mapping that holds the last key of a path."""
    for key in path[:-1]:
        values = values[key]
    return values


def typo(key: Any, draw: random.Random) -> Any:
    """A key that is nearly right."""
    if not isinstance(key, str) or not key:
        return draw.choice(ODD[:12])
    at = draw.randrange(len(key))
    return draw.choice([key[:at] + key[at + 1 :], key[:at] + "_" + key[at:], key.upper(), key + "s", key[::-1]])


def mutate(values: dict[Any, Any], draw: random.Random) -> tuple[Any, ...]:
    """Change one place; the keys that a message may be about."""
    path = draw.choice(list(places(values)))
    holder, key = inside(values, path), path[-1]
    kind = draw.choice(["value", "value", "value", "type", "remove", "rename", "unknown", "nest", "lift", "swap"])
    if kind == "value":
        holder[key] = copy.deepcopy(draw.choice(ODD))
    elif kind == "type":
        holder[key] = draw.choice([str, lambda v: [v], lambda v: {"value": v}, repr])(holder[key])
    elif kind == "remove":
        del holder[key]
    elif kind == "rename":
        path += (typo(key, draw),)
        holder[path[-1]] = holder.pop(key)
    elif kind == "unknown":
        path += (draw.choice(["extra", "", "__class__", "model_config", 7, None, "a.b", "lr"]),)
        holder[path[-1]] = holder[key]
    elif kind == "nest":
        holder[key] = {key: holder[key]}
    elif kind == "lift":
        values[key] = holder[key]
    else:
        other = draw.choice(list(places(values)))
        holder[key] = copy.deepcopy(inside(values, other)[other[-1]])
    return path


def outcome(values: Any, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The message about a config; ``None`` if it is valid."""
    monkeypatch.setattr(reading, "read_yaml", lambda path: values)
    monkeypatch.setattr(reading, "find_config", Path)
    try:
        parse(["--config", FILE])
    except UserError as error:
        return str(error)
    return None


def fuzz(count: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """How many changed configs were refused, and what is wrong with the messages."""
    draw, refused, complaints = random.Random(seed), 0, []
    examples = [read_yaml(path) for path in EXAMPLES]
    for number in range(count):
        values = copy.deepcopy(draw.choice(examples))
        touched = [mutate(values, draw) for _ in range(draw.choice([1, 1, 1, 2, 4])) if list(places(values))]
        try:
            message = outcome(values, monkeypatch)
        except Exception as error:  # what the test is looking for
            complaints.append(f"{number} {touched}: {type(error).__name__}: {error}"[:500])
            continue
        if message is None:
            continue
        refused += 1
        named = {str(part) for path in touched for part in path}
        if FILE not in message or not any(name in message for name in named if name):
            complaints.append(f"{number} {touched}: {message}"[:500])
    return refused, complaints


def test_a_changed_config_is_a_config_or_a_message_that_names_file_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    refused, complaints = fuzz(300, 0, monkeypatch)
    assert complaints == []
    assert refused > 150


@pytest.mark.nightly
def test_a_thousand_changed_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others every day; ``FUZZ_SEED`` repeats those of one day."""
    seed = int(os.environ.get("FUZZ_SEED", datetime.date.today().toordinal()))
    print(f"FUZZ_SEED={seed}")
    refused, complaints = fuzz(1000, seed, monkeypatch)
    assert complaints == [], f"FUZZ_SEED={seed}"
    assert refused > 500
