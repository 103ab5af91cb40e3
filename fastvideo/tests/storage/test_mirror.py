"""The mirror of a run's checkpoints: what is in it, what a run resumes from, and a server that dies meanwhile."""

from __future__ import annotations

import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from fastvideo import storage
from fastvideo.distillation.config.checkpoints import CheckpointConfig
from fastvideo.distillation.engine.checkpoint.manifest import MANIFEST, Manifest, complete_checkpoints
from fastvideo.distillation.engine.checkpoint.restore import newest
from fastvideo.distillation.engine.optional import mirror as mirror_module
from fastvideo.distillation.engine.optional.mirror import Mirror, checkpoints_at, complete, fetch_newest, listed
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.errors import RunError, UserError
from fastvideo.files import write_file
from fastvideo.storage import Remote
from fastvideo.tests.launch import in_world
from fastvideo.tests.storage.server import Proxy
from fastvideo.tests.training.conftest import analytic_values  # noqa: F401
from fastvideo.tests.training.test_run import config_of, result
from fastvideo.training.run import run


@pytest.fixture
def values(analytic_values: dict[str, Any], bucket: str) -> dict[str, Any]:  # noqa: F811
    """A run with a checkpoint after every second step, and its mirror."""
    return analytic_values | {"checkpoint": {"every": 2, "mirror": f"{bucket}/run"}}


def steps_at(values: dict[str, Any]) -> list[int]:
    return complete(listed(checkpoints_at(values["checkpoint"]["mirror"])))


def checkpoints(values: dict[str, Any]) -> Path:
    return Path(values["output"]) / "checkpoints"


def resumed_elsewhere(values: dict[str, Any], tmp_path: Path, **options: Any) -> dict[str, Any]:
    """Go on to step 12 in another folder, as on a new machine."""
    there = values | {"output": str(tmp_path / "elsewhere"), "trainer": values["trainer"] | {"max_steps": 12}}
    run(config_of(there), **(options or {"resume": True}))
    return there


def test_a_run_goes_on_bit_exactly_from_its_mirror_alone(values: dict, tmp_path: Path) -> None:
    whole = values | {"output": str(tmp_path / "whole"), "checkpoint": {"every": 2}}
    run(config_of(whole))
    run(config_of(values | {"trainer": values["trainer"] | {"max_steps": 6}}))
    assert steps_at(values) == [4, 6]
    assert json.loads((Path(values["output"]) / "performance.jsonl").read_text().splitlines()[-1]).keys() >= {
        "mirror/checkpoints_behind"
    }
    shutil.rmtree(values["output"])
    there = resumed_elsewhere(values, tmp_path)
    first, second = result(whole), result(there)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert steps_at(values) == [10, 12]


def test_a_checkpoint_is_taken_by_its_url(values: dict, tmp_path: Path) -> None:
    run(config_of(values | {"trainer": values["trainer"] | {"max_steps": 6}}))
    url = values["checkpoint"]["mirror"]
    apart = values | {"checkpoint": {"every": 2}}
    resumed_elsewhere(apart, tmp_path, resume_from=Remote(f"{url}/checkpoints/step-4"))
    shutil.rmtree(tmp_path / "elsewhere")
    resumed_elsewhere(apart, tmp_path, resume_from=Remote(url))
    assert steps_at(values) == [4, 6]


def test_the_newest_of_both_places_counts_and_damage_is_passed_over(values: dict, tmp_path: Path, capsys) -> None:
    run(config_of(values | {"trainer": values["trainer"] | {"max_steps": 6}}))
    system, root = fsspec.filesystem("s3"), f"{values['checkpoint']['mirror']}/checkpoints"
    system.pipe_file(f"{root}/step-6/shared.json", b"{}")
    shutil.rmtree(checkpoints(values) / "step-6")
    shutil.rmtree(Path(values["output"]) / "student")
    run(config_of(values), resume=True)
    said = capsys.readouterr().err
    assert "step-6: shared.json has 2 bytes instead of" in said
    assert "resumed at step 4" in said
    shutil.rmtree(checkpoints(values) / "step-12")
    run(config_of(values), resume=True)
    assert "resumed at step 12" in capsys.readouterr().err


def test_later_checkpoints_of_a_mirror_are_set_aside(values: dict, capsys) -> None:
    run(config_of(values | {"trainer": values["trainer"] | {"max_steps": 6}}))
    run(
        config_of(values | {"trainer": values["trainer"] | {"max_steps": 5}}),
        resume_from=checkpoints(values) / "step-4",
    )
    names = checkpoints_at(values["checkpoint"]["mirror"]).found()
    assert steps_at(values) == [4, 5]
    assert f"abandoned-step-6/{MANIFEST}" in names


def test_a_mirror_with_half_a_checkpoint_alone_lets_the_run_start_anew(values: dict, capsys) -> None:
    fsspec.filesystem("s3").pipe_file(f"{values['checkpoint']['mirror']}/checkpoints/step-2/shared.json", b"{}")
    run(config_of(values), resume=True)
    assert "no complete checkpoint: starting at step 0" in capsys.readouterr().err
    assert steps_at(values) == [10, 12]


def test_a_mirror_that_cannot_be_used_is_refused_before_the_run_begins(values: dict, bucket: str) -> None:
    run(config_of(values | {"trainer": values["trainer"] | {"max_steps": 2}}))
    for url, message in (
        (values["checkpoint"]["mirror"], "holds checkpoints of another run"),
        ("s3://no-such-bucket/run", "bucket does not exist"),
        ("folder/run", "is no URL"),
    ):
        with pytest.raises(UserError, match=message):
            run(config_of(values | {"output": f"{values['output']}-2", "checkpoint": {"every": 2, "mirror": url}}))
    assert not Path(f"{values['output']}-2").exists()


def test_a_dead_server_stops_no_run_and_delays_its_end_only_for_so_long(
    values: dict, server: Proxy, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(mirror_module, "PAUSES", (0.1, 0.1))
    ready = mirror_module.set_aside
    monkeypatch.setattr("fastvideo.distillation.engine.session.set_aside", lambda *a: [ready(*a), server.cut()][0])
    run(config_of(values | {"checkpoint": values["checkpoint"] | {"mirror_wait": 2}}))
    said = capsys.readouterr().err
    assert "cannot be reached" in said
    assert "2 checkpoints not there" in said
    server.mend()
    assert steps_at(values) == []


def test_the_start_of_a_resumed_run_needs_its_mirror(values: dict, server: Proxy, monkeypatch) -> None:
    run(config_of(values | {"trainer": values["trainer"] | {"max_steps": 2}}))
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    server.cut()
    with pytest.raises(RunError, match="cannot be reached"):
        run(config_of(values), resume=True)


def test_killed_at_any_byte_of_an_upload_the_mirror_is_complete_or_absent(
    values: dict, bucket: str, server: Proxy, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(mirror_module, "PAUSES", (0.05, 0.2))
    run(config_of(values | {"checkpoint": {"every": 2}, "trainer": values["trainer"] | {"max_steps": 4}}))
    size = sum(file.stat().st_size for file in (checkpoints(values) / "step-4").iterdir())
    for round_ in range(4):
        root = checkpoints_at(f"{bucket}/killed-{round_}")
        server.uploaded, server.upload_limit = 0, 2000 + round_ * 2 * size // 4
        mirror = Mirror(root, checkpoints(values), CheckpointConfig(keep=2), lambda line: None)
        assert server.dead.wait(30), "the server was not killed"
        time.sleep(0.1)
        server.mend()
        for step in complete(listed(root)):
            assert fetch_newest(root, tmp_path / f"copy-{round_}", step - 1)[0] is not None
        mirror.close(30)
        assert complete(listed(root)) == [2, 4]
        shutil.rmtree(tmp_path / f"copy-{round_}", ignore_errors=True)
        assert fetch_newest(root, tmp_path / f"copy-{round_}", -1) == (4, [])
    assert len(complete_checkpoints(checkpoints(values))) == 2


def checkpoint_at(folder: Path, step: int) -> Path:
    """A complete checkpoint with one file."""
    target = folder / f"step-{step}"
    target.mkdir(parents=True)
    record = write_file(target / "process-1.json", [f"{step}".encode()])
    Manifest(step, (), 2, 1, "cpu", "", {}, 0, {"process-1.json": record}).write(target)
    return target


def newest_of(rank: int, size: int, folder: Path, mirror: str) -> tuple[str, list[str]]:
    """What one of several processes resumes from, or its error, and what it says."""
    processes, said = Processes(rank, size, torch.device("cpu")), list[str]()
    try:
        return str(newest(folder, processes, said.append, mirror)), said
    except UserError as error:
        return str(error), said


def test_all_processes_take_the_newest_of_folder_and_mirror_or_one_error(tmp_path: Path) -> None:
    """Damaged in the mirror, intact in the mirror, intact here, damaged here; and a mirror that is no URL."""
    here, there = tmp_path / "run" / "checkpoints", tmp_path / "mirror" / "checkpoints"
    for folder, step in ((there, 8), (there, 6), (here, 4), (here, 5)):
        checkpoint_at(folder, step)
    for damaged in (there / "step-8", here / "step-5"):
        (damaged / "process-1.json").write_bytes(b"9")
    call = partial(newest_of, folder=here, mirror=f"file://{tmp_path}/mirror")
    first, second = in_world(2, call, tmp_path / "world")
    assert first == second
    assert first[0] == str(here / "step-6")
    assert [line.rpartition(": ")[0].rpartition("/")[2] for line in first[1]] == ["step-5", "step-8"]
    found = in_world(2, partial(newest_of, folder=here, mirror="bucket/run"), tmp_path / "world2")
    message = "checkpoint.mirror: 'bucket/run' is no URL; one such as s3://bucket/run is expected"
    assert [text for text, _ in found] == [message, message]
