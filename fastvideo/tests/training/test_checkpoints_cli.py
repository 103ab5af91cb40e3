"""``fastvideo checkpoints`` on real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastvideo.cli import main
from fastvideo.cli.checkpoints import readable_age
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import run_schema
from fastvideo.files import readable_size
from fastvideo.training.resume import run_facts
from fastvideo.training.run import run


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[list[str]]]:
    """Exit code, and the cells of every row of the printed table."""
    capsys.readouterr()
    code = main(["checkpoints", *arguments])
    lines = capsys.readouterr().out.splitlines()
    return code, [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


def test_the_table_says_what_is_there_and_what_cannot_be_used(
    analytic_values: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = validate(run_schema("analytic", "dmd2"), analytic_values | {"checkpoint": {"every": 4, "keep": 3}}, "test")
    run(config)
    folder = Path(config.output) / "checkpoints"
    (folder / "step-8" / "manifest.json").unlink()
    code, rows = listed(capsys, config.output)
    assert code == 0
    assert [row[0] for row in rows] == ["12", "8", "4"]
    assert rows[0][1] == "yes"
    assert rows[0][3:6] == ["student, critic", "1 x cpu", run_facts(config).config_hash[:12]]
    assert rows[0][2].endswith("kB")
    assert rows[0][6].endswith(" s")
    assert rows[1][1] == "no: it has no manifest.json: its save was not finished"

    weights = folder / "step-4" / "process-0.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert listed(capsys, config.output)[1][2][1] == "yes"
    code, rows = listed(capsys, config.output, "--verify")
    assert code == 1
    assert rows[2][1] == "no: process-0.safetensors is damaged"


def test_a_folder_without_checkpoints_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(tmp_path)]) == 2
    assert "holds no checkpoints" in capsys.readouterr().err


def test_sizes_and_ages_are_readable() -> None:
    assert [readable_size(n) for n in (0, 999, 1500, 35_000_000)] == ["0 B", "999 B", "1.5 kB", "35 MB"]
    assert [readable_age(s) for s in (-5, 59, 61, 7200, 200_000)] == ["0 s", "59 s", "1 min", "2 h", "2 d"]
