"""Memory of a validation of eight prompts on fake CUDA tensors, beside that of decoding one: 480x832, 9 frames."""

from __future__ import annotations

import json

from fastvideo.tests.fake_cuda import validate


def measured() -> dict[str, object]:
    """``validation_peak_over_decode``: at most 1 where nothing but one decoding is in memory at a time."""
    found = validate("wan2.1_t2v_1.3b_dmd2", prompts=8, frames=9)
    return {"validation_peak_over_decode": round(found["peak"] / found["decode"], 3)}


if __name__ == "__main__":
    print(json.dumps(measured()))
