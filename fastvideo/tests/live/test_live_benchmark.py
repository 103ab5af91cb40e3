"""``benchmarks/live.py``: what it counts, and a run of it on the tiny network."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastvideo.tiny.paths import PIPELINE_FOLDER

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "live.py"


def load() -> ModuleType:
    """``benchmarks/live.py``, which is not in the package."""
    spec = importlib.util.spec_from_file_location("live_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["live_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


benchmark = load()


def test_late_chunks() -> None:
    """At 4 frames per second a chunk of 4 lasts a second."""
    assert benchmark.late_share([(0.0, 4), (0.9, 4), (1.9, 4), (2.9, 4)], 4.0) == 0.0
    assert benchmark.late_share([(0.0, 4), (1.1, 4), (2.0, 4), (3.2, 4)], 4.0) == 0.5


@pytest.mark.slow
def test_a_new_prompt_waits_for_two_chunks_at_most(tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(PIPELINE_FOLDER, student)
    recipe = json.loads((student / "recipe.json").read_text())
    recipe["model"] |= {"path": "tiny", "num_frames": 33}
    streaming = {"chunk": 1, "window": 8, "sink": 1, "positions": "window", "context_time": 0.0}
    recipe |= {"ladder": [1.0, 0.75, 0.5, 0.25], "sampler": "renoise", "guidance": 1.0, "streaming": streaming}
    (student / "recipe.json").write_text(json.dumps(recipe))
    found = benchmark.measure(str(student), seconds=8.0, fps=12.0, every=1.5)
    assert found["prompts"] >= 2
    assert 0 < found["wait_chunks"]["max"] <= 2.01
    assert 0 < found["fps"] < 13
    assert found["past_bytes"] > 0
