"""Runs with a frame teacher: its admission, a tiny Wan student under SDXL, and what is refused at the start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from fastvideo.cli import main
from fastvideo.conformance.tiny import tiny_options
from fastvideo.data.order import MemorySource, SampleStream, Shard
from fastvideo.distillation.adapters.analytic import AnalyticAdapter
from fastvideo.distillation.batches import BatchPreparer
from fastvideo.distillation.builder import build_adapter, build_method, check_needs
from fastvideo.distillation.config.checkpoints import CheckpointConfig
from fastvideo.distillation.config.reading import config_of
from fastvideo.distillation.config.sections import TrainerConfig
from fastvideo.distillation.engine.checkpoint.checkpoint import CheckpointHook, RunFacts
from fastvideo.distillation.engine.checkpoint.restore import restore
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.runtime import Runtime, Tracker
from fastvideo.distillation.engine.saving import Saving
from fastvideo.distillation.engine.training import attach_optimizer
from fastvideo.distillation.frame_bridge import CodecFrames
from fastvideo.distillation.methods.distribution_matching.dmd2_frames import DMD2FramesMethod
from fastvideo.distillation.trainer import DistillTrainer
from fastvideo.distillation.types import RawBatch, UserError
from fastvideo.tests.distillation.toys import MEAN, STD, spy, toy_method
from fastvideo.tests.preparing import preparer
from fastvideo.training.frames import frame_hooks, frame_notes
from fastvideo.training.resume import survivors
from fastvideo.training.run import run

WARMUP, STEPS = 8, 12
COGVIDEOX = {"family": "cogvideox", "path": "tiny_cogvideox"}


class Toy:
    """A run of stills on analytic roles: frame teacher and frame critic are Gaussians with given means."""

    def __init__(self, folder: Path, teacher: float, critic: float, *, captions: bool = True, every: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        options = {"frame_warmup_steps": WARMUP, "trust_frame_teacher": False, "frame_time_range": (0.2, 0.5)}
        method = toy_method("dmd2_frames", spy(), mean=-0.5, std=0.6, **options)
        assert isinstance(method, DMD2FramesMethod)
        with torch.no_grad():
            method.term.teacher.network.mean.fill_(teacher)
            method.term.critic.network.mean.fill_(critic)
        for role, rate in method.optimizers(method.config).items():
            attach_optimizer(method.bundle[role], rate.model_copy(update={"learning_rate": 1e-4}))
        texts = [str(i / 10) if captions else "" for i in range(16)]
        shift = torch.tensor([float(text or 0) for text in texts]).view(-1, 1, 1, 1, 1)
        noise = torch.randn((16, 1, 1, 4, 4), generator=torch.Generator().manual_seed(5))
        self.stream = SampleStream(MemorySource(texts, MEAN + shift + STD * noise, {}), 3, Shard(4))
        self.tracker, loop = Tracker(folder), TrainerConfig(max_steps=STEPS, log_every=1)
        runtime, adapter = Runtime(method, loop, self.tracker), method.bundle["student"].adapter
        assert isinstance(adapter, AnalyticAdapter)
        self.method, self.trainer = method, DistillTrainer(method, preparer(adapter), loop, runtime)
        self.parts = Saving(runtime).parts(*survivors(self.trainer, self.stream))
        facts = RunFacts("seed: 3\n", "0" * 64, {"torch": torch.__version__})
        options, over = CheckpointConfig(every=every, keep=9), self.trainer.over
        saving = CheckpointHook(folder / "checkpoints", self.parts, Processes(), options, over, facts)
        self.said: list[str] = []
        self.tracker.say = self.said.append  # type: ignore[method-assign]
        self.trainer.hooks = (*frame_hooks(self.trainer, self.tracker), saving)

    def train(self) -> Toy:
        self.trainer.run(self.stream)
        return self


def test_a_teacher_that_knows_real_frames_better_is_admitted_and_its_term_switched_on(tmp_path: Path) -> None:
    toy = Toy(tmp_path, teacher=MEAN, critic=0.2).train()
    (line,) = (line for line in toy.said if "admitted" in line)
    assert line.startswith("frame teacher: admitted at step 8, its term is on; squared error on real frames at t 0.2")
    assert "over 4 batches" in line
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scored = [line["step"] for line in logged if "student/frame_loss" in line]
    assert scored == [9, 11], "student steps after the trial"


def test_a_teacher_that_is_worse_stops_the_run_before_a_checkpoint_hides_it(tmp_path: Path) -> None:
    toy = Toy(tmp_path, teacher=0.2, critic=MEAN, every=4)
    with pytest.raises(
        UserError, match=r"roles\.frame_teacher: not admitted at step 8: it knows real frames no better"
    ):
        toy.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-4"]


def test_a_teacher_that_does_not_read_captions_stops_the_run(tmp_path: Path) -> None:
    """Under empty captions it makes no difference if it reads them."""
    with pytest.raises(UserError, match="it does not read captions"):
        Toy(tmp_path, teacher=MEAN, critic=0.2, captions=False).train()


def test_a_trial_that_is_resumed_comes_to_the_same_numbers(tmp_path: Path) -> None:
    whole = Toy(tmp_path / "whole", teacher=MEAN, critic=0.2, every=3).train()
    again = Toy(tmp_path / "again", teacher=MEAN, critic=0.2)
    restore(tmp_path / "whole" / "checkpoints" / "step-6", again.parts, Processes())
    assert [line for line in again.train().said if "admitted" in line] == [
        line for line in whole.said if "admitted" in line
    ]
    assert torch.equal(again.method.errors, whole.method.errors)


def test_a_term_that_drowns_the_other_is_said_once(tmp_path: Path) -> None:
    toy = Toy(tmp_path, teacher=MEAN, critic=0.2)
    hook = toy.trainer.hooks[0]
    for step, balance in ((100, 0.01), (200, 0.02), (300, 1.0), (400, 50.0)):
        toy.method.balance = torch.tensor(balance)
        hook.after_step(step, ())
    assert [line.split(": ", 2)[0] for line in toy.said] == ["frame teacher, step 100", "frame teacher, step 400"]
    assert "it hardly counts. Raise method.frame_weight" in toy.said[0]
    assert "Lower method.frame_weight" in toy.said[1]


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Section of a tiny SDXL."""
    options = tiny_options("sdxl", tmp_path_factory.mktemp("frames") / "sdxl")
    return {"family": "sdxl", **options, "height": 32, "width": 32}


def values(tmp_path: Path, still: dict[str, Any], **method: Any) -> dict[str, Any]:
    roles = {name: {"trainable": name in ("student", "critic")} for name in ("student", "teacher", "critic")}
    roles |= {
        "frame_teacher": {"trainable": False, "model": still},
        "frame_critic": {"trainable": True, "model": still},
    }
    rates = {"student_learning_rate": 1e-4, "critic_learning_rate": 2e-4, "frame_critic_learning_rate": 2e-4}
    options = {"generator_update_interval": 2, "frame_warmup_steps": 1, "trust_frame_teacher": True}
    return {
        "distill_model": "wan",
        "distill_method": "dmd2_frames",
        "output": str(tmp_path / "run"),
        "model": {"path": "tiny"},
        "roles": roles,
        "method": {**options, **rates, **method},
        "data": {"path": "tiny", "size": 8, "batch_size": 2, "cache": str(tmp_path / "cache")},
        "trainer": {"log_every": 1, "max_steps": 5},
        "checkpoint": {"every": 3},
        "tracking": {"backends": []},
    }


@pytest.mark.slow
def test_wan_under_sdxl_resumes_to_the_bit_and_exports(tmp_path: Path, still: dict[str, Any]) -> None:
    wanted = values(tmp_path, still)
    whole = run(config_of(wanted, "test"))
    again = config_of(wanted | {"output": str(tmp_path / "again")}, "test")
    resumed = run(again, resume_from=tmp_path / "run" / "checkpoints" / "step-3")
    name = "transformer/diffusion_pytorch_model.safetensors"
    first, second = load_file(whole / name), load_file(resumed / name)
    assert all(torch.equal(first[key], second[key]) for key in first)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gradients = [line["student/frame_gradient"] for line in lines if "student/frame_gradient" in line]
    assert len(gradients) == 2
    assert all(gradient > 0 for gradient in gradients)
    assert all(0 < line["frame_critic/grad_norm"] < 1e3 for line in lines)
    assert main(["export", str(whole), "--out", str(tmp_path / "exported")]) == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported", torch_dtype=torch.float32)
    assert type(pipeline).__name__ == "WanPipeline"


def test_only_the_student_gets_the_frame_terms_gradient(tmp_path: Path, still: dict[str, Any]) -> None:
    config = config_of(values(tmp_path, still, frame_warmup_steps=0), "test")
    method = build_method(config, build_adapter(config))
    assert isinstance(method, DMD2FramesMethod)
    assert method.notes[0] == "frames reach frame_teacher decoded and encoded again"
    student, teacher = method.student.adapter, method.term.teacher.adapter
    assert teacher is method.term.critic.adapter
    before = {name: value.clone() for codec in (student.codec, teacher.codec) for name, value in _weights(codec)}
    latents = torch.randn(2, *student.codec.latent_shape, generator=torch.Generator().manual_seed(0))
    prepare = BatchPreparer(student.codec, [student.conditioner, teacher.conditioner])
    with torch.no_grad():
        for parameter in method.term.critic.parameters():
            parameter.mul_(1.01)
    for loss in method.losses(prepare(RawBatch(("a red seven", "a green three"), latents)), 0):
        loss.value.backward()
        trained = {handle.name for handle in method.bundle for p in handle.parameters() if p.grad is not None}
        assert trained == {loss.role}
        method.bundle[loss.role].network.zero_grad(set_to_none=True)
    for codec in (student.codec, teacher.codec):
        assert all(p.grad is None and not p.requires_grad for p in codec.vae.parameters())
        assert all(torch.equal(before[name], value) for name, value in _weights(codec))
    notes = list(frame_notes(config, method))
    assert notes == ["frame teacher: taken as it is, without a test on real frames; its term is on after step 0"]


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_a_run_that_recomputes_activations_decodes_frames_again(
    mode: str, tmp_path: Path, still: dict[str, Any]
) -> None:
    config = config_of(values(tmp_path, still) | {"parallel": {"activation_checkpointing": mode}}, "test")
    bridge = build_method(config, build_adapter(config)).bundle.bridge("student", "frame_teacher")
    assert isinstance(bridge, CodecFrames)
    assert bridge.recompute == (mode != "none")


def _weights(codec: Any) -> list[tuple[str, torch.Tensor]]:
    return [(f"{id(codec)} {name}", value) for name, value in codec.vae.state_dict().items()]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"video_weight": 0}, "method: video_weight: 0 leaves the frame teacher alone, which sees no motion"),
        ({"frame_weight": -1}, "method.frame_weight: "),
        ({"frame_weight": float("nan")}, "method.frame_weight: "),
        ({"frame_time_range": [0.3, 0.3]}, r"frame_time_range is empty: \[0.3, 0.3\]"),
        ({"frame_time_range": [0.5, 0.1]}, "method.frame_time_range: a range must not fall"),
        ({"frame_warmup_steps": 0, "trust_frame_teacher": False}, "frame_warmup_steps: 0 leaves no step to test"),
        ({"frame_space": "learned"}, "method.frame_space: "),
        ({"score_and_train": True}, "method.score_and_train: must be false for this method: two terms meet"),
        ({"frame_wieght": 1}, "method.frame_wieght: unknown key; did you mean 'frame_weight'"),
    ],
)
def test_options_that_cannot_be_are_refused_with_their_key(
    tmp_path: Path, still: dict[str, Any], method: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config_of(values(tmp_path, still, **method), "test")


def built(wanted: dict[str, Any]) -> Any:
    config = config_of(wanted, "test")
    return build_method(config, build_adapter(config))


def changed(tmp_path: Path, still: dict[str, Any], role: str, section: dict[str, Any] | None) -> Any:
    wanted = values(tmp_path, still)
    wanted["roles"].pop(role) if section is None else wanted["roles"].update({role: section})
    return wanted


@pytest.mark.parametrize(
    ("role", "section", "message"),
    [
        ("frame_critic", None, r"roles: role 'frame_critic' is missing"),
        ("frame_teacher", {"trainable": True}, r"role 'frame_teacher' must be frozen"),
        ("frame_teacher", {"trainable": False}, r"roles\.frame_teacher\.model: it makes videos of 3 latent frames"),
        ("frame_teacher", {"trainable": False, "model": {"family": "sdlx"}}, r"did you mean 'sdxl'"),
        (
            "frame_critic",
            {"trainable": True, "model": {"num_frames": 1}},
            r"roles\.frame_critic\.model: frame_teacher and",
        ),
        (
            "teacher",
            {"trainable": False, "model": {"family": "cogvideox", "path": "tiny_cogvideox"}},
            "teacher.model: its",
        ),
    ],
)
def test_roles_that_do_not_fit_are_refused(
    tmp_path: Path, still: dict[str, Any], role: str, section: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        built(changed(tmp_path, still, role, section))


def test_a_frame_critic_does_not_start_from_a_student(tmp_path: Path, still: dict[str, Any]) -> None:
    source = build_adapter(config_of(values(tmp_path, still), "test")).folder
    source.save(tmp_path / "wan", source.load_network(), {})
    section = {"trainable": True, "model": still, "init_from": str(tmp_path / "wan")}
    config = config_of(changed(tmp_path, still, "frame_critic", section), "test")
    with pytest.raises(UserError, match=r"roles\.frame_critic\.init_from: .*wan' holds a WanPipeline; .*XLPipeline"):
        build_method(config, build_adapter(config))


def test_pictures_have_sizes_of_their_own(tmp_path: Path, still: dict[str, Any]) -> None:
    """Height and width of a video are not those of a frame teacher without any: SDXL's are 1024."""
    bare = {key: value for key, value in still.items() if key not in ("height", "width")}
    config = config_of(values(tmp_path, bare), "test")
    with pytest.raises(UserError, match=r"its pictures are 1024 x 1024 .* trained on up to 32 x 32"):
        build_method(config, build_adapter(config))


def test_a_folder_without_an_autoencoder_is_refused(tmp_path: Path, still: dict[str, Any]) -> None:
    folder = shutil.copytree(still["path"], tmp_path / "bare", ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(UserError, match=rf"cannot read the config of 'vae' in '{folder}'"):
        built(values(tmp_path, {**still, "path": str(folder)}))


def test_spaces_of_other_channels_are_not_said_to_differ_by_size(tmp_path: Path, still: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"\(16, 4, 4\), a still of .* \(4, 16, 16\) .*: set frame_space: decoded"):
        built(values(tmp_path, still, frame_space="identity"))


def test_a_guidance_that_the_frame_teacher_is_not_sampled_with_is_refused(tmp_path: Path) -> None:
    """The default is 2, and FLUX.1-dev reads its guidance as an input."""
    flux = {"family": "flux", **tiny_options("flux", tmp_path / "flux"), "height": 32, "width": 32}
    with pytest.raises(UserError, match=r"method\.frame_guidance: guidance 2: the network reads a guidance \(3\.5"):
        built(values(tmp_path, flux))
    assert built(values(tmp_path, flux, frame_guidance=1.0)).term.teacher.adapter.config.path == flux["path"]


@pytest.mark.parametrize("family", ["ltx2", "qwen_image"])
def test_a_student_without_frames_to_pick_is_refused(tmp_path: Path, still: dict[str, Any], family: str) -> None:
    """Videos with sound are one state, and stills are no videos."""
    wanted = {**values(tmp_path, still), "distill_model": family, "model": {"path": "x"}}
    with pytest.raises(UserError, match=rf"dmd2_frames needs frames of the model family, which {family} does not have"):
        check_needs(config_of(wanted, "test"))
