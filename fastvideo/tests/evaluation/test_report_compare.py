"""``fastvideo report``: what stands side by side, what is kept apart, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest

from fastvideo.cli import main
from fastvideo.errors import UserError
from fastvideo.evaluation.figures import groups_of
from fastvideo.evaluation.report import write_report
from fastvideo.evaluation.report_run import read_gallery, read_runs
from fastvideo.evaluation.report_training import curves_of
from fastvideo.tests.evaluation.runs import PROMPTS, make_run, measured, without_figure


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs that differ in one config value and in their 4-step student."""
    return [make_run(tmp_path / "first"), make_run(tmp_path / "second", measured(22.0), guidance=3.0)]


def compare(folders: list[Path], out: Path) -> str:
    return write_report(folders, out).read_text()


def words(page: str, section: str) -> str:
    """The text of a section."""
    found = re.search(f'<section aria-labelledby="{section}">.*?</section>', page, re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", found.group())).split()) if found else ""


def test_what_is_shared_stands_once_and_differences_are_from_the_first_run(runs: list[Path], tmp_path: Path) -> None:
    page = compare(runs, tmp_path / "compare.html")
    cells = groups_of(read_runs(runs))[0].entries()
    assert [(cell.title, cell.run.name) for cell in cells if not cell.shared] == [
        ("Student, 4 steps", "first"),
        ("Student, 4 steps", "second"),
    ]
    assert "second minus first" in words(page, "figures")
    assert "\u22128.0 \u221215.1 to \u22120.9" in words(page, "figures"), "8 +- 5 sqrt 2"
    best = re.findall(r'class="best"[^>]*>([^<]+)<', page)
    assert best == ["22.0"], "ties have no best"
    assert page.count('class="prompt"') == len(PROMPTS)
    assert page.count('img class="moving"') == len(cells) * len(PROMPTS)


def test_configs_differ_in_what_was_changed_alone(runs: list[Path], tmp_path: Path) -> None:
    page = compare(runs, tmp_path / "compare.html")
    assert words(page, "config") == "What differs in the configs key first second method.teacher_guidance 2.0 3.0"
    assert words(page, "environment") == ""
    shutil.copy(runs[0] / "config.yaml", runs[1] / "config.yaml")
    same = compare(runs, tmp_path / "compare.html")
    assert words(same, "config").endswith("Nothing but the output folder.")


def test_curves_are_overlaid_and_a_run_without_a_metric_keeps_its_colour(runs: list[Path]) -> None:
    (runs[0] / "metrics.jsonl").write_text('{"step": 1, "other": 1.0}\n{"step": 2, "other": 2.0}\n')
    curves = curves_of(read_runs(runs))
    assert list(curves["critic/loss"]) == ["first", "second"]
    assert (len(curves["critic/loss"]["first"]), len(curves["critic/loss"]["second"])) == (0, 400)
    page = compare(runs, runs[0].parent / "compare.html")
    chart = next(part for part in page.split('<figure class="chart">') if "Critic: loss" in part)
    assert 'class="line s1"' in chart
    assert 'class="line s0"' not in chart


@pytest.mark.parametrize("setting", ["prompts", "seed", "prompts_sha256", "judge_sha256"])
def test_runs_measured_on_something_else_are_kept_apart(runs: list[Path], tmp_path: Path, setting: str) -> None:
    other = make_run(tmp_path / "other", measured(**{setting: 99}))
    page = compare([*runs, other], tmp_path / "compare.html")
    assert "were measured on different prompts" in page
    table = words(page, "figures")
    assert table.count("Measured on 512 held-out prompts") == 2
    assert "second minus first" in table
    assert "other minus" not in table
    assert 'class="cost"' not in page, "no chart across groups"


def test_what_a_run_lacks_is_said(runs: list[Path], tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare", None)
    figures = tmp_path / "figures"
    figures.mkdir()
    shutil.copy(runs[0] / "metrics.json", figures)
    page = compare([*runs, bare, figures], tmp_path / "compare.html")
    notices = " ".join(re.findall(r'class="notice">([^<]+)<', page))
    assert "bare: not measured, so there are only curves and config." in notices
    assert "figures: no videos kept." in notices
    assert "figures: no training curves." in notices
    assert "figures: no config." in notices


def test_figures_that_are_undefined_are_not_compared(tmp_path: Path) -> None:
    found = {"a": measured(21.0), "b": measured(22.0)}
    folders = [make_run(tmp_path / name, without_figure(e, "digit_accuracy")) for name, e in found.items()]
    table = words(compare(folders, tmp_path / "compare.html"), "figures")
    assert "n/a" in table
    assert "nan" not in table


def test_one_folder_gives_its_own_page_again(runs: list[Path]) -> None:
    before = write_report([runs[0]])
    assert before == runs[0] / "report.html"
    text = before.read_text()
    before.unlink()
    assert write_report([runs[0]]).read_text() == text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / parent / "run", None) for parent in ("x", "y")]
    assert [run.name for run in read_runs(folders)] == ["x/run", "y/run"]


def test_command_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--out", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    assert main(["report", str(tmp_path / "secnd")]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.json", "{", "is not JSON"),
        ("metrics.json", "[1]", "a JSON object is expected"),
        ("metrics.json", '{"evaluation": {}}', "no row of figures"),
        ("metrics.json", '{"student_4": {"frechet": 1.0}}', "'student_4' lacks intervals"),
        ("metrics.jsonl", '{"loss": 1.0}\n{"step": 2}\n', "every line must be a JSON object with a step"),
        ("config.yaml", "a: [", "is not YAML"),
        ("videos/index.json", "{}", "prompts .* and rows"),
        ("videos/index.json", '{"prompts": ["a"], "rows": {"x": "../../etc"}}', "not the name of a folder"),
        ("videos/index.json", '{"prompts": ["a"], "rows": {"x": "00-teacher_50"}}', "1 videos are expected"),
    ],
)
def test_a_damaged_file_is_named(runs: list[Path], name: str, text: str, message: str) -> None:
    (runs[0] / name).write_text(text)
    with pytest.raises(UserError, match=message) as found:
        write_report([runs[0]])
    assert str(runs[0]) in str(found.value)
    assert not (runs[0] / "report.html").exists()


def test_what_is_no_run_is_refused(runs: list[Path], tmp_path: Path) -> None:
    (runs[0] / "student").mkdir()
    (tmp_path / "empty").mkdir()
    cases: list[tuple[list[Path], Path | None, str]] = [
        ([], None, "one or several run folders"),
        ([tmp_path / "empty"], None, "no run: it has no metrics.json, no metrics.jsonl and no config.yaml"),
        ([runs[0] / "student"], None, f"it lies in the run {runs[0]}"),
        ([runs[0], runs[0]], None, "given twice"),
        (runs, tmp_path / "page.txt", "ending in .html"),
        (runs * 7, None, "at most 12 runs"),
    ]
    for folders, out, message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            write_report(folders, out)
    assert not list(tmp_path.glob("*.html"))


def test_kept_videos_are_read_back_by_row_and_prompt(runs: list[Path]) -> None:
    found = read_gallery(runs[0])
    assert found is not None
    assert found.prompts == PROMPTS
    index = json.loads((runs[0] / "videos" / "index.json").read_text())
    first = runs[0] / "videos" / index["rows"]["student_4"] / "000.apng"
    assert found.rows["student_4"][0].data == first.read_bytes()
