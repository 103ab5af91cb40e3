"""Damage to a complete checkpoint: every file, every kind, at places that a seed draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastvideo.distillation.engine.checkpoint.restore import newest
from fastvideo.distillation.engine.parallel.distributed import Processes

KINDS = ("bit flip", "truncation", "missing", "grown", "zeroed")


@dataclass(frozen=True)
class Damage:
    """One change of one file."""

    file: Path
    kind: str
    place: float
    """Where in the file, from 0 to 1."""
    bit: int

    def content(self, before: bytes) -> bytes | None:
        """What the file holds afterwards; ``None`` if it is gone."""
        at = min(int(self.place * len(before)), len(before) - 1)
        if self.kind == "bit flip":
            return before[:at] + bytes([before[at] ^ (1 << self.bit)]) + before[at + 1 :]
        if self.kind == "zeroed":
            return before[:at] + bytes(len(before) - at)
        return {"truncation": before[:at], "grown": before + b"\0", "missing": None}[self.kind]


def damages(checkpoint: Path, count: int, seed: int = 0) -> Iterator[Damage]:
    """Changes of every file in turn, mostly single bits; none that leaves a file as it was."""
    draw = random.Random(seed)
    files = sorted(file for file in checkpoint.iterdir())
    for number in range(count):
        kind = "bit flip" if number % 2 else draw.choice(KINDS[1:])
        damage = Damage(files[(number // 2) % len(files)], kind, draw.random(), draw.randrange(8))
        unchanged = damage.content(damage.file.read_bytes()) == damage.file.read_bytes()
        yield Damage(damage.file, "missing", 0.0, 0) if unchanged else damage


def is_detected(damage: Damage) -> bool:
    """Whether the damaged checkpoint is passed over, by name, for an intact older one; the damage is undone again."""
    before, damaged = damage.file.read_bytes(), damage.file.parent
    content, passed_over = damage.content(before), list[str]()
    damage.file.unlink()
    if content is not None:
        damage.file.write_bytes(content)
    found = newest(damaged.parent, Processes(), passed_over.append)
    damage.file.write_bytes(before)
    return found not in (None, damaged) and len(passed_over) == 1 and str(damaged) in passed_over[0]
