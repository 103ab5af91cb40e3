"""The verbs that only show: ``schedule show`` and ``list``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastvideo.cli import main
from fastvideo.cli.listing import experts_line, split_paper
from fastvideo.cli.schedule import published_steps
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.methods.fine_tuning.sft import SFTMethod
from fastvideo.distillation.registry import ADAPTERS, METHODS
from fastvideo.tests.distillation.tiny import cogvideox_folder

RUN = """
distill_model: wan
distill_method: dmd2
output: outputs/x
model: {}
roles: {student: {trainable: true}, teacher: {trainable: false}, critic: {trainable: true}}
method: {}
"""


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> list[list[str]]:
    """The cells of every row that a verb prints."""
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


@pytest.mark.parametrize(
    ("ladder", "step", "t", "snr"),
    [
        ("{steps: [1000, 750, 500, 250, 0], shift: 5.0}", "250", "0.6250", "0.3600"),
        ("{steps: [1000, 250], shift: 5.0, warp: false}", "250", "0.2500", "9.0000"),
        ("{count: 4, shift: 5.0}", "250", "0.6250", "0.3600"),
        ("{times: [1.0, 0.625]}", "-", "0.6250", "0.3600"),
    ],
)
def test_every_form_of_a_ladder_shows_what_the_network_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ladder: str, step: str, t: str, snr: str
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(RUN + f"ladder: {ladder}\n")
    last = shown(capsys, "schedule", "show", str(config))[-1]
    assert last[1:] == [step, t, t, f"{1 - float(t):.4f}", snr, f"{1000 * float(t):.3f}"]


def test_a_config_without_a_ladder_shows_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(RUN)
    assert [row[2] for row in shown(capsys, "schedule", "show", str(config))] == [
        "1.0000",
        "0.7500",
        "0.5000",
        "0.2500",
    ]


@pytest.mark.parametrize("text", ["", "distill_method: dmd2\n", RUN + "ladder: {times: [0.5, 0.75]}\n"])
def test_a_bad_config_is_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    assert main(["schedule", "show", str(config)]) == 2
    assert capsys.readouterr().err.startswith(f"error: config {config}")


def test_list_names_every_method_and_family(capsys: pytest.CaptureFixture[str]) -> None:
    first = {row[0] for row in shown(capsys, "list")}
    assert first >= {*METHODS, *ADAPTERS}


def whole_rows(lines: list[list[str]], columns: int) -> dict[str, list[str]]:
    """Rows of the table with so many columns, by their first cell; cells that were wrapped are joined."""
    rows: dict[str, list[str]] = {}
    for line in (line for line in lines if len(line) == columns):
        if line[0]:
            rows[line[0]] = row = line
        else:
            row[:] = [f"{cell} {more}".strip() for cell, more in zip(row, line, strict=True)]
    return rows


def test_list_says_what_goes_together(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WanFamily, "supports", frozenset({"flow_map"}))
    monkeypatch.setattr(SFTMethod, "needs_of", classmethod(lambda cls, config: frozenset({"flow_map", "jvp"})))
    rows = whole_rows(shown(capsys, "list"), 4)
    _, methods, fitting, others = rows["flow_map, jvp"]
    assert methods == "mean_flow, sft, causal_sft"
    assert re.search(r"jvp: wan\b", others)
    assert "analytic" in fitting
    assert "wan" not in fitting
    assert rows["-"][2] == ", ".join(ADAPTERS)


def test_list_says_which_families_a_frame_teacher_and_two_experts_go_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A state of parts has no frames, stills are none, and two experts have fewer abilities than their family."""
    _, methods, fitting, others = whole_rows(shown(capsys, "list"), 4)["frames"]
    assert methods == "dmd2_frames"
    assert fitting == "wan, cogvideox, ltx, kandinsky5, hunyuan15, analytic"
    assert others == "frames: sdxl, sd15, qwen_image, z_image, flux2, flux, krea2, sd3, ltx2"
    line = experts_line()
    assert "Wan 2.2 A14B): level tiny equality, methods kd, cm, tcm, dmd2, phased_dmd, dmd2_frames, sft;" in line
    assert line.endswith("they lack chunks, features, flow_map, frame_times, jvp.")


def test_list_says_how_far_a_family_is_proven(capsys: pytest.CaptureFixture[str]) -> None:
    levels = {row[0]: row[2] for row in shown(capsys, "list") if len(row) == 3 and row[0]}
    assert levels["wan"] == levels["sdxl"] == "tiny distillation"
    assert levels["sd15"] == "tiny equality"
    assert levels["analytic"] == "closed form"


def test_the_time_that_is_shown_is_the_time_that_wan_is_given() -> None:
    import torch

    t = torch.tensor([0.25, 1.0])
    assert torch.equal(WanFamily.network_time(t, WanFamilyConfig()), torch.tensor([250.0, 1000.0]))


def test_the_stock_ladder_is_yaml_that_means_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_cogvideox: Path
) -> None:
    """On CogVideoX's own timesteps: what is printed is what a stock scheduler yields, and a run reads it so."""
    config = tmp_path / "run.yaml"
    run = RUN.replace("wan", "cogvideox").replace("model: {}", f"model: {{path: {tiny_cogvideox}}}")
    config.write_text(run)
    assert main(["schedule", "stock", str(config), "--steps", "4"]) == 0
    printed = capsys.readouterr().out
    assert "LCMScheduler" in printed
    config.write_text(run + printed)
    assert [row[-1] for row in shown(capsys, "schedule", "show", str(config))] == [
        "999.000",
        "749.000",
        "499.000",
        "249.000",
    ]
    assert main(["schedule", "stock", str(config)]) == 0
    assert capsys.readouterr().out == printed, "a ladder on the grid stays where it is"
    assert main(["schedule", "stock", str(config), "--steps", "0"]) == 2


@pytest.fixture(scope="module")
def tiny_cogvideox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete CogVideoX pipeline folder with random weights."""
    return cogvideox_folder(tmp_path_factory.mktemp("tiny"))


def test_helpers() -> None:
    assert split_paper("DMD2, with a critic (arXiv 2405.14867)") == ("DMD2, with a critic", "2405.14867")
    assert split_paper("no paper") == ("no paper", "-")
    assert published_steps(None) is None
