"""Runs that were trained and not measured: their config, validation videos, health figures and single values."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest

from fastvideo.distillation.config.schema import HealthConfig
from fastvideo.evaluation.alarms import bands, find_alarms
from fastvideo.evaluation.report import size_of, write_report
from fastvideo.evaluation.report_run import read_run
from fastvideo.evaluation.report_training import health_table, once_table
from fastvideo.tests.evaluation.runs import add_validation, make_run


def text_of(page: str) -> str:
    """The words of a page."""
    return " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S)).split())


def test_a_config_alone_is_a_run(tmp_path: Path) -> None:
    """A run too short to log shows its config, and says that no metrics were logged."""
    folder = make_run(tmp_path / "run", None)
    (folder / "metrics.jsonl").unlink()
    page = write_report([folder]).read_text()
    assert "No metrics were logged" in text_of(page)
    assert "teacher_guidance: 2.0" in page
    assert '<details class="card" open>' in page, "the config is all there is to see"


def test_validation_videos(tmp_path: Path) -> None:
    """Runs without an evaluation show the videos of their last validation; a shared teacher appears once."""
    first, second = (add_validation(make_run(tmp_path / name, None)) for name in ("first", "second"))
    earlier = first / "validation" / "step-000100-student.mp4"
    earlier.write_bytes((first / "validation" / "step-000400-student.mp4").read_bytes())
    page = write_report([first]).read_text()
    assert page.count('<video class="moving"') == 3
    assert "Validation at step 400" in page
    other = add_validation(make_run(tmp_path / "other", None), step=300)
    (other / "validation" / "teacher.mp4").write_bytes((first / "validation" / "teacher.mp4").read_bytes())
    both = write_report([first, other], tmp_path / "compare.html").read_text()
    assert both.count('<video class="moving"') == 5, "three of the first, two of the other"
    assert both.count('id="pause"') == 1
    assert "not measured, so its videos are those of its last validation" in both
    assert read_run(second).validation is not None


def test_measured_runs_show_their_evaluation(tmp_path: Path) -> None:
    page = write_report([add_validation(make_run(tmp_path / "run"))]).read_text()
    assert '<figure class="strip">' not in page


def test_too_large_validation_videos_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = add_validation(make_run(tmp_path / "run", None))
    monkeypatch.setattr("fastvideo.evaluation.report_media.MOST_VIDEO_BYTES", 0)
    page = write_report([folder]).read_text()
    assert '<video class="moving"' not in page
    assert page.count(f"too large for this page, see {folder}/validation") == 3


@pytest.mark.parametrize(("motion", "shown"), [(0.5, "50\u00a0%"), (0.3, "30\u00a0%, outside")])
def test_health_figures_stand_beside_their_bands(tmp_path: Path, motion: float, shown: str) -> None:
    run = read_run(add_validation(make_run(tmp_path / "run", None), motion=motion))
    table = health_table([run])
    assert table is not None
    lines = {line.title.text: line.cells for line in table.groups[0]}
    assert [cell.text for cell in lines["Motion"]] == [shown, "40\u00a0% to 250\u00a0%"]
    assert lines["Motion"][0].small == f"{0.1 * motion:.3g}; teacher 0.1"
    assert lines["Motion"][0].style == ("off" if "outside" in shown else "")
    assert [cell.text for cell in lines["Critic's movement over the student's"]] == ["8", "at least 0.5"]
    assert [cell.text for cell in lines["Tint, worst channel"]] == ["+0.0 points", ""], "no limit in the config"
    assert "Motion" in text_of(write_report([run.folder]).read_text())


@pytest.mark.parametrize("name", ["contrast", "saturation", "motion", "brightness", "colour", "grid", "diversity"])
def test_bands_are_those_of_the_alarms(name: str) -> None:
    """A figure just inside its band raises no alarm; one just outside does."""
    limits = HealthConfig()
    low, high = bands(limits.model_dump())[name]
    for end, outwards in ((low, -1e-3), (high, 1e-3)):
        if abs(end) in (0.0, float("inf")):
            continue
        assert find_alarms(*_compared(name, end - outwards), {}, limits) == []
        assert len(find_alarms(*_compared(name, end + outwards), {}, limits)) == 1


def _compared(name: str, value: float) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of student and reference whose comparison gives ``value`` for one figure, and equality for the rest."""
    ratios = dict.fromkeys(("contrast", "saturation", "motion", "grid", "diversity", "latent_std"), 1.0)
    reference = {**ratios, **dict.fromkeys(("brightness", "latent_mean", "red", "green", "blue"), 0.0)}
    return {**reference, ("red" if name == "colour" else name): value}, reference


def test_single_values_say_which_way_is_better(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", None)
    values = {"validation/ema/frechet": 9.0, "validation/ema/digit_accuracy": 0.875, "critic/loss": 0.25}
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 6, **values, "health/motion": 1.0}) + "\n")
    table = once_table([read_run(folder)])
    assert table is not None
    lines = {line.title.text: [cell.text for cell in line.cells] for line in table.groups[0]}
    assert lines == {
        "Averaged weights: Fréchet distance": ["9", "lower"],
        "Averaged weights: digit accuracy": ["0.875", "higher"],
        "Critic: loss": ["0.25", ""],
    }
    page = write_report([folder]).read_text()
    assert "Logged once" in page
    assert "<details" not in page.split('id="curves"')[1].split("</section>")[0], "not folded away"


def test_differing_configs_come_first(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, guidance=guidance) for name, guidance in (("a", 2.0), ("b", 3.0))]
    page = write_report(folders, tmp_path / "compare.html").read_text()
    names = re.findall('<section aria-labelledby="([a-z]+)"', page)
    assert names == ["config", "videos", "figures", "curves"]


@pytest.mark.parametrize(("size", "shown"), [(3, "1 kB"), (34_400, "34 kB"), (1_250_000, "1.2 MB")])
def test_size_of_a_page(tmp_path: Path, size: int, shown: str) -> None:
    page = tmp_path / "page.html"
    page.write_bytes(b"x" * size)
    assert size_of(page) == shown
