"""Streams on the page: courses, frames far apart, and models and runs side by side."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastvideo.cli.evaluate_streams import cell, spread
from fastvideo.evaluation.charts import Banded, band_chart
from fastvideo.evaluation.figures import short_names
from fastvideo.evaluation.report import write_report
from fastvideo.evaluation.report_run import VideoFile
from fastvideo.evaluation.report_streams import CHARTS, points, strip
from fastvideo.evaluation.statistics import Estimate
from fastvideo.tests.evaluation.runs import make_run
from fastvideo.tests.evaluation.streams.rows import measured_streams


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = make_run(tmp_path_factory.mktemp("runs") / "streams", measured_streams())
    return write_report([folder]).read_text()


def test_every_course_is_drawn_with_its_band_beside_real_streams(page: str) -> None:
    charts = re.findall(r'<figure class="chart">.*?</figure>', page.split('id="streams"')[1].split("</section>")[0])
    assert len(charts) == len(CHARTS) == 15
    digit = next(chart for chart in charts if "Right digit" in chart)
    assert digit.count('<polygon class="band') == digit.count('<polyline class="line') == 3
    assert "Student, 4 steps" in digit
    assert "real dashed" in digit
    bias = next(chart for chart in charts if "Exposure bias: digit" in chart)
    assert bias.count("<polyline") == 2


def test_what_the_page_says_of_streams(page: str) -> None:
    assert "4 network calls per chunk instead of 50" in page
    assert "streams lie at a Fréchet distance of 22.0" in page
    assert "128 held-out prompts, streams of 129 frames, seed 0" in page
    assert "frames 1, 33, 65, 129" in page
    assert page.count('class="strip frames"') == 6
    assert "median latency" in page
    assert "closer to real videos" not in page, "this student is further away than its teacher"


def test_several_models_and_runs(tmp_path: Path) -> None:
    both = make_run(tmp_path / "both", measured_streams(students=2))
    other = make_run(tmp_path / "other", measured_streams(drift=0.5))
    text = write_report([both, other], tmp_path / "page.html").read_text()
    chart = next(found for found in text.split('<figure class="chart">') if "<span>Right digit" in found)
    assert chart.count("<polyline") == 5  # the teacher, both students, the other run's student, and real streams
    assert "causvid: both" in chart


def test_undefined_values_are_left_out() -> None:
    series = {"at": [0, 16, 32], "value": [None, 1.0, 2.0], "low": [None, 0.5, 1.5], "high": [None, 1.5, None]}
    assert points(series) == [(17, 1.0, 0.5, 1.5)]
    chart = band_chart("T", [Banded("a", "s0", [(1, 0.5, 0.2, 1.0), (17, 0.6, 0.3, 1.0)]), Banded("b", "s1", [])])
    assert "a from 0.5 to 0.6 at frame 17" in chart
    assert "s1" not in chart


def test_a_strip_has_the_last_frame_of_any_stream(tmp_path: Path) -> None:
    from fastvideo.data.video_io import video_bytes
    from fastvideo.tests.evaluation.streams.scenes import real

    video = real(1, 37)[0][0]
    found = strip("a", VideoFile(video_bytes(video, ".apng", 8), ".apng"))
    assert found.title == "a: frames 1, 33, 37"
    assert found.pictures == 3


def test_names_of_models_are_as_short_as_they_can_be() -> None:
    assert short_names(["outputs/causvid/student", "outputs/self_forcing/student"]) == ["causvid", "self_forcing"]
    assert short_names(["a/x/b", "c/x/b", "c/y/b"]) == ["a/x", "c/x", "c/y"]
    assert short_names(["out/a:1", "out/a:4"]) == ["a:1", "a:4"]
    assert short_names(["one", "one/two"]) == ["one", "two"]
    assert short_names(["alone/student"]) == ["student"]


def test_cells_of_the_terminal() -> None:
    assert cell(Estimate(7.0, 5.0, 9.0, 8), 0) == "7\n[dim]5-9[/dim]"
    assert cell(Estimate(7.0, 5.0, float("inf"), 8), 0) == "7\n[dim]5-never[/dim]"
    assert cell(Estimate(float("inf"), float("inf"), float("inf"), 8), 0) == "never\n[dim][/dim]"
    assert cell(Estimate(float("nan"), float("nan"), float("nan"), 0), 0) == cell(None, 0) == ""
    assert spread(3, 5) == range(3)
    assert spread(8, 5) == [0, 2, 4, 5, 7]
