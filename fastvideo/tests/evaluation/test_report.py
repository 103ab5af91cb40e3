"""The page holds everything it shows: all rows, all prompts, no address of anything outside."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo.evaluation.charts import Axis, Mark, cost_chart, grouped, line_chart, read_curves
from fastvideo.evaluation.evaluate import Evaluation
from fastvideo.evaluation.figures import headline, title_of
from fastvideo.evaluation.report import ReportData, media, write_page, write_report
from fastvideo.evaluation.statistics import Estimate
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


def evaluation() -> Evaluation:
    rows = {
        "teacher_50": row(network_calls=100, steps=50, guidance=2.0, sampler="euler", denoise_seconds_per_video=0.25),
        "teacher_4": row(network_calls=8, steps=4, guidance=2.0, sampler="euler"),
        "untrained_4": row(frechet=Estimate(200.0, 190.0, 215.0, 512)),
        "student_4": row(),
        "student_1": row(network_calls=1, steps=1),
    }
    videos = {name: torch.rand(3, 3, 2, 32, 32, generator=torch.Generator().manual_seed(0)) for name in rows}
    return Evaluation(rows, videos, ("a green seven", "a <b> digit", "an eight moving up"), {"prompts": 512})


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("distill_model: wan\ndistill_method: dmd2\nnote: 'a < b'\n")
    (tmp_path / "environment.json").write_text(json.dumps({"torch": "2.13"}))
    lines: list[dict[str, Any]] = [
        {"step": s, "seconds": 0.1 * s, "critic/loss": 1.0 / s, "validation/ema/frechet": 300.0 / s}
        for s in range(1, 900)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path


def test_page_is_self_contained_and_complete(run_folder: Path) -> None:
    found = evaluation()
    figures = {**found.to_dict(), "distillation": {"wall_seconds": 240.0, "student_updates": 160}}
    text = write_report(run_folder / "report.html", found, run=run_folder, figures=figures).read_text()
    page = Page(text)
    assert not page.open
    assert page.addresses
    assert all(address.startswith("data:image/apng;base64,") for address in page.addresses)
    assert not re.search(r"@import|url\(|<script|<link|<iframe", text)
    assert "DMD2 x WAN" in text
    assert "a &lt; b" in text
    for name in found.rows:
        assert title_of(name, figures[name]) in text
    for prompt in ("a green seven", "a &lt;b&gt; digit", "an eight moving up"):
        assert prompt in text
    assert len(page.images) == 15
    assert all("digit" in alt or "seven" in alt or "eight" in alt for alt in page.images)
    assert "$" not in text
    assert "4 network calls instead of 100: 25\u00d7 faster" in text


def test_page_without_a_run_or_a_student(tmp_path: Path) -> None:
    found = evaluation()
    rows = {"outputs/mine": found.rows["student_4"]}
    only = Evaluation(rows, {"outputs/mine": found.videos["student_4"]}, found.prompts, {})
    text = write_report(tmp_path / "page.html", only, run=tmp_path, figures=only.to_dict()).read_text()
    assert "<h1>Figures of outputs/mine</h1>" in text


def test_page_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        write_page(tmp_path / "page.html", ReportData({}, {}, ()))


def test_large_videos_are_embedded_as_looping_mp4() -> None:
    element = media(torch.zeros(3, 2, 144, 160), 8, "a seven")
    assert element.startswith('<video src="data:video/mp4;base64,')
    assert " loop muted playsinline" in element


def test_headline_compares_the_fullest_rows() -> None:
    assert headline(evaluation().to_dict()).startswith("4 network calls instead of 100")


def test_networks_of_a_validation_share_a_chart(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(
        '{"step": 1, "seconds": 3.0, "validation/ema/frechet": 9, "validation/student/frechet": 8}\n'
        '{"step": 2, "seconds": 4.0, "loss": NaN, "grad": 1.5}\n'
    )
    curves = read_curves(tmp_path / "m.jsonl")
    assert set(curves) == {"validation/ema/frechet", "validation/student/frechet", "grad"}
    charts = grouped(curves)
    assert set(charts["validation: frechet"]) == {"ema", "student"}
    for name, series in charts.items():
        svg = re.search(r"<svg.*</svg>", line_chart(name, series))
        assert svg is not None
        ElementTree.fromstring(svg.group())


def test_the_half_written_last_line_of_a_killed_run_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert read_curves(tmp_path / "m.jsonl") == {"loss": [(1.0, 3.0)]}
    (tmp_path / "m.jsonl").write_text('{"step": 1, "lo\n{"step": 2, "loss": 3.0}\n')
    with pytest.raises(json.JSONDecodeError):
        read_curves(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_text("")
    assert read_curves(tmp_path / "m.jsonl") == {}


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0.0, 1.0, False), (3.0, 3.0, False), (1.0, 100.0, True), (-5, 9e4, False)]
)
def test_axis_keeps_values_and_ticks_inside(low: float, high: float, log: bool) -> None:
    axis = Axis.over([low, high], 200, 10, log)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 8
    assert all(10 <= axis(value) <= 200 for value in (low, high, *ticks))


def test_equal_results_keep_readable_names_and_a_described_chart() -> None:
    marks = [Mark(name, 4, 30.0, 0.0, 40.0, "student") for name in ("first", "second")]
    svg = ElementTree.fromstring(cost_chart(marks, 10.0, "distance"))
    assert svg.attrib["aria-label"] == "distance over network calls: first 30 at 4; second 30 at 4"
    baselines = [float(text.attrib["y"]) for text in svg.iter("text") if text.attrib["class"] == "label"]
    assert baselines[1] - baselines[0] >= 13
