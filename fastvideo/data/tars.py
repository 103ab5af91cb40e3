"""WebDataset's tar shards: the files of a sample share a key, such as ``00001.latent.pth`` and ``00001.txt``.

A shard is indexed once: keys, captions, and place, shape and dtype of each tensor, kept in the cache. A sample is then
read by its place, from a local file or a bucket, so that the order is the same as for Parquet, and so is resuming.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fastvideo.data.caption_files import CAPTION_KEYS
from fastvideo.data.fits import sample_shape
from fastvideo.data.index import TAR, FileIndex, Kind, TensorIndex
from fastvideo.data.schema import DTYPES, LATENT, TEXT, Floats, floats
from fastvideo.data.stored import Sample, StoredSource
from fastvideo.errors import UserError
from fastvideo.files import make_folder, replacing
from fastvideo.storage import Place, RangeFile, Remote, cache_folder, files_below, is_file, place, state_of
from fastvideo.texts import decoded

FORMAT = 1
"""Increase it when an index of the same shard changes."""
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
"""Key and extension of a member, as WebDataset divides them."""
ALIASES = {
    LATENT: (LATENT, "latent", "latents"),
    TEXT: (TEXT, "text_embeddings", "txt_emb", "text_emb", "embed", "embeds", "prompt_embeds"),
}
"""Names of a tensor's files; any other tensor has its own name."""
TENSORS, TEXTS = ("npy", "pth", "pt"), ("txt", "caption.txt", "prompt.txt", "text.txt")
READ_AHEAD = 2**18
"""Bytes that are fetched at once from a bucket while a shard is indexed."""
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Member:
    """Place of a tensor in its shard: offset and size in bytes, and what is there."""

    offset: int
    size: int
    form: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class TarSample:
    """The files of one key."""

    key: str
    caption: str | None
    tensors: Mapping[str, Member]


@dataclass(frozen=True)
class TarFile(FileIndex):
    """One shard."""

    samples: tuple[TarSample, ...] = ()


class TarSource(StoredSource):
    """The samples of tar shards; every sample is a block of its own, so an epoch is shuffled as a whole."""

    def _paths(self, path: str) -> Sequence[Place]:
        root = place(path)
        return [root] if is_file(root) else files_below(root, TAR)

    def _index(self, file: Place, optional: Sequence[str]) -> TarFile:
        samples = indexed(file)
        if not samples:
            raise UserError(f"{file} holds no sample")
        found = {name for sample in samples for name in sample.tensors}
        for name in self.wanted.required:
            if name not in found:
                raise UserError(f"{file}: no {name} in it; one is expected as KEY.{_spellings(name)}")
        names = [*self.wanted.required, *(name for name in optional if name in found)]
        return TarFile(file, (len(samples),), {name: _tensor_index(name, samples) for name in names}, {}, samples)

    def _blocks(self) -> None:
        return None

    def _window(self, buckets: int) -> int:
        return 1

    def captions(self) -> list[str]:
        captions: list[str] = []
        for file in self.files:
            for row, sample in enumerate(_samples(file)):
                if sample.caption is None:
                    error = UserError(f"{file.path}, key {sample.key!r}: no caption (.txt, or .json with 'caption')")
                    self.faults.record(file.path, row, error)
                else:
                    captions.append(sample.caption)
        return captions

    def _load(self, number: int, file: FileIndex, row: int) -> Sample:
        sample = _samples(file)[row]
        wanted = {name: sample.tensors[name] for name in self.names}
        data = _read(file.path, list(wanted.values()))
        arrays = {
            name: self._array(name, file, sample.key, member, data[member.offset]) for name, member in wanted.items()
        }
        return Sample(file, sample.caption or "", arrays)

    def _array(self, name: str, file: FileIndex, key: str, member: Member, data: bytes) -> Floats:
        shape = sample_shape(name, (member.shape, member.dtype), self.wanted)
        try:
            if member.form == "npy":
                return floats(data, shape, member.dtype)
            return _load_tensor(data).float().numpy().reshape(shape)
        except DAMAGED as error:
            raise UserError(f"{file.path}, key {key!r}: {name} is damaged ({error})") from error


DAMAGED = (ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)
"""Errors that the bytes of a damaged tensor raise."""


def _samples(file: FileIndex) -> tuple[TarSample, ...]:
    assert isinstance(file, TarFile)
    return file.samples


def _spellings(name: str) -> str:
    return f"{{{','.join(ALIASES.get(name, (name,)))}}}.{{{','.join(TENSORS)}}}"


def _tensor_index(name: str, samples: Sequence[TarSample]) -> TensorIndex:
    kinds: dict[Kind, int] = {}
    codes = np.full(len(samples), -1, dtype=np.int64)
    for row, sample in enumerate(samples):
        if name in sample.tensors:
            member = sample.tensors[name]
            codes[row] = kinds.setdefault((member.shape, member.dtype), len(kinds))
    return TensorIndex(tuple(kinds), codes)


def _read(file: Place, members: Sequence[Member]) -> dict[int, bytes]:
    """Bytes of members by offset; of a remote file in one request if they lie together."""
    if not members:
        return {}
    begin, end = min(m.offset for m in members), max(m.offset + m.size for m in members)
    if isinstance(file, Remote) and end - begin <= 2 * sum(m.size for m in members):
        whole = memoryview(file.read_bytes(begin, end))
        return {m.offset: bytes(whole[m.offset - begin : m.offset - begin + m.size]) for m in members}
    if isinstance(file, Remote):
        return {m.offset: file.read_bytes(m.offset, m.offset + m.size) for m in members}
    with file.open("rb") as stream:
        return {m.offset: _at(stream, m.offset, m.size) for m in members}


def _at(stream: IO[bytes], offset: int, size: int) -> bytes:
    stream.seek(offset)
    return stream.read(size)


def indexed(file: Place) -> tuple[TarSample, ...]:
    """The samples of a shard, from the cache if it was indexed before.

    Raises:
        UserError: with shard and key, if the shard is cut off, a key has two files of one kind, or one is damaged.
    """
    key = hashlib.sha256(f"{FORMAT} {state_of(file)}".encode()).hexdigest()
    kept = cache_folder() / "tars" / f"{key}.json"
    if kept.is_file():
        return tuple(map(_sample_of, json.loads(kept.read_bytes())))
    with _opened(file) as stream:
        samples = list(_scan(file, stream))
    make_folder(kept.parent)
    with replacing(kept) as temporary:
        temporary.write_text(json.dumps([_json_of(sample) for sample in samples]), encoding="utf-8")
    return tuple(samples)


def _opened(file: Place) -> IO[bytes]:
    return file.open("rb") if isinstance(file, Path) else io.BufferedReader(RangeFile(file), READ_AHEAD)


def _json_of(sample: TarSample) -> list[Any]:
    tensors = {n: [m.offset, m.size, m.form, list(m.shape), m.dtype] for n, m in sample.tensors.items()}
    return [sample.key, sample.caption, tensors]


def _sample_of(entry: Sequence[Any]) -> TarSample:
    key, caption, tensors = entry
    members = {name: Member(o, s, form, tuple(shape), dtype) for name, (o, s, form, shape, dtype) in tensors.items()}
    return TarSample(key, caption, members)


def _scan(file: Place, stream: IO[bytes]) -> Iterator[TarSample]:
    """Samples in the order of their keys' first files."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for key, extension, offset, size in _members(file, stream):
        if extension in found.setdefault(key, {}):
            raise UserError(f"{file}, key {key!r}: .{extension} is there twice")
        found[key][extension] = (offset, size)
    for key, files in found.items():
        tensors: dict[str, Member] = {}
        for extension, (offset, size) in files.items():
            name = _tensor_name(extension)
            if name is not None and name in tensors:
                raise UserError(f"{file}, key {key!r}: two files hold its {name}")
            if name is not None:
                tensors[name] = _member(file, key, extension, offset, _at(stream, offset, size))
        yield TarSample(key, _caption(file, key, files, stream), tensors)


def _members(file: Place, stream: IO[bytes]) -> Iterator[tuple[str, str, int, int]]:
    """Key, extension, offset and size of every file in a shard, which must have its end."""
    total, end = stream.seek(0, io.SEEK_END), 0
    stream.seek(0)
    last = "its first"
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if end > total:
                    raise UserError(f"{file} is cut off in {member.name!r}")
                last = f"{member.name!r}"
                name = NAME.fullmatch(member.name) if member.isfile() else None
                if name:
                    yield name[1], name[2], member.offset_data, member.size
    except tarfile.TarError as error:
        raise UserError(f"{file} is no whole tar file after {last} ({error})") from error
    if end + BLOCK > total:
        raise UserError(f"{file} is cut off after {last}: the end of a tar file is missing")


def _tensor_name(extension: str) -> str | None:
    stem, _, form = extension.rpartition(".")
    if form not in TENSORS:
        return None
    if not stem:
        return LATENT
    return next((name for name, spellings in ALIASES.items() if stem in spellings), stem)


def _member(file: Place, key: str, extension: str, offset: int, data: bytes) -> Member:
    """Read shape and dtype of a tensor.

    Raises:
        UserError: with shard and key, if it is damaged or of another dtype.
    """
    try:
        if extension.endswith("npy"):
            return _numpy_member(offset, data)
        tensor = _load_tensor(data)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"it is {dtype}, one of {', '.join(DTYPES)} is expected")
        return Member(offset, len(data), "pth", tuple(tensor.shape), dtype)
    except DAMAGED as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}, key {key!r}: .{extension} cannot be read: {why}") from error


def _numpy_member(offset: int, data: bytes) -> Member:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read(stream)
    names = {kind: name for name, kind in DTYPES.items() if name != "bfloat16"}
    if columns_first or dtype not in names:
        raise ValueError(f"it is {dtype}, {' or '.join(names.values())} in C order is expected")
    begin = stream.tell()
    if len(data) - begin != dtype.itemsize * int(np.prod(shape)):
        raise ValueError(f"{len(data) - begin} bytes for shape {list(shape)} of {dtype}")
    return Member(offset + begin, len(data) - begin, "npy", tuple(shape), names[dtype])


def _load_tensor(data: bytes) -> Tensor:
    """A tensor as ``torch.save`` writes it; nothing but tensors is unpickled."""
    value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(value, Tensor):
        raise ValueError(f"it holds a {type(value).__name__}, one tensor is expected")
    return value.detach().contiguous()


def _caption(file: Place, key: str, files: Mapping[str, tuple[int, int]], stream: IO[bytes]) -> str | None:
    try:
        for extension in TEXTS:
            if extension in files:
                text = decoded(_at(stream, *files[extension]), f"{file}, key {key!r}: .{extension}")
                return " ".join(text.split())
        if "json" in files:
            values = json.loads(decoded(_at(stream, *files["json"]), f"{file}, key {key!r}: .json"))
            return _text_of(next((values[name] for name in CAPTION_KEYS if name in values), None))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}, key {key!r}: its caption cannot be read ({error})") from error
    return None


def _text_of(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"it is a {type(value).__name__}, a text is expected")
