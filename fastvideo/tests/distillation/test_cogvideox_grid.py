"""Rectified-flow time and CogVideoX's timesteps: one-to-one on the table, smooth between, exact at both ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo.distillation.adapters.cogvideox import CogVideoXAdapter
from fastvideo.distillation.adapters.diffusers.discrete_vp import NoiseGrid
from fastvideo.distillation.adapters.export.discrete_vp import euler_scheduler
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.tiny import COGVIDEOX_5B, cogvideox_config, cogvideox_folder

CLASS = "CogVideoXDDIMScheduler"
SCHEDULER: dict[str, Any] = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.fixture(params=[1.0, 3.0])
def grid(request: pytest.FixtureRequest) -> NoiseGrid:
    return NoiseGrid({**SCHEDULER, "snr_shift_scale": request.param, "timestep_spacing": "trailing"}, CLASS)


def test_every_timestep_is_found_again_from_its_time(grid: NoiseGrid) -> None:
    assert torch.equal(grid.timestep(grid.times.float()), torch.arange(1000.0))


def test_pure_noise_is_the_last_timestep_and_nothing_is_below_the_first(grid: NoiseGrid) -> None:
    assert grid.times[-1] == 1.0
    assert grid.alphas_cumprod[-1] == 0.0
    assert grid.timestep(torch.tensor([0.0, 0.01, float(grid.times[0]), 1.0])).tolist() == [0.0, 0.0, 0.0, 999.0]


def test_a_time_between_two_timesteps_is_a_fraction(grid: NoiseGrid) -> None:
    t = grid.times[500] + 0.25 * (grid.times[501] - grid.times[500])
    assert float(grid.timestep(t[None].float())) == pytest.approx(500.25, abs=1e-2)
    everywhere = grid.timestep(torch.linspace(0, 1, 5001))
    assert (everywhere.diff() >= 0).all()
    assert everywhere.shape == (5001,)
    assert grid.timestep(torch.full((2, 3), 0.5)).shape == (2, 3)


def test_the_derivative_is_there_on_the_table_too(grid: NoiseGrid) -> None:
    middle, step = float(grid.times[500]), float(grid.times[501] - grid.times[499]) / 2
    for offset in (0.0, 0.3 * step):
        t = torch.tensor([middle + offset], requires_grad=True)
        (slope,) = torch.autograd.grad(grid.timestep(t).sum(), t)
        assert float(slope) == pytest.approx(1 / step, rel=0.02)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_a_teacher_is_called_where_its_scheduler_calls_it(tiny_wan: Path, spacing: str, steps: int) -> None:
    from diffusers import CogVideoXDDIMScheduler

    folder = cogvideox_folder(tiny_wan.parent, COGVIDEOX_5B, 1.0, spacing)
    adapter = CogVideoXAdapter(cogvideox_config(folder))
    scheduler = CogVideoXDDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(steps)
    expected = scheduler.timesteps.tolist() if steps > 1 else [999]
    times = torch.tensor(adapter.folder.teacher_times(steps))
    assert CogVideoXAdapter.network_time(times, adapter.config).tolist() == expected


def test_a_spacing_that_misses_pure_noise_is_refused() -> None:
    with pytest.raises(UserError, match="timestep_spacing 'leading' starts at 750"):
        NoiseGrid({**SCHEDULER, "timestep_spacing": "leading"}, CLASS).teacher_timesteps(4)


def test_the_other_scheduler_of_the_published_pipelines_has_the_same_table(grid: NoiseGrid) -> None:
    """CogVideoX 1.5 comes with the DPM scheduler."""
    from diffusers import CogVideoXDPMScheduler

    other = NoiseGrid(
        dict(CogVideoXDPMScheduler(**{**SCHEDULER, "snr_shift_scale": grid.config["snr_shift_scale"]}).config), CLASS
    )
    assert torch.equal(other.times, grid.times)
    assert type(euler_scheduler(other, 4)).__name__ == "CogVideoXDDIMScheduler"


@pytest.mark.parametrize("wrong", [{"prediction_type": "epsilon"}, {"rescale_betas_zero_snr": False}])
def test_another_kind_of_scheduler_is_refused(wrong: dict[str, Any], tiny_wan: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(cogvideox_folder(tiny_wan.parent), folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    with pytest.raises(UserError, match=r"epsilon|has prediction_type v_prediction and rescale_betas_zero_snr true"):
        CogVideoXAdapter(cogvideox_config(folder)).folder.teacher_times(4)
