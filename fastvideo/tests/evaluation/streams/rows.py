"""Figures of made-up streams, for pages: models whose course is a straight line."""

from __future__ import annotations

import torch

from fastvideo.evaluation.evaluate import Evaluation
from fastvideo.evaluation.statistics import Estimate
from fastvideo.evaluation.streams.measure import StreamRow
from fastvideo.evaluation.streams.motion import window_starts
from fastvideo.evaluation.streams.series import Series
from fastvideo.tests.evaluation.streams.scenes import real

FRAMES = 129
STARTS = window_starts(FRAMES, 16)
SETTINGS = {"frames": FRAMES, "prompts": 128, "switches": 64, "seed": 0, "split": "heldout", "prompts_sha256": "f00"}


def line(first: float, last: float, at: tuple[int, ...] = STARTS, width: float = 0.05) -> Series:
    """A straight course with an interval of ``width`` to both sides."""
    values = torch.linspace(first, last, len(at), dtype=torch.float64)
    return Series(at, values, values + width * torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None], 128)


def stream_row(drift: float, kind: str, calls: int, steps: int) -> StreamRow:
    """A row whose accuracies fall and whose distances rise by ``drift``, from first to last."""
    frames = tuple(range(FRAMES))
    series = {
        **{name: line(1.0, 1.0 - drift) for name in ("digit", "colour", "direction", "speed")},
        "frechet": line(12, 12 + 100 * drift, width=3.0),
        "turn": line(0, 90 * drift),
        "frozen": line(0.0, drift),
        "runaway": line(0.0, drift / 2),
        "identity": line(1.0, 1 + drift, STARTS[1:]),
        "ink": line(0.05, 0.05 + 0.1 * drift, frames, 0.005),
        "saturation": line(0.7, 0.7 + drift / 4, frames),
        **{f"{name}_bias": line(0.0, 10 * drift, STARTS[1:]) for name in ("frechet", "digit", "colour", "direction")},
        **{f"real_{name}": line(1.0, 1.0) for name in ("digit", "colour", "direction", "speed")},
        "real_frechet": line(10, 10, width=2.0),
        "real_ink": line(0.05, 0.05, frames, 0.005),
    }
    never = Estimate(float("inf"), 30.0, float("inf"), 64)
    figures: dict[str, Estimate | float] = {
        **{f"{name}_last": series[name][-1] for name in ("digit", "colour", "direction", "frechet", "speed")},
        **{f"{name}_last_floor": 0.99 for name in ("digit", "colour", "direction")},
        "frechet_last_floor": 10.0,
        "identity_last": series["identity"][-1],
        "ink_slope": series["ink"].slope,
        "saturation_slope": series["saturation"].slope,
        "seam_acceleration": Estimate(1 + drift, 1.0, 1 + 2 * drift, 128),
        "frechet_bias_last": series["frechet_bias"][-1],
        "switch_median": Estimate(9.0, 7.0, 11.0, 64),
        "switch_p90": never if drift > 0.3 else Estimate(13.0, 11.0, 15.0, 64),
        "switch_never": Estimate(drift / 3, 0.0, drift, 64),
        **{name: Estimate(0.97, 0.94, 1.0, 64) for name in ("kept_before", "kept_during", "kept_after", "continuous")},
    }
    return StreamRow(
        figures=figures,
        series=series,
        streaming={"chunk": 1, "window": 8, "sink": 1, "positions": "window"},
        samples=128,
        network_calls=calls,
        steps=steps,
        guidance=1.5 if kind == "teacher" else 1.0,
        sampler="euler" if kind == "teacher" else "renoise",
        denoise_seconds_per_video=0.05 * calls,
        end_to_end_seconds_per_video=0.05 * calls + 0.2,
        batch_size=64,
        kind=kind,
    )


def measured_streams(drift: float = 0.1, students: int = 1) -> Evaluation[StreamRow]:
    """A teacher and students that drift more and more, with three kept streams each."""
    videos, captions = real(3, FRAMES)
    rows = {"teacher": stream_row(0.02, "teacher", 50, 25)}
    names = ["outputs/self_forcing/student", "outputs/causvid/student"][:students]
    rows |= {name: stream_row(drift * (1 + 3 * number), "student", 4, 4) for number, name in enumerate(names)}
    return Evaluation(rows, dict.fromkeys(rows, videos), tuple(captions), SETTINGS)
