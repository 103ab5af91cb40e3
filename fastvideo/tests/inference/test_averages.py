"""``fastvideo average``: students out of snapshots, which load like any other, and refusals in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastvideo.cli import main
from fastvideo.distillation.config.reading import config_of
from fastvideo.distillation.engine.optional.profiles import Profile
from fastvideo.distillation.engine.optional.snapshots import averaged, snapshots_in
from fastvideo.evaluation import averages as evaluation
from fastvideo.evaluation.judge import Judge
from fastvideo.inference.loading import LoadedModel, load_model
from fastvideo.tests.distillation.tiny import experts_folder, wan_config, wan_folder
from fastvideo.training.run import run

FILE = Path("transformer") / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def finished(distilled: Path, tmp_path: Path) -> Path:
    """A run that may be written to."""
    folder = tmp_path / "finished"
    shutil.copytree(distilled, folder)
    return folder


def refused(capsys: Any, *words: object) -> str:
    """The message of a call that fails."""
    assert main(["average", *map(str, words)]) == 2
    return str(capsys.readouterr().err)


def test_an_average_is_written_beside_the_result_and_is_one_to_the_bit(finished: Path, capsys: Any) -> None:
    assert main(["average", str(finished), "--std", "0.05", "0.06"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{finished}/averaged-0.05: the average of std 0.05 at update 2, error 0.0%"
    weights = load_file(finished / "averaged-0.05" / FILE)
    stored = load_file(snapshots_in(finished / "snapshots")[Profile(2, 0.05)])
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)
    between = averaged(finished / "snapshots", Profile(2, 0.06))[0]
    loaded = load_model(str(finished / "averaged-0.06"))
    assert all(torch.equal(between[name], value) for name, value in loaded.network.state_dict().items())
    own, recipe = (json.loads((finished / name / "recipe.json").read_text()) for name in ("student", "averaged-0.06"))
    facts = recipe.pop("post_hoc")
    assert (facts["std"], facts["update"]) == (0.06, 2)
    assert recipe == own
    assert loaded.sampler().times == load_model(str(finished / "student")).sampler().times
    assert main(["export", str(finished / "averaged-0.06"), "--out", str(finished.parent / "export")]) == 0


def test_an_earlier_update_and_a_folder_of_ones_own(finished: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "first"
    assert main(["average", str(finished), "--std", "0.1", "--update", "1", "--out", str(out)]) == 0
    first = load_file(snapshots_in(finished / "snapshots")[Profile(1, 0.1)])
    assert all(torch.equal(first[name], value) for name, value in load_file(out / FILE).items())
    assert json.loads((out / "recipe.json").read_text())["steps"] == 1
    assert "is in use" in refused(capsys, finished, "--std", "0.05", "--out", out)
    assert main(["average", str(finished), "--std", "0.05", "--out", str(out), "--overwrite"]) == 0
    assert "is no earlier average; delete it yourself" in refused(
        capsys, finished, "--std", "0.05", "--out", finished / "student", "--overwrite"
    )


def test_mistakes_are_one_sentence_and_write_nothing(finished: Path, tmp_path: Path, capsys: Any) -> None:
    assert "give --std with one or more widths" in refused(capsys, finished)
    assert "is no run's folder" in refused(capsys, tmp_path, "--std", "0.1")
    assert "for an update with a snapshot: 1, 2" in refused(capsys, finished, "--std", "0.1", "--update", "3")
    assert "--std must be from 0.01 to 0.28, got 0.3" in refused(capsys, finished, "--std", "0.3")
    assert "one --std, or leave --out out" in refused(capsys, finished, "--std", "0.1", "0.2", "--out", tmp_path / "x")
    message = refused(capsys, finished, "--std", "0.05", "0.01")
    assert "--std 0.01" in message
    assert "20% is the most" in message
    assert "only the tiny world judges on its own" in refused(capsys, finished, "--choose")
    assert not list(finished.glob("averaged*"))
    shutil.rmtree(finished / "snapshots")
    assert "holds no snapshots; a run keeps them with `ema: {post_hoc: {}}`" in refused(
        capsys, finished, "--std", "0.1"
    )


@pytest.mark.parametrize("words", [("--steps", "1"), ("--prompts", "512"), ("--seed", "0"), ("--batch-size", "4")])
def test_what_measures_nothing_is_refused_without_choose(words: tuple[str, str], finished: Path, capsys: Any) -> None:
    """The defaults too: given, they are meant."""
    message = refused(capsys, finished, "--std", "0.1", *words)
    assert f"{words[0]} is for --choose" in message
    assert "leave it out, or add --choose" in message
    assert not list(finished.glob("averaged*"))


def test_steps_off_the_ladder_are_refused_before_anything_is_measured(
    finished: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that says it is of the tiny world; its ladder has four steps."""
    recipe = json.loads((finished / "student" / "recipe.json").read_text())
    recipe["model"]["path"] = "tiny"
    (finished / "student" / "recipe.json").write_text(json.dumps(recipe))
    measured: list[Any] = []
    monkeypatch.setattr(evaluation, "_measured", lambda *given: measured.append(given))
    assert "--steps 3: this student is measured at 4 or 1" in refused(capsys, finished, "--choose", "--steps", "3")
    assert measured == []


def test_a_family_without_a_pipeline_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.yaml").write_text("distill_model: analytic\n")
    assert "'analytic', which has no pipeline" in refused(capsys, tmp_path, "--std", "0.1")


def values_of(root: Path, **others: Any) -> dict[str, Any]:
    """A run of two updates over adapters, with snapshots."""
    (root / "prompts.txt").write_text("a green seven\nred three\n" * 2)
    adapter = {"trainable": True, "lora": {"rank": 2, "alpha": 4}}
    return {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(root / "run"),
        "device": "cpu",
        "model": wan_config(wan_folder(root)).model_dump(),
        "roles": {"student": adapter, "teacher": {"trainable": False}, "critic": adapter},
        "ladder": {"times": [1.0, 0.5]},
        "method": {"student_learning_rate": 0.01, "generator_update_interval": 1},
        "data": {"prompts": str(root / "prompts.txt"), "batch_size": 2},
        "trainer": {"max_steps": 2},
        "ema": {"enabled": False, "post_hoc": {"every": 1, "precision": "float32"}},
    } | others


def test_the_average_of_an_adapter_is_merged_and_stands_beside(tmp_path: Path) -> None:
    """``alpha / rank`` is 2; without ``ema.enabled`` the run's own result is the live one."""
    folder = run(config_of(values_of(tmp_path), "test")).parent
    assert main(["average", str(folder), "--std", "0.1"]) == 0
    state = load_file(snapshots_in(folder / "snapshots")[Profile(2, 0.1)])
    assert all(".lora_A." in name or ".lora_B." in name for name in state)
    base, merged = load_file(wan_folder(tmp_path) / FILE), load_file(folder / "averaged-0.1" / FILE)
    changed = 0
    for name, weight in base.items():
        layer = name.removesuffix(".weight")
        delta = torch.zeros(())
        if f"{layer}.lora_A.weight" in state:
            delta = 2 * state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
            changed += bool((delta != 0).any())
        torch.testing.assert_close(merged[name], weight + delta, rtol=1e-6, atol=1e-7)
    assert changed
    beside = load_file(folder / "averaged-0.1" / "pytorch_lora_weights.safetensors")
    assert beside.keys() == load_file(folder / "student" / "pytorch_lora_weights.safetensors").keys()
    for name in (name for name in beside if name.endswith(".lora_B.weight")):  # stock pipelines scale by 1
        change = beside[name] @ beside[name.replace(".lora_B.", ".lora_A.")]
        layer = f"{name.removeprefix('transformer.').removesuffix('.lora_B.weight')}.weight"
        torch.testing.assert_close(merged[layer], base[layer] + change, rtol=1e-6, atol=1e-7)
    assert yaml.safe_load((folder / "config.yaml").read_text())["ema"]["post_hoc"]["stds"] == [0.05, 0.1]


@pytest.mark.slow
def test_the_best_of_several_is_chosen_on_training_prompts(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = values_of(tmp_path, model={"path": "tiny"}, data={"path": "tiny", "size": 8, "batch_size": 2})
    folder = run(config_of(values, "test")).parent
    splits, rows, measured = set[str](), list[evaluation.Measured](), evaluation._measured

    def watched(model: LoadedModel, judge: Judge, *others: Any) -> evaluation.Measured:
        splits.add(judge.world.split)
        rows.append(measured(model, judge, *others))
        return rows[-1]

    monkeypatch.setattr(evaluation, "_measured", watched)
    assert main(["average", str(folder), "--choose", "--std", "0.05", "0.1", "--prompts", "6", "--steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert "6 training prompts" in shown
    assert all(word in shown for word in ("own (live)", "0.05", "0.1", "Frechet, 2", "digit, 1", "fastvideo evaluate"))
    recipe = json.loads((folder / "averaged" / "recipe.json").read_text())
    own, *averages = sorted(rows, key=lambda row: row.std is not None)
    best = min(averages, key=lambda row: row.frechet[1].value)
    assert splits == {"train"}
    assert [row.std for row in rows] == [None, 0.05, 0.1]
    assert len({row.frechet[1].value for row in averages}) == 2
    assert recipe["post_hoc"]["std"] == best.std
    assert ("is as good" in shown) == (own.frechet[1].value <= best.frechet[1].value)
    assert "measured at 2 or 1" in refused(
        capsys, folder, "--choose", "--std", "0.1", "--prompts", "6", "--steps", "3", "--overwrite"
    )


@pytest.mark.parametrize(
    "kind", ["stream", *(pytest.param(k, marks=pytest.mark.slow) for k in ("experts", "flow map"))]
)
def test_students_of_every_kind_are_averaged(kind: str, tmp_path: Path) -> None:
    """Two experts in one network, a student that streams, and one with a head that its base does not have."""
    whole: dict[str, Any] = {
        "roles": {name: {"trainable": name != "teacher"} for name in ("student", "teacher", "critic")}
    }
    rates: dict[str, Any] = {"student_learning_rate": 0.01, "generator_update_interval": 1}
    if kind == "experts":
        size = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8}
        whole |= {"model": {"path": str(experts_folder(tmp_path)), **size}, "method": rates}
    elif kind == "stream":
        whole |= {"distill_method": "self_forcing", "method": rates | {"reach": {"chunk": 1}}}
    else:
        tiny = {"model": {"path": "tiny"}, "data": {"path": "tiny", "size": 8, "batch_size": 2}}
        whole |= {"distill_method": "anyflow", "method": rates, **tiny}
    folder = run(config_of(values_of(tmp_path, **whole), "test")).parent
    assert main(["average", str(folder), "--std", "0.1"]) == 0
    stored = load_file(snapshots_in(folder / "snapshots")[Profile(2, 0.1)])
    loaded, own = (load_model(str(folder / name)) for name in ("averaged-0.1", "student"))
    state = loaded.network.state_dict()
    assert state.keys() == stored.keys() == own.network.state_dict().keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert loaded.sampler() == own.sampler()
