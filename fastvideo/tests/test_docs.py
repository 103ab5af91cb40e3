"""The documentation is true: its Python runs, its commands, flags and paths exist, its links resolve."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from fastvideo.cli import VERBS, main
from fastvideo.distillation.registry import ADAPTERS, METHODS
from fastvideo.wording import see

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
RECIPE = "examples/distillation/tiny_wan_dmd2.yaml"
EXTERNAL = ("http://", "https://", "mailto:")
OURS = ("examples/", "fastvideo/", "tools/", "docs/", "constraints/")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``title`` names the file that the block is."""

    language: str
    title: str | None
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.M | re.S):
        title = re.search(r'title="([^"]+)"', found[2])
        yield Block(found[1], title[1] if title else None, found[3], text.count("\n", 0, found.start()) + 1)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def pages_with(language: str) -> list[Path]:
    """The pages that have a block of a language."""
    return [page for page in PAGES if any(block.language == language for block in blocks(page))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to run in, with the examples in it; modules and registry entries of a page vanish after it."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    registries = [(registry, dict(registry)) for registry in (METHODS, ADAPTERS)]
    yield tmp_path
    for registry, entries in registries:
        registry.clear()
        registry.update(entries)
    for module in [name for name in set(sys.modules) - before if (tmp_path / f"{name}.py").is_file()]:
        del sys.modules[module]


@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_python_runs(page: Path, workplace: Path) -> None:
    """The blocks of a page share one namespace; one with a title is written to the file that it names."""
    namespace: dict[str, object] = {"__name__": "__page__"}
    for block in blocks(page):
        if block.language == "python" and block.title:
            (workplace / block.title).write_text(block.text)
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)


def commands(page: Path) -> Iterator[list[str]]:
    """The commands in a page's bash blocks, and those named in its prose, as words."""
    for block in blocks(page):
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words
    for inline in re.findall(r"`((?:make|fastvideo) [a-z][^`]*)`", prose(page)):
        yield shlex.split(inline)


def make_targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def help_of(arguments: tuple[str, ...], cache: dict[tuple[str, ...], str] = {}) -> str:  # noqa: B006
    """What ``fastvideo ARGUMENTS --help`` prints."""
    if arguments not in cache:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*arguments, "--help"])
        cache[arguments] = printed.getvalue()
    return cache[arguments]


def known_flags(verb: str, config: str = RECIPE) -> set[str]:
    """The flags of a verb; for ``distill`` and ``plan`` those of a config too."""
    pages = [help_of((verb,))]
    if verb in ("distill", "plan"):
        pages.append(help_of(("distill", "--config", str(ROOT / config))))
    return {flag for text in pages for flag in re.findall(r"--[a-z0-9][a-z0-9.-]*", text)}


def check_command(words: list[str]) -> None:
    """Fail if a command names a target, verb, flag or file that does not exist."""
    program, *rest = words
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        assert set(targets) <= make_targets(), f"make {targets}"
    entry = "distill" if "fastvideo/training/distillation.py" in rest else None
    if program == "fastvideo":
        assert rest[0] in VERBS, f"fastvideo {rest[0]}"
        entry = rest[0]
    if entry:
        own = {word.split("=")[0] for word in rest if word.startswith("--")} - {"--nproc-per-node", "--help"}
        config = next((file for flag, file in pairwise(rest) if flag == "--config" and file.startswith(OURS)), RECIPE)
        assert own <= known_flags(entry, config), f"unknown flags {own - known_flags(entry, config)}"
    for word in rest:
        if word.startswith(OURS) and "." in Path(word).name:
            assert (ROOT / word).exists(), f"{word} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    for words in commands(page):
        check_command(words)


def test_a_wrong_command_is_found() -> None:
    for wrong in ("make coffee", "fastvideo brew", "fastvideo list --coffee", "bash examples/no.sh"):
        with pytest.raises(AssertionError):
            check_command(shlex.split(wrong))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(EXTERNAL):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{name_of(page)} links to {target}"


def named_entries() -> dict[str, list[str]]:
    """Entries of the page on troubleshooting that messages name, with the files of those messages."""
    found: dict[str, list[str]] = {}
    for source in sorted((ROOT / "fastvideo").rglob("*.py")):
        if "tests" not in source.parts:
            for anchor in re.findall(r"\bsee\(['\"]([\w-]+)['\"]\)", source.read_text(encoding="utf-8")):
                found.setdefault(anchor, []).append(name_of(source))
    return found


def test_messages_name_entries_of_troubleshooting_that_exist() -> None:
    """And every entry about a message is named by one."""
    page = ROOT / "docs" / "troubleshooting.md"
    entries = {
        re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^### (.+)$", prose(page), re.M)
    }
    assert set(named_entries()) == entries
    assert see("a-quote-is-not-closed") == " (see docs/troubleshooting.md#a-quote-is-not-closed)"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation


def package_folders() -> list[Path]:
    """The folders of the package that hold code; of the tests the topmost alone."""
    tests = ROOT / "fastvideo" / "tests"
    folders = {source.parent for source in (ROOT / "fastvideo").rglob("*.py")}
    return sorted(folder for folder in folders if tests not in folder.parents)


@pytest.mark.parametrize("folder", package_folders(), ids=name_of)
def test_folder_has_readme(folder: Path) -> None:
    """Each says on one screen what is here, where to start and what may not come in."""
    assert 5 <= len((folder / "README.md").read_text(encoding="utf-8").splitlines()) <= 15


@pytest.mark.parametrize("folder", package_folders(), ids=name_of)
def test_readme_names_files_that_exist(folder: Path) -> None:
    """A name in backticks that ends in .py or / is one of this folder, of the package or of the repository."""
    for name in re.findall(r"`([\w./]+(?:\.py|/))`", (folder / "README.md").read_text(encoding="utf-8")):
        beside = (folder / name).exists() or (ROOT / name).exists()
        assert beside or list((ROOT / "fastvideo").rglob(name)), f"{name_of(folder)}/README.md names {name}"
