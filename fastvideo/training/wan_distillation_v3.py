"""The training entry with the model fixed to Wan."""

from __future__ import annotations

from fastvideo.entry import end_process
from fastvideo.training.distillation import guarded

if __name__ == "__main__":
    end_process(guarded(model="wan"))
