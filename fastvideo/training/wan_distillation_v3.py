"""The training entry with the model fixed to Wan."""

from __future__ import annotations

from fastvideo.training.distillation import guarded

if __name__ == "__main__":
    raise SystemExit(guarded(model="wan"))
