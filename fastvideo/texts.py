"""Text files of every origin: UTF-8 whatever the locale says, and UTF-16 or UTF-32 with their mark."""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from pathlib import Path

from fastvideo.errors import UserError
from fastvideo.wording import see

ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by the byte order mark that a file begins with; the longer marks first."""


HELP = see("a-file-is-not-utf-8")


def read_text(path: Path, name: str) -> str:
    """The text of a file without its byte order mark; line ends stay as they are.

    Args:
        name: of the file in messages, such as ``caption file a.csv``.

    Raises:
        UserError: with the line, if the file cannot be read or is not text in UTF-8, UTF-16 or UTF-32.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from error
    return decoded(data, name)


def decoded(data: bytes, name: str) -> str:
    """The text that a file's bytes hold, as :func:`read_text`.

    Raises:
        UserError: with the line, if it is not text in UTF-8, UTF-16 or UTF-32.
    """
    encoding = next((encoding for mark, encoding in ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = len(lines_of(data[: error.start].decode(encoding, "replace")))
        kind = encoding.removesuffix("-sig").upper()
        raise UserError(f"{name}, line {line}: not {kind} (byte {error.start + 1}); save it as UTF-8{HELP}") from error
    if "\0" in text:
        line = len(lines_of(text[: text.index("\0")]))
        raise UserError(f"{name}, line {line}: holds a NUL character, so it is not UTF-8 text; save it as UTF-8{HELP}")
    return text


def lines_of(text: str) -> list[str]:
    r"""Lines of a text, which end at ``\n``, ``\r\n`` and ``\r`` alone: other separators may stand in a caption."""
    return re.split(r"\r\n|\n|\r", text)


def same_name(name: str) -> str:
    """A file name in the form in which two spellings of its accents are equal (NFC)."""
    return unicodedata.normalize("NFC", name)


def shown_name(name: str) -> str:
    r"""A file name as text: bytes of the disk that are no text in the locale's encoding appear as ``\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
