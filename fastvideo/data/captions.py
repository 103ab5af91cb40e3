"""A folder of videos and their captions: from one file, or from a ``.txt`` beside each video."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastvideo.data.caption_files import READERS, NoCaptionsError, read_captions
from fastvideo.data.stills import IMAGE_SUFFIXES, is_image
from fastvideo.errors import UserError
from fastvideo.texts import read_text, same_name, shown_name
from fastvideo.wording import did_you_mean, see

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".gif", ".mkv", ".avi", ".m4v", *IMAGE_SUFFIXES)
"""Videos, and images, which are videos of one frame."""
CAPTION_FILES = (
    ("captions.csv", "captions.jsonl", "captions.json", "captions.tsv"),
    ("metadata.csv", "metadata.jsonl", "metadata.json", "metadata.tsv"),
    ("videos2caption.json",),
)
"""Default caption files, in the folder of videos; the first group that is there counts."""
POSTER = "an image beside a video of the same name is its poster: name it in a caption file to take it as data"
SHOWN = 3
"""Most wrong entries in a message."""


@dataclass(frozen=True)
class Video:
    """A file, its name relative to the folder (with ``/``), and its caption or the reason for having none."""

    path: Path
    name: str
    caption: str = ""
    problem: str | None = None


def find_videos(folder: Path, captions: Path | None = None, seed: int = 0) -> list[Video]:
    """All videos in ``folder`` and below, by name, each with its caption.

    Args:
        folder: searched with its subfolders, and with the folders that links lead to.
        captions: a file that :data:`READERS` knows. Default: one of :data:`CAPTION_FILES` in the folder, else a
            ``.txt`` beside each video.
        seed: of the choice among several captions of a video.

    Raises:
        UserError: if there is no video, none has a caption, or the caption file is not readable, names a video twice or
            an absent one.
    """
    paths, files = video_files(folder)
    videos = _with_captions(captions or _caption_file(folder), captions is None, seed, paths, files, folder)
    if all(video.problem for video in videos):
        own = next((video for video in videos if video.problem != POSTER), videos[0])
        found = f"{own.problem}{_texts_found(folder, files)}"
        raise UserError(f"none of {len(videos)} videos has a caption: {found}{see('no-video-has-a-caption')}")
    return sorted([*videos, *_lost_folders(folder, files)], key=lambda video: video.name)


def _with_captions(
    source: Path | None, default: bool, seed: int, paths: dict[str, Path], files: list[Path], folder: Path
) -> list[Video]:
    """Videos with the captions of ``source``, or of the text files beside them.

    A default file without captions, such as a camera's ``metadata.csv``, is no caption file if there are text files.
    """
    if source is None:
        return _with_sidecars(paths, files)
    try:
        texts = _by_video(source, seed, paths, folder)
    except NoCaptionsError:
        videos = _with_sidecars(paths, files)
        if default and source.name in CAPTION_FILES[1] and any(video.caption for video in videos):
            return videos
        raise
    return [_captioned(paths[name], name, texts.get(name, ""), source) for name in sorted(paths)]


def _lost_folders(folder: Path, files: list[Path]) -> list[Video]:
    """Links without a suffix that lead nowhere: those to folders of a disk that is not mounted."""
    lost = [path for path in files if not path.suffix and path.name[0] != "." and path.is_symlink()]
    return [Video(path, shown_name(str(path.relative_to(folder))), problem=_lost(path)) for path in lost if _lost(path)]


def video_files(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Videos in ``folder`` and below, by name, and all files there.

    Raises:
        UserError: if there is no such folder, or no video in it.
    """
    if not folder.is_dir():
        raise UserError(f"video folder {str(folder)!r} {'is not a folder' if folder.exists() else 'does not exist'}")
    files = sorted(_files_below(folder))
    paths = {shown_name(str(PurePosixPath(path.relative_to(folder)))): path for path in files if _is_video(path)}
    if not paths:
        raise UserError(f"no video in {str(folder)!r}; files named {', '.join('*' + s for s in VIDEO_SUFFIXES)} count")
    return paths, files


def _files_below(folder: Path) -> Iterator[Path]:
    """Files in a folder and below, each real folder once: linked ones after those that are really there."""
    waiting, seen = [folder], set()
    while waiting:
        start = waiting.pop(0)
        for parent, folders, names in os.walk(start, onerror=_refuse_unreadable):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders.sort()
            waiting += [Path(parent, name) for name in folders if os.path.islink(os.path.join(parent, name))]
            yield from (Path(parent, name) for name in names)


def _refuse_unreadable(error: OSError) -> None:
    raise UserError(f"video folder {error.filename!r}: {error.strerror}") from error


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and path.name[0] != "." and (path.is_file() or path.is_symlink())


def _caption_file(folder: Path) -> Path | None:
    for group in CAPTION_FILES:
        found = [name for name in group if (folder / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{folder} has {' and '.join(found)}: name one of them with --captions")
        if found:
            return folder / found[0]
    return None


def _texts_found(folder: Path, files: list[Path]) -> str:
    """End of a message: files in the folder that may hold captions."""
    kinds = (".txt", *READERS)
    texts = [shown_name(str(path.relative_to(folder))) for path in files if path.suffix.lower() in kinds]
    if not texts:
        return ""
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return f". The folder has {', '.join(texts[:SHOWN])}{more}: a file with all captions is given with --captions"


def _with_sidecars(paths: dict[str, Path], files: list[Path]) -> list[Video]:
    """Videos with the captions of the text files beside them, whose names may spell accents in another way."""
    texts = {same_name(str(path.with_suffix(".txt"))): path for path in files if path.suffix.lower() == ".txt"}
    moving = {same_name(str(path.with_suffix(""))) for path in paths.values() if not is_image(path)}
    videos = []
    for name, path in sorted(paths.items()):
        if is_image(path) and same_name(str(path.with_suffix(""))) in moving:
            videos.append(Video(path, name, problem=POSTER))
            continue
        wanted = path.with_suffix(".txt")
        text = wanted if wanted.is_file() else texts.get(same_name(str(wanted)), wanted)
        videos.append(_with_sidecar(path, name, text))
    return videos


def _with_sidecar(path: Path, name: str, text: Path) -> Video:
    if problem := _lost(path):
        return Video(path, name, problem=problem)
    if not text.is_file():
        return Video(path, name, problem=f"no caption: {shown_name(text.name)} does not exist")
    try:
        caption = " ".join(read_text(text, f"caption {shown_name(text.name)}").split())
    except UserError as error:
        return Video(path, name, problem=str(error))
    return Video(path, name, caption, None if caption else f"no caption: {shown_name(text.name)} is empty")


def _lost(path: Path) -> str | None:
    return None if path.exists() else f"a link to {os.readlink(path)}, which does not exist"


def _captioned(path: Path, name: str, caption: str, source: Path) -> Video:
    problem = _lost(path) or (None if caption else f"no caption in {source.name}")
    return Video(path, name, caption, problem)


def _by_video(source: Path, seed: int, paths: dict[str, Path], folder: Path) -> dict[str, str]:
    """Captions by the videos' names.

    Raises:
        UserError: if the file names absent videos, or a video by two names.
    """
    places = _Places(paths, folder, source)
    written: dict[str, str] = {}
    captions: dict[str, str] = {}
    absent = []
    for name, caption in read_captions(source, seed).items():
        video = places.find(name)
        if video is None:
            absent.append(name)
        elif video in written:
            raise UserError(f"caption file {source}: {written[video]!r} and {name!r} are the same video, {video}")
        else:
            written[video], captions[video] = name, caption
    if absent:
        more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
        named = ", ".join(map(repr, absent[:SHOWN]))
        near = did_you_mean(absent[0], paths)
        more += f" not found in {folder} (names are relative to it{near})"
        raise UserError(f"caption file {source}: {named}{more}{see('a-video-of-the-caption-file-is-not-found')}")
    return captions


class _Places:
    """Finds the video that a caption file means: its names come from other systems and start at other folders."""

    def __init__(self, paths: dict[str, Path], folder: Path, source: Path) -> None:
        self.names = {same_name(name): name for name in paths} | {name: name for name in paths}
        self.bases = [str(base.absolute()) for base in (folder, source.parent, Path())]
        self.absolute: dict[str, str] = {}
        self.ends: dict[str, list[str]] = {}
        for name, path in paths.items():
            for place in (os.path.realpath(path), os.path.abspath(path)):
                self.absolute[same_name(place)] = name
            self.ends.setdefault(same_name(path.name), []).append(name)

    def find(self, written: str) -> str | None:
        r"""Name of the video, as written or with ``/`` for ``\``; ``None`` if there is none."""
        for name in (written, written.replace("\\", "/")):
            if found := self.names.get(name) or self._normal(same_name(os.path.normpath(name))):
                return found
        return None

    def _normal(self, name: str) -> str | None:
        """The video at a path below the folder, the caption file or the working folder, or with that end."""
        for base in self.bases:
            place = os.path.normpath(os.path.join(base, name))
            if found := self.absolute.get(place) or self.absolute.get(same_name(os.path.realpath(place))):
                return found
        ends = self.ends.get(name.rpartition("/")[2], ())
        found = [end for end in ends if same_name(f"/{end}").endswith(f"/{name}")]
        return found[0] if len(found) == 1 else None
