"""Configs and names with letters outside of ASCII, on machines whose locale has none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvideo.distillation.config.reading import read_config, read_yaml
from fastvideo.errors import UserError

RUN = Path(__file__).parent / "inputs" / "yaml-in-the-locale" / "run.yaml"
IN_C = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
PROMPT = "a größe 数字 🐱"


def test_a_config_is_read_in_any_locale(tmp_path: Path) -> None:
    """The file is named with letters too; what is printed is UTF-8."""
    named = tmp_path / "größe.yaml"
    named.write_bytes(RUN.read_bytes())
    command = [sys.executable, "-m", "fastvideo.cli", "schedule", "show", str(named)]
    done = subprocess.run(command, env=IN_C, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "wan x dmd2: 4 network calls" in done.stdout.decode("utf-8")


def test_letters_stay_as_they_are(tmp_path: Path) -> None:
    """Without the program's UTF-8 mode too: the library is used from scripts."""
    code = f"from fastvideo.distillation.config.reading import read_config; c = read_config({str(RUN)!r})"
    code += "; print(ascii((c.output, c.validation.prompts[1])))"
    done = subprocess.run([sys.executable, "-c", code], env=IN_C, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == ascii(("outputs/größe", PROMPT)), done.stderr


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_tells_the_encoding(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(RUN.read_text(encoding="utf-8").encode(encoding))
    assert read_config(tmp_path / "run.yaml").validation.prompts[1] == PROMPT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: caf\u00e9".encode("latin-1"), r"run\.yaml, line 2: not UTF-8 \(byte 12\); save it as UTF-8"),
        (b"a: 2026-02-30", "not valid YAML: day is out of range"),
        (b"a: !!int ''", "not valid YAML"),
        (b"a: " + b"[" * 5000, "not valid YAML"),
        (b"a: " + b"1" * 5000, "not valid YAML"),
        (b"a\0b: 1", "line 1: holds a NUL"),
    ],
)
def test_what_cannot_be_read_is_a_message(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "run.yaml")
