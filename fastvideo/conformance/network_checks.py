"""Rules about the network call: shapes, time, batch independence, gradients, guidance."""

from __future__ import annotations

import itertools

import torch

from fastvideo.conformance.subject import NotApplicable, Subject, check, require, require_close
from fastvideo.distillation.abilities import of_folder
from fastvideo.distillation.bundle import RoleHandle
from fastvideo.distillation.noise import velocity_to_x0

VELOCITY = "velocity()"


@check(VELOCITY)
def velocity_is_float32_with_the_shape_of_its_input(subject: Subject) -> None:
    u = subject.predict(subject.x_t, subject.times)
    require(u.shape == subject.x_t.shape, f"{tuple(u.shape)} for an input of {tuple(subject.x_t.shape)}")
    require(u.dtype == torch.float32, f"{u.dtype}; cast to float32 before it is returned")
    require(u.isfinite().all(), "it holds infinite or undefined numbers")


@check(VELOCITY)
def velocity_is_finite_from_pure_noise_to_clean(subject: Subject) -> None:
    for time in (1.0, 0.999, 1e-3):
        t = torch.full_like(subject.times, time)
        u = subject.predict(subject.x_t, t)
        require(u.isfinite().all(), f"at t = {time} it holds infinite or undefined numbers")


@check(VELOCITY)
def velocity_depends_on_its_arguments_alone(subject: Subject) -> None:
    first = subject.predict(subject.x_t, subject.times)
    subject.predict(2 * subject.x_t, 0.5 * subject.times)
    with torch.no_grad():
        again = subject.predict(subject.x_t, subject.times)
    require(
        torch.equal(first, again),
        "the same call gave another result later, or without gradient: is there dropout, a cache, ambient state?",
    )


@check(VELOCITY)
def velocity_reads_sample_time_and_prompt(subject: Subject) -> None:
    base = subject.predict(subject.x_t, subject.times)
    swapped = subject.condition.map(lambda value: value.flip(0))
    others = {
        "sample": subject.predict(subject.x_t + 0.1, subject.times),
        "time": subject.predict(subject.x_t, subject.times - 0.1),
        "prompt": subject.predict(subject.x_t, subject.times, swapped),
    }
    for name, changed in others.items():
        same = torch.allclose(changed[[0, 2]], base[[0, 2]], rtol=1e-5, atol=1e-7)
        require(not same, f"another {name} gives the same velocity")


@check("network_time()")
def network_time_is_float32_and_rises_with_time(subject: Subject) -> None:
    t = torch.linspace(0.0, 1.0, 101, device=subject.adapter.device)
    times = subject.adapter.network_time(t, subject.adapter.config)
    require(times.dtype in (torch.float32, torch.float64), f"{times.dtype}: low precision moves the noise level")
    rises = -times.diff() if subject.adapter.config.reversed_time else times.diff()
    require((rises >= 0).all(), "t = 1 is pure noise, and the network's own time does not rise towards it")


@check("folder.teacher_times()")
def teacher_times_fall_from_pure_noise(subject: Subject) -> None:
    for steps in (1, 4, 50):
        times = subject.adapter.folder.teacher_times(steps)
        require(len(times) == steps, f"{len(times)} times for {steps} steps")
        require(times[0] <= 1.0 and times[-1] > 0.0, f"they leave (0, 1]: {times[0]} to {times[-1]}")
        require(all(a > b for a, b in itertools.pairwise(times)), f"they do not decrease: {list(times)}")


@check(VELOCITY)
def samples_of_a_batch_do_not_see_each_other(subject: Subject) -> None:
    x_t = subject.x_t.clone().requires_grad_()
    u = subject.predict(x_t, subject.times)
    (gradient,) = torch.autograd.grad(u[1].square().sum(), x_t)
    require(gradient[1].abs().sum() > 0, "no gradient reaches the input")
    require(torch.count_nonzero(gradient[[0, 2]]) == 0, "a sample's velocity depends on the other samples")
    alone = subject.predict(x_t[[1]], subject.times[[1]], subject.condition.rows(slice(1, 2)))
    require_close(alone, u[[1]], "a sample alone and in a batch")


@check(VELOCITY)
def constant_times_per_frame_equal_a_time_per_sample(subject: Subject) -> None:
    _needs_times_per_frame(subject)
    per_frame = subject.times[:, None].expand(-1, subject.adapter.codec.latent_shape[1])
    u = subject.predict(subject.x_t, subject.times)
    require_close(subject.predict(subject.x_t, per_frame), u, "times [B, F] and [B]")


@check(VELOCITY)
def times_per_frame_belong_to_their_frame(subject: Subject) -> None:
    _needs_times_per_frame(subject)
    frames = subject.adapter.codec.latent_shape[1]
    if frames == 1:
        raise NotApplicable("the latents have one frame; give the model a longer video to check this")
    times = torch.linspace(0.3, 0.9, frames, device=subject.adapter.device).expand(len(subject.x_t), frames)
    u = subject.predict(subject.x_t, times)
    others = {"reversed": times.flip(1), "all the first": times[:, :1], "all the last": times[:, -1:]}
    for name, wrong in others.items():
        other = subject.predict(subject.x_t, wrong.expand(-1, frames))
        require(not torch.allclose(other, u, rtol=1e-3, atol=1e-4), f"times {name} give the same velocity")


def _needs_times_per_frame(subject: Subject) -> None:
    if "frame_times" not in subject.adapter.supports:
        raise NotApplicable("the family's network takes one time per sample")


@check("velocity(), folder.load_network(), folder.dead_parameters()")
def gradient_flows_to_the_input_and_to_every_parameter(subject: Subject) -> None:
    x_t = subject.x_t.clone().requires_grad_()
    network = subject.adapter.folder.load_network().requires_grad_(True)
    subject.adapter.velocity(network, x_t, subject.times, subject.condition).square().sum().backward()
    require(x_t.grad is not None and x_t.grad.abs().sum() > 0, "no gradient reaches the input")
    found = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    declared = of_folder(subject.adapter.folder).dead_parameters(network)
    dead, alive = sorted(found - declared), sorted(declared - found)
    require(not dead, f"no gradient reaches {', '.join(dead[:5])}{' ...' if len(dead) > 5 else ''}")
    require(not alive, f"declared dead, and gradient reaches them: {', '.join(alive[:5])}")


@check("velocity(), conditioner.negative_prompt")
def guidance_of_one_is_the_conditional_prediction(subject: Subject) -> None:
    subject.adapter.ensure_negative_conditioning()
    role = RoleHandle("student", subject.adapter, subject.network)
    negative = subject.adapter.conditioner.negative(len(subject.x_t)) | subject.first_frames(len(subject.x_t))
    arguments = (subject.x_t, subject.times, subject.condition)
    with torch.no_grad():
        conditional, unconditional = role.velocity(*arguments), role.velocity(*arguments[:2], negative)
        guided = {g: role.guided_velocity(*arguments, negative, g) for g in (0.0, 1.0, 3.0)}
        x0 = role.x0_guided(*arguments, negative, 3.0)
    require_close(guided[1.0], conditional, "guidance 1 and the conditional velocity")
    unguided = subject.adapter.folder.rescale_guidance(unconditional, conditional, *arguments[:2])
    require_close(guided[0.0], unguided, "guidance 0 and the unconditional velocity")
    require_close(x0, velocity_to_x0(subject.x_t, guided[3.0], subject.times), "guided x0 and guided velocity")
