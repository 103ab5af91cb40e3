"""The page holds everything it shows: all rows, all prompts, no address of anything outside."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import av
import pytest
import torch

from fastvideo.data.video_io import video_bytes
from fastvideo.errors import UserError
from fastvideo.evaluation.catalogue import WORLD
from fastvideo.evaluation.charts import Axis, Mark, cost_chart, line_chart
from fastvideo.evaluation.evaluate import Evaluation
from fastvideo.evaluation.figures import difference, headline, titles_of
from fastvideo.evaluation.report import write_report
from fastvideo.evaluation.report_media import ModelVideos, gallery, middle_frame
from fastvideo.evaluation.report_run import Run, VideoFile, read_curves, read_run
from fastvideo.evaluation.report_training import curves_of
from fastvideo.evaluation.statistics import Estimate
from fastvideo.tests.evaluation.runs import PROMPTS, make_run, measured
from fastvideo.tests.evaluation.test_metrics import row

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Attributes that load or lead somewhere, images with their text, and whether all tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.images: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.addresses += [str(values[key]) for key in ("src", "href", "srcset", "poster", "data") if key in values]
        if tag == "img":
            self.images.append(values["alt"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Self-closed SVG elements open nothing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained_and_complete(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))
    text = write_report([run.folder], tmp_path / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"@import|url\(|<script|<iframe", text)
    assert "DMD2 \u00d7 WAN" in text
    assert "a &lt; b" in text
    assert all(title in text for title in titles_of(run.metrics).values())
    assert "a &lt;b&gt; digit" in text
    assert len(page.images) == 2 * 5 * len(PROMPTS), "a moving and a still picture per video"
    assert all("digit" in alt or "seven" in alt or "eight" in alt for alt in page.images)
    assert "$" not in text
    assert "4 network calls instead of 100: 25\u00d7 faster" in text
    assert "200 student updates" in text


def test_figures_of_an_earlier_student_of_the_run_are_told_from_its_own(tmp_path: Path) -> None:
    """Also in a folder that was moved, and if another model of as many steps was measured beside it."""
    student, earlier = tmp_path / "before" / "student", {"steps": 400, "weights": "ema"}
    students = {"student_4": {"folder": str(student), **earlier}, "b": {"folder": "b", "steps": 800, "weights": "ema"}}
    make_run(student.parent, replace(measured(), students=students))
    folder = student.parent.rename(tmp_path / "run")
    for recipe, said in (
        (earlier, ""),
        ({"steps": 800, "weights": "ema"}, "of the averaged weights after 400 steps of training, and this student is "),
        ({"steps": 400, "weights": "live"}, "and this student is the last weights after 400 steps of training. For "),
    ):
        (folder / "student").mkdir(exist_ok=True)
        (folder / "student" / "recipe.json").write_text(json.dumps(recipe))
        page = write_report([folder]).read_text()
        assert said in page
        assert ("and this student is" in page) == bool(said)
    figures = json.loads((folder / "metrics.json").read_text())
    figures.pop("students")
    (folder / "metrics.json").write_text(json.dumps(figures))
    assert "metrics.json names no step, as an earlier version wrote it" in write_report([folder]).read_text()


def test_page_of_a_run_that_was_not_measured_shows_its_training(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluation=None)
    text = write_report([run], tmp_path / "page.html").read_text()
    assert "not measured yet" in text
    assert "Critic: loss" in text
    assert "<table" not in text


def test_page_of_figures_alone_says_that_there_are_no_videos(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(measured().to_dict()))
    assert "kept no videos" in write_report([tmp_path], tmp_path / "page.html").read_text()


def test_large_videos_are_embedded_as_looping_mp4(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", measured(side=160))
    page = write_report([folder]).read_text()
    assert page.count('<video class="moving" src="data:video/mp4;base64,') == 5 * len(PROMPTS)
    assert " loop muted playsinline" in page
    assert 'alt="Student, 4 steps: a green seven, one frame"' in page


def test_the_still_picture_is_the_middle_frame() -> None:
    video = torch.stack([torch.full((3, 32, 32), level) for level in (-1.0, 0.2, 1.0)], 1)
    still = middle_frame(VideoFile(video_bytes(video, ".apng"), ".apng"))
    with av.open(io.BytesIO(still)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.mean() for frame in frames] == [153.0]


def test_a_gallery_that_is_too_large_says_how_much_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = VideoFile(video_bytes(torch.zeros(3, 2, 32, 32), ".apng"), ".apng")
    whole = gallery(PROMPTS, [ModelVideos("Student", "student", [clip] * 3)])
    assert (len(whole.rows), whole.wanted) == (3, 3)
    folder = make_run(tmp_path / "run")
    page = write_report([folder]).read_text()
    assert page.count('class="prompt"') == 3
    assert "of 3 prompts" not in page
    one_and_a_half = int(1.5 * len(page.split('class="prompt"')[1]))
    monkeypatch.setattr("fastvideo.evaluation.report_media.MOST_VIDEO_BYTES", one_and_a_half)
    cut = write_report([folder]).read_text()
    assert cut.count('class="prompt"') == 1
    assert "1 of 3 prompts" in cut


def test_headline_compares_the_fullest_rows() -> None:
    assert headline(measured().to_dict()).startswith("4 network calls instead of 100")
    student = row(kind="student")
    two = Evaluation({"a/student": student, "b/student": student, "tiny": row(kind="teacher")}, {}, (), {}).to_dict()
    assert headline(two) == "3 models side by side", "of two students with equal calls none is the one"
    assert titles_of(two) == {"a/student": "a", "b/student": "b", "tiny": "Teacher, 4 steps"}


def test_a_difference_is_sure_only_if_its_interval_leaves_zero_out() -> None:
    near, far = (row(frechet=Estimate(v, v - 3.0, v + 4.0, 9)).to_dict() for v in (10.0, 14.0))
    found = difference(near, far, "frechet")
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((-4.0, -9.0, 1.0)), "ends: 3-4-5 triangles"
    assert not found.sure
    much = difference(near, row(frechet=Estimate(30.0, 27.0, 34.0, 9)).to_dict(), "frechet")
    assert much is not None
    assert much.sure


def test_verdicts_hold_the_student_against_the_guided_and_the_untrained(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "run")]).read_text()
    found = re.search('<section aria-labelledby="worth">.*?</section>', page, re.S)
    assert found is not None
    text = re.sub(r"<[^>]+>", " ", found.group())
    lines = re.findall(r"instead of\s+(\w[^<]*?)\s{2,}", text)
    assert lines == [
        *("Teacher, 50 steps, guided", "Teacher, 4 steps, guided", "Student before training, 4 steps"),
        "Teacher, 50 steps, guided",
    ]
    assert "closer to real videos" in text, "than before training"
    assert "not told apart" in text, "from the teacher, whose figures are the same"


def test_networks_of_a_validation_share_a_chart(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(
        '{"step": 1, "seconds": 3.0, "validation/ema/frechet": 9, "validation/student/frechet": 8}\n'
        '{"step": 2, "seconds": 4.0, "loss": NaN, "grad": 1.5}\n'
    )
    curves = read_curves(tmp_path / "m.jsonl")
    assert set(curves) == {"validation/ema/frechet", "validation/student/frechet", "grad"}
    charts = curves_of([Run("run", tmp_path, curves=curves)])
    assert set(charts["validation/frechet"]) == {"ema", "student"}
    for name, series in charts.items():
        svg = re.search(r"<svg.*</svg>", line_chart(name, series))
        assert svg is not None
        ElementTree.fromstring(svg.group())


def test_the_half_written_last_line_of_a_killed_run_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert read_curves(tmp_path / "m.jsonl") == {"loss": [(1.0, 3.0)]}
    (tmp_path / "m.jsonl").write_text('{"step": 1, "lo\n{"step": 2, "loss": 3.0}\n')
    with pytest.raises(UserError, match=r"m\.jsonl: every line must be a JSON object"):
        read_curves(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_text("")
    assert read_curves(tmp_path / "m.jsonl") == {}


@pytest.mark.parametrize(("value", "shown"), [(1.0, "40 of 40"), (0.0, "0 of 40"), (0.5, "50.0 to 50.0")])
def test_an_interval_without_width_at_either_end_is_a_count(value: float, shown: str) -> None:
    row = {"digit_accuracy": value, "intervals": {"digit_accuracy": [value, value]}, "counts": {"digit_accuracy": 40}}
    assert WORLD[0].cell(row).small == shown


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0.0, 1.0, False), (3.0, 3.0, False), (1.0, 100.0, True), (-5, 9e4, False)]
)
def test_axis_keeps_values_and_ticks_inside(low: float, high: float, log: bool) -> None:
    axis = Axis.over([low, high], 200, 10, log)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 8
    assert all(10 <= axis(value) <= 200 for value in (low, high, *ticks))


def test_a_chart_of_shares_ends_at_one() -> None:
    ticks = re.findall(r'text-anchor="end">([\d.]+)</text>', line_chart("accuracy", {"": [(1, 1.0), (2, 1.0)]}))
    assert ticks
    assert max(map(float, ticks)) <= 1


def test_equal_results_keep_readable_names_and_a_described_chart() -> None:
    marks = [Mark(name, 4, 30.0, 0.0, 40.0, "student", "Student") for name in ("first", "second")]
    wide, narrow = re.findall(r"<svg.*?</svg>", cost_chart(marks, 10.0, "distance"))
    for drawing in (wide, narrow):
        svg = ElementTree.fromstring(drawing)
        described = "distance over network calls: Student, first 30 at 4; Student, second 30 at 4"
        assert svg.attrib["aria-label"] == described
        baselines = [float(text.attrib["y"]) for text in svg.iter("text") if text.attrib["class"] == "label"]
        assert baselines[1] - baselines[0] >= 13
