"""Averages that are made after a run: the profiles' closed forms, what a run stores, and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.config.averages import PostHocConfig
from fastvideo.distillation.engine.ema import EMAHook, PowerAverages
from fastvideo.distillation.engine.optional import snapshots as module
from fastvideo.distillation.engine.optional.footprint import role_bytes
from fastvideo.distillation.engine.optional.profiles import DEFAULT_STDS, Profile, exponent_of, fit
from fastvideo.distillation.engine.optional.snapshots import (
    Snapshots,
    averaged,
    disk_bytes,
    distance,
    saved_step,
    snapshots_in,
)
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.training import attach_optimizer, tensors_of, training_of
from fastvideo.errors import RunError, UserError
from fastvideo.tests.distillation.toys import spy, toy_method

STAY, SKIP = torch.tensor(0.0), torch.tensor(1.0)
UPDATES = 120


@pytest.fixture
def student() -> RoleHandle:
    """A trained role with one weight, ``mean``."""
    method = toy_method("sft", spy(), mean=0.0, std=1.0)
    attach_optimizer(method.bundle["student"], method.optimizers(method.config)["student"])
    return method.bundle["student"]


def weight_after(update: int) -> float:
    """A trajectory with a trend and two oscillations."""
    return 1 - math.exp(-update / 30) + 0.3 * math.sin(update / 2) + 0.1 * math.cos(1.7 * update)


def exact(exponent: float, updates: int = UPDATES) -> float:
    """Integral of the profile over a trajectory that is constant between updates."""
    mass = [(u / updates) ** (exponent + 1) - ((u - 1) / updates) ** (exponent + 1) for u in range(1, updates + 1)]
    assert sum(mass) == pytest.approx(1)
    return sum(m * weight_after(u) for u, m in enumerate(mass, 1))


def std_of(exponent: float) -> float:
    """Relative standard deviation of a profile (equation 123)."""
    return float((exponent + 1) ** 0.5 / ((exponent + 2) * (exponent + 3) ** 0.5))


def set_weights(student: RoleHandle, value: float) -> None:
    for tensor in tensors_of(student).values():
        tensor.fill_(value)


def trained(student: RoleHandle, folder: Path, options: PostHocConfig, updates: int = UPDATES) -> Snapshots:
    """A run of the trajectory, whose other steps are of another role, to its end."""
    averages = EMAHook((), 0.0, student=PowerAverages(student, options.stds))
    hook = Snapshots(student, options, folder, Processes())
    set_weights(student, 50.0)  # initial weights, which leave no trace
    for update in range(1, updates + 1):
        set_weights(student, weight_after(update))
        averages.after_update(2 * update, ("student",), STAY)
        hook.after_step(2 * update, ("student",))
        for _ in range(update % 3):
            averages.after_update(2 * update + 1, ("critic",), STAY)
            hook.after_step(2 * update + 1, ("critic",))
    hook.finish()
    return hook


def test_a_profile_is_named_by_the_deviation_of_its_mass() -> None:
    """Equations 123 and 126, against the moments of ``u ** exponent`` on a fine grid."""
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for std in (0.02, 0.05, 0.1, 0.2, 0.28):
        exponent = exponent_of(std)
        assert std_of(exponent) == pytest.approx(std, rel=1e-9)
        mass = grid**exponent
        mean = (mass * grid).sum() / mass.sum()
        assert float(((mass * (grid - mean) ** 2).sum() / mass.sum()).sqrt()) == pytest.approx(std, rel=1e-5)
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert exponent_of(0.1) == pytest.approx(6.94, abs=0.01)


def test_what_a_run_keeps_is_the_integral_of_its_profile_over_the_updates(student: RoleHandle, tmp_path: Path) -> None:
    trained(student, tmp_path, PostHocConfig(stds=(0.05, 0.2)))
    powers = training_of(student).powers
    for std in (0.05, 0.2):
        for tensor in powers[f"{std:g}"].values():
            torch.testing.assert_close(tensor, torch.full_like(tensor, exact(exponent_of(std))), rtol=1e-5, atol=1e-6)


def test_a_skipped_update_changes_no_average_and_is_not_counted(student: RoleHandle) -> None:
    averages = PowerAverages(student, (0.05, 0.1))
    for update in range(1, 6):
        set_weights(student, weight_after(update))
        averages.after_update(STAY)
        before = {std: {n: t.clone() for n, t in one.items()} for std, one in training_of(student).powers.items()}
        set_weights(student, 77.0)
        averages.after_update(SKIP)
        after = training_of(student).powers
        assert all(torch.equal(before[std][name], after[std][name]) for std in before for name in before[std])


def test_any_average_comes_out_of_two_stored_ones(student: RoleHandle, tmp_path: Path) -> None:
    """Against the average that a run with this width would have kept."""
    trained(student, tmp_path, PostHocConfig(precision="float32"))
    for std in DEFAULT_STDS:
        tensors, found = averaged(tmp_path, Profile(UPDATES, std))
        expected = exact(exponent_of(std))
        assert found.error < (0.09 if std == 0.25 else 0.045), std
        assert all(float((tensor - expected).abs().max()) < 0.012 for tensor in tensors.values()), std
    assert abs(exact(exponent_of(0.03)) - exact(exponent_of(0.25))) > 0.05  # a difference that can be seen


def test_a_stored_average_is_taken_as_it_is(student: RoleHandle, tmp_path: Path) -> None:
    trained(student, tmp_path, PostHocConfig(precision="float32"))
    tensors, found = averaged(tmp_path, Profile(UPDATES, 0.1))
    assert (found.error, found.noise) == (0.0, 1.0)
    kept = training_of(student).powers["0.1"]
    assert tensors.keys() == kept.keys()
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)
    earlier = sorted({profile.update for profile in snapshots_in(tmp_path)})[-2]
    at = averaged(tmp_path, Profile(earlier, 0.075))[0]
    error = max(float((t - exact(exponent_of(0.075), earlier)).abs().max()) for t in at.values())
    assert error < 0.01


def test_half_precision_costs_its_rounding_alone(student: RoleHandle, tmp_path: Path) -> None:
    trained(student, tmp_path / "half", PostHocConfig())
    tensors, found = averaged(tmp_path / "half", Profile(UPDATES, 0.075))
    file = next(iter(snapshots_in(tmp_path / "half").values()))
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    for tensor in tensors.values():
        assert float((tensor - exact(exponent_of(0.075))).abs().max()) < 0.005 + found.noise * 2**-10


def test_more_snapshots_and_a_width_between_are_nearer() -> None:
    few, many = ([Profile(u, std) for u in range(s, 1001, s) for std in (0.05, 0.1)] for s in (125, 20))
    errors = [fit(few, Profile(1000, std)).error for std in (0.075, 0.15, 0.25)]
    assert errors == sorted(errors)
    better = [fit(many, Profile(1000, std)).error for std in (0.075, 0.15, 0.25)]
    assert all(one < other for one, other in zip(better, errors, strict=True))
    assert sum(fit(many, Profile(900, 0.15)).coefficients.values()) == pytest.approx(1)
    assert max(profile.update for profile in fit(many, Profile(900, 0.15)).coefficients) == 900


def test_error_and_noise_are_norms_of_what_is_missed_and_of_the_coefficients() -> None:
    """Against profiles on a fine grid of updates."""
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 1000

    def on_grid(profile: Profile) -> Tensor:
        exponent = exponent_of(profile.std)
        found = (exponent + 1) * (grid / profile.update) ** exponent / profile.update
        return found.where(grid < profile.update, 0.0)

    wanted = Profile(100, 0.15)
    found = fit([Profile(update, std) for update in (50, 100) for std in (0.05, 0.1)], wanted)
    missed = sum(on_grid(profile) * c for profile, c in found.coefficients.items()) - on_grid(wanted)
    assert found.error == pytest.approx(float(missed.norm() / on_grid(wanted).norm()), rel=1e-4)
    assert found.error > 0.01
    assert found.noise == pytest.approx(math.hypot(*found.coefficients.values()))


def test_snapshots_are_bounded_in_number_and_size(student: RoleHandle, tmp_path: Path) -> None:
    options = PostHocConfig(every=2, keep=5)
    for updates in range(1, 400):
        step = distance(updates, options)
        assert updates // step <= 5
        assert step == 2 or updates // (step // 2) > 5
    trained(student, tmp_path, options, 99)
    assert sorted({profile.update for profile in snapshots_in(tmp_path)}) == [32, 64, 96, 99]
    assert len(list(tmp_path.iterdir())) == 8
    assert all(saved_step(file) == 2 * profile.update for profile, file in snapshots_in(tmp_path).items())
    stored = sum(t.nbytes for file in snapshots_in(tmp_path).values() for t in load_file(file).values())
    assert stored == 8 * 2 * sum(t.numel() for t in tensors_of(student).values())
    assert disk_bytes(student, options) == stored // 8 * 2 * 6
    assert disk_bytes(student, None) == 0
    counted = role_bytes(student, 1, "float32").average
    assert counted == 2 * sum(t.nbytes for t in tensors_of(student).values()) + 4  # and the count of updates


def test_a_weight_that_float16_cannot_hold_ends_the_run_with_the_remedy(student: RoleHandle, tmp_path: Path) -> None:
    averages, hook = PowerAverages(student, (0.05, 0.1)), Snapshots(student, PostHocConfig(), tmp_path, Processes())
    set_weights(student, 1e6)
    averages.after_update(STAY)
    hook.after_step(1, ("student",))
    with pytest.raises(RunError, match=r"does not fit into float16; set ema\.post_hoc\.precision: float32"):
        hook.finish()
    assert snapshots_in(tmp_path) == {}


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize(("value", "shown"), [(math.nan, "NaN"), (math.inf, "infinite")])
def test_an_average_that_is_not_finite_is_said_to_be_so(
    precision: Literal["float16", "float32"], value: float, shown: str, student: RoleHandle, tmp_path: Path
) -> None:
    """No precision would help."""
    averages = PowerAverages(student, (0.05, 0.1))
    hook = Snapshots(student, PostHocConfig(precision=precision), tmp_path, Processes())
    set_weights(student, 1.0)
    averages.after_update(STAY)
    for tensor in training_of(student).powers["0.05"].values():
        tensor.fill_(value)
    hook.after_step(1, ("student",))
    with pytest.raises(RunError, match=f"update 1 .* is {shown}: the student's weights diverged") as caught:
        hook.finish()
    assert "precision" not in str(caught.value)
    assert snapshots_in(tmp_path) == {}


def test_a_full_disk_and_a_damaged_file_are_one_sentence(
    student: RoleHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = trained(student, tmp_path, PostHocConfig(), 12)
    file = next(iter(snapshots_in(tmp_path).values()))
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=f"snapshot {file} cannot be read"):
        averaged(tmp_path, Profile(12, 0.075))

    def full(*args: Tensor, **kwargs: Callable[..., None]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(RunError, match=r"No space left on device\. The run stops here: make room and go on with --res"):
        hook.write()


def test_a_snapshot_that_does_not_tell_its_step_is_refused(tmp_path: Path) -> None:
    """Step 0 would stand in the result's recipe."""
    file = tmp_path / "update-00000002-std-0.1.safetensors"
    for metadata in (None, {"format": "pt"}, {"step": "two"}):
        save_file({"weight": torch.zeros(2)}, file, metadata=metadata)
        with pytest.raises(UserError, match=f"snapshot {file} cannot be read: its metadata has no number 'step'"):
            saved_step(file)
    save_file({"weight": torch.zeros(2)}, file, metadata={"step": "7"})
    assert saved_step(file) == 7
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=f"snapshot {file} cannot be read"):
        saved_step(file)


@pytest.mark.parametrize("values", [{"stds": [0.1]}, {"stds": [0.1, 0.1]}, {"stds": [0.1, 0.3]}, {"keep": 2}])
def test_options_that_give_no_averages_are_refused(values: dict[str, list[float] | int]) -> None:
    with pytest.raises(ValueError, match=r"stds|keep"):
        PostHocConfig.model_validate(values)
