"""Mistakes in the data are found before a model is loaded, and a run says what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastvideo.distillation.builder import build_adapter
from fastvideo.distillation.config.reading import config_of
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.errors import UserError
from fastvideo.tiny.captions import DIGITS, caption_of, outside_note, parse_caption
from fastvideo.training import run as run_module
from fastvideo.training.data import check_data, prompt_notes
from fastvideo.training.output import resume_command
from fastvideo.training.run import run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is loaded is a failure of the test."""
    monkeypatch.setattr(run_module, "build_on", lambda *_: pytest.fail("a network was loaded"))


def dataset(tmp_path: Path, rows: int) -> str:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"caption": ["a red three"] * rows}), tmp_path / "data" / "a.parquet")
    return str(tmp_path / "data")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "has no prompt; one per line"),
        (b"\xe9", "line 1: not UTF-8"),
        (
            b"a red three\n" * 3,
            r"3 samples are fewer than one batch of 4 on each of 1 process: set --data.batch-size to 3",
        ),
        (b"a red three\n", r"1 sample is fewer than one batch of 4 .*: set --data.batch-size to 1$"),
    ],
    ids=["missing", "empty", "no text", "three", "one"],
)
def test_a_prompts_file_is_checked_first(
    analytic_values: dict[str, Any], tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "own.txt").write_bytes(content)
    values = analytic_values | {"data": {"prompts": str(tmp_path / "own.txt"), "batch_size": 4}}
    with pytest.raises(UserError, match=message):
        run(config_of(values, "test"))
    assert not Path(values["output"]).exists()


@pytest.mark.usefixtures("no_model")
def test_a_dataset_is_counted_first(analytic_values: dict[str, Any], tmp_path: Path) -> None:
    missing = analytic_values | {"data": {"path": str(tmp_path / "nowhere"), "batch_size": 4}}
    with pytest.raises(UserError, match=r"data\.path: .*nowhere' does not exist"):
        run(config_of(missing, "test"))
    few = missing | {"data": {"path": dataset(tmp_path, 3), "batch_size": 4}}
    with pytest.raises(UserError, match=r"3 samples are fewer than one batch of 4 .* --data\.batch-size to 3 or less"):
        run(config_of(few, "test"))


def test_no_batch_size_is_advised_where_none_would_do(analytic_values: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(analytic_values | {"data": {"path": dataset(tmp_path, 3), "batch_size": 2}}, "test")
    adapter = build_adapter(config)
    check_data(config, adapter, Processes())
    with pytest.raises(UserError, match=r"one batch of 2 on each of 4 processes$"):
        check_data(config, adapter, Processes(world_size=4))


def test_prompts_outside_the_tiny_world_are_one_warning() -> None:
    inside = [caption_of(parse_caption(f"a red {digit} moving up")) for digit in DIGITS]
    assert outside_note(inside) is None
    note = outside_note([*inside, "a dog on the beach", "two cats"])
    assert note is not None
    assert note.startswith("warning: 2 of 12 prompts are outside the world of this tiny model ('a dog on the beach')")


def test_only_the_embedded_models_have_such_a_world(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a dog\n")
    roles = {name: {"trainable": name != "teacher"} for name in ("student", "teacher", "critic")}
    model = {"path": "tiny", "height": 32, "width": 32, "num_frames": 9}
    values = {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": "o",
        "model": model,
        "roles": roles,
        "method": {},
    }
    values["data"] = {"prompts": str(tmp_path / "p.txt")}
    assert len(prompt_notes(config_of(values, "test"), Processes())) == 1
    assert prompt_notes(config_of(values | {"model": model | {"path": "my/model"}}, "test"), Processes()) == []


def test_the_last_lines_are_commands(analytic_values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(analytic_values | {"output": analytic_values["output"] + " with a space"}, "test")
    run(config)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"next: fastvideo report '{config.output}'"
    assert resume_command(config) == f"fastvideo distill --config '{config.output}/config.yaml' --resume"
