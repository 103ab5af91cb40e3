"""Tensors of a checkpoint: planned by torch's distributed checkpoint, stored as safetensors with a JSON index.

torch's own index is a pickle, which this project never loads. Here every process writes one safetensors file, and the
index holds type, shape and pieces of each tensor, so that any number of processes in any sharding can read it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ROOT = "all"
"""Key that the tensors are planned under; it does not appear in the files."""


@dataclass(frozen=True)
class Piece:
    """A box of a tensor in one file, under the name ``key``."""

    file: str
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """One whole tensor: type, shape and the pieces that make it up."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def empty(self) -> Tensor:
        """Memory for it on the CPU."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype))


Index = Mapping[str, Stored]


def index_text(index: Index) -> str:
    """An index as JSON."""
    return json.dumps({name: asdict(stored) for name, stored in sorted(index.items())}) + "\n"


def read_index(file: Path) -> dict[str, Stored]:
    """Inverse of :func:`index_text`."""
    return {name: _stored(**entry) for name, entry in json.loads(file.read_text(encoding="utf-8")).items()}


def _stored(dtype: str, shape: Sequence[int], pieces: Iterable[Mapping[str, Any]]) -> Stored:
    boxes = (Piece(p["file"], p["key"], tuple(p["offsets"]), tuple(p["sizes"])) for p in pieces)
    return Stored(dtype, tuple(shape), tuple(boxes))


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file in parts, straight from the tensors' own memory.

    Large elements first, so that every tensor starts at a multiple of its element's size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    end = 0
    for key, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[key] = {"dtype": SAFETENSORS_NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        if tensor.numel():
            yield memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class _PlannedByTorch:
    """Parts of torch's storage interface that leave a plan as it is."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class HostCopy(_PlannedByTorch, StorageWriter):
    """Copies this process's share of the tensors to host memory, where training no longer changes them.

    After :func:`copy_to_host`, ``tensors`` are the pieces for this process's file; ``index`` is the whole index, on the
    main process alone.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.tensors: dict[str, Tensor] = {}
        self.index: dict[str, Stored] = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Copy every piece that the plan gives to this process."""
        results = []
        for item in plan.items:
            tensor = planner.resolve_data(item)
            if not isinstance(tensor, Tensor) or item.tensor_data is None:
                raise TypeError(f"{item.index.fqn} is no tensor: only tensors are planned")
            chunk, name = item.tensor_data.chunk, item.index.fqn.removeprefix(f"{ROOT}.")
            key = f"{name}@{','.join(map(str, chunk.offsets))}" if any(chunk.offsets) else name
            self.tensors[key] = tensor.detach().to("cpu", copy=True)
            piece = Piece(self.file, key, tuple(chunk.offsets), tuple(chunk.sizes))
            results.append(WriteResult(item.index, tensor.nbytes, piece))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Build the index on the main process, from the copies of all processes."""
        pieces: dict[str, list[Piece]] = {}
        for result in (result for of_process in results for result in of_process):
            pieces.setdefault(result.index.fqn, []).append(result.storage_data)
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise TypeError(f"{name} is no tensor: only tensors are planned")
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            self.index[name.removeprefix(f"{ROOT}.")] = Stored(dtype, tuple(entry.size), tuple(pieces[name]))


class PieceReader(_PlannedByTorch, StorageReader):
    """Reads the pieces that a plan asks for from the safetensors files of one checkpoint."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in torch's form."""
        tensors: dict[str, Any] = {}
        pieces: dict[MetadataIndex, Piece] = {}
        for name, stored in self.index.items():
            chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in stored.pieces]
            properties = TensorProperties(dtype=getattr(torch, stored.dtype))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
            pieces |= {MetadataIndex(name, torch.Size(p.offsets)): p for p in stored.pieces}
        return Metadata(tensors, storage_data=pieces)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every asked box into its place."""
        pieces = self.read_metadata().storage_data
        per_file: dict[str, list[tuple[Piece, Any]]] = {}
        for request in plan.items:
            piece = pieces[MetadataIndex(request.storage_index.fqn, request.storage_index.offset)]
            per_file.setdefault(piece.file, []).append((piece, request))
        for file, wanted in per_file.items():
            with safe_open(self.folder / file, "pt") as opened:
                for piece, request in wanted:
                    boxes = zip(request.storage_offsets, request.lengths, strict=True)
                    box = tuple(slice(begin, begin + length) for begin, length in boxes)
                    source = opened.get_slice(piece.key)[box] if box else opened.get_tensor(piece.key)
                    target = planner.resolve_tensor(request)
                    target.detach().copy_(source)
                    planner.commit_tensor(request, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def copy_to_host(tensors: Mapping[str, Tensor], writer: HostCopy) -> None:
    """Copy each tensor to the host of one process (a replicated tensor once); a collective."""
    planner = DefaultSavePlanner(flatten_sharded_tensors=False)
    with _quiet_alone():  # under one key: torch logs every top-level entry, which takes longer than copying it
        save({ROOT: dict(tensors)}, storage_writer=writer, planner=planner, no_dist=not dist.is_initialized())


def read_into(tensors: Mapping[str, Tensor], folder: Path, index: Index, *, alone: bool = False) -> None:
    """Fill tensors in place, each process its own shards; a collective unless ``alone``."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = PieceReader(folder, index)
    with _quiet_alone():
        load(dict(tensors), storage_reader=reader, planner=planner, no_dist=alone or not dist.is_initialized())


@contextmanager
def _quiet_alone() -> Iterator[None]:
    """Silence torch's warning about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
