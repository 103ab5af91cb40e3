"""Every registered model family under every rule of the contract, and the rules themselves under broken families."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.conformance.run import CHECKS, examine, find_family, options_of
from fastvideo.conformance.subject import Check, NotApplicable, Subject
from fastvideo.conformance.tiny import MADE, save_tiny
from fastvideo.distillation.adapters.analytic import (
    AnalyticAdapter,
    AnalyticCodec,
    AnalyticConditioner,
    AnalyticConfig,
    AnalyticFolder,
)
from fastvideo.distillation.chunks import Context, Masked, Past
from fastvideo.distillation.registry import ADAPTERS
from fastvideo.distillation.types import Condition, UserError
from fastvideo.tests.distillation.tiny import FAMILIES, LATER

Change = Callable[..., Any]


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in LATER else name
        for name in dict.fromkeys([*ADAPTERS, *FAMILIES])
    ],
    scope="module",
)
def subject(request: pytest.FixtureRequest, tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A registered family; one that has no tiny factory fails here, by name."""
    family = FAMILIES[request.param]
    return Subject(family.make(tiny_wan.parent), family.prompts, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("rule", CHECKS, ids=lambda rule: rule.name)
def test_the_family_obeys(subject: Subject, rule: Check) -> None:
    try:
        rule.run(subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))


class Drifting(AnalyticAdapter):
    """Remembers its calls."""

    calls = 0

    def velocity(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        self.calls += 1
        return super().velocity(network, x_t, t, condition) + self.calls


PARTS: Mapping[str, type[Any]] = {
    "": AnalyticAdapter,
    "codec": AnalyticCodec,
    "conditioner": AnalyticConditioner,
    "folder": AnalyticFolder,
}


def changed(name: str, change: Change) -> type[AnalyticAdapter]:
    """The analytic family with the result of a method passed through ``change(result, *arguments)``.

    ``name`` is a method of the adapter, or of one of its parts: ``codec.decode``.
    """
    part, _, method_name = name.rpartition(".")
    original = getattr(PARTS[part], method_name)

    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        return change(original(self, *arguments, **options), *arguments)

    broken = type(f"Broken_{method_name}", (PARTS[part],), {method_name: method})
    if not part:
        return broken

    def replaced(self: AnalyticAdapter) -> Any:
        found = AnalyticAdapter.__dict__[part].func(self)
        found.__class__ = broken
        return found

    lasting = cached_property(replaced)
    lasting.__set_name__(AnalyticAdapter, part)
    return type(f"Broken_{part}", (AnalyticAdapter,), {part: lasting})


BROKEN: Mapping[str, tuple[type[AnalyticAdapter], str]] = {
    "double": (changed("velocity", lambda u, *_: u.double()), "velocity is float32 with the shape of its input"),
    "nan": (changed("velocity", lambda u, n, x, t, c: u / (1 - t.view(-1, 1, 1, 1, 1))), "velocity is finite from"),
    "state": (Drifting, "velocity depends on its arguments alone"),
    "mixing": (changed("velocity", lambda u, *_: u + u.mean(0)), "samples of a batch do not see each other"),
    "detached": (changed("velocity", lambda u, *_: u.detach()), "gradient flows to the input"),
    "deaf": (changed("velocity", lambda u, n, x, t, c: x * t.mean()), "velocity reads sample time and prompt"),
    "one time": (
        changed("velocity", lambda u, n, x, t, c: u if t.ndim == 1 else u.flip(2)),
        "constant times per frame equal a time per sample",
    ),
    "other width": (
        changed("features", lambda found, *_: (found[0], tuple(t[..., 1:] for t in found[1]))),
        "features are float32 tokens of the declared widths",
    ),
    "other features": (
        changed(
            "features", lambda found, *_: (found[0], found[1] if found[0] is None else tuple(2 * t for t in found[1]))
        ),
        "features are those of the whole call",
    ),
    "detached features": (
        changed(
            "features", lambda found, *_: (None, tuple(t.detach() + 0 * t.detach().requires_grad_() for t in found[1]))
        ),
        "features carry gradient and samples stay apart",
    ),
    "shuffled tokens": (
        changed("features", lambda found, *_: (found[0], tuple(t.flip(1) for t in found[1]))),
        "tokens come frame by frame",
    ),
    "rising": (changed("folder.teacher_times", lambda times, steps: times[::-1]), "teacher times fall from pure noise"),
    "other prompt": (
        changed("conditioner.negative", lambda c, n: c.map(lambda v: v + 1)),
        "the negative condition is the negative prompt",
    ),
    "other text": (
        changed("conditioner.text_of", lambda c, raw: c.map(lambda v: v + 1)),
        "a prepared batch has what a method reads",
    ),
    "half latents": (changed("codec.encode", lambda z, v: z.half()), "latents and videos have matching shapes"),
    "shape": (changed("codec.decode", lambda v, z: v[:1]), "latents and videos have matching shapes"),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_broken_family_is_caught_by_name(mistake: str, tmp_path: Path) -> None:
    cls, rule = BROKEN[mistake]
    config = AnalyticConfig(means=(-1.0, 1.0), stds=(0.3, 0.5), weights=(1, 2), shape=(2, 3, 4, 6))
    outcomes = list(examine(Subject(cls(config), ("0.5", "-1"), tmp_path)))
    failed = [outcome for outcome in outcomes if outcome.result == "FAILED"]
    assert any(outcome.name.startswith(rule) for outcome in failed), [outcome.name for outcome in failed]
    assert all(outcome.message and outcome.where for outcome in failed)


class Bidirectional(AnalyticAdapter):
    """Sees all frames in a masked call."""

    def velocity(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        seen = None if isinstance(context, Masked) else context
        return super().velocity(network, x_t, t, condition, r=r, context=seen)


def growing(past: Past, *_: Any) -> Past:
    """Writes into what it was given, so that the pasts before it change too."""
    for piece in past.pieces[:-1]:
        for value in piece.layers[0]:
            value.add_(0.1)
    return past


def attached(past: Past, *_: Any) -> Past:
    """Keeps a graph."""
    last = past.pieces[-1]
    latents, times = last.layers[0]
    return replace(past, pieces=(*past.pieces[:-1], replace(last, layers=((latents.clone().requires_grad_(), times),))))


CAUSAL: Mapping[str, tuple[type[AnalyticAdapter], str]] = {
    "bidirectional": (Bidirectional, "a later chunk changes nothing before it"),
    "no past": (
        changed("commit", lambda past, *_: replace(past, pieces=())),
        "chunks on their past equal one call of teacher forcing",
    ),
    "forgetful": (
        changed("commit", lambda past, *_: replace(past, pieces=past.pieces[-1:])),  # enough for clean frames of AR(1)
        "chunks on a noisy past equal one call of diffusion forcing",
    ),
    "growing": (changed("commit", growing), "a past is a value"),
    "attached": (changed("commit", attached), "a past is a value"),
}


@pytest.mark.parametrize("mistake", CAUSAL)
def test_a_family_with_broken_chunks_is_caught_by_name(mistake: str, tmp_path: Path) -> None:
    cls, rule = CAUSAL[mistake]
    subject = Subject(cls(AnalyticConfig(correlation=0.9, shape=(1, 3, 2, 2))), ("0.5", "-1"), tmp_path)
    rules = [each for each in CHECKS if each.where.endswith("commit()")]
    assert [o.name for o in examine(subject, rules) if o.result == "FAILED"].count(rule) == 1


def test_an_exception_is_reported_with_its_place(tmp_path: Path) -> None:
    class Raising(AnalyticCodec):
        def _decode(self, latents: Tensor) -> Tensor:
            return latents[:, :, 99]

    class Family(AnalyticAdapter):
        @cached_property
        def codec(self) -> AnalyticCodec:
            return Raising(self.config, self.device)

    outcomes = {o.name: o for o in examine(Subject(Family(AnalyticConfig()), ("0.5", "-1"), tmp_path))}
    found = outcomes["latents and videos have matching shapes"]
    assert found.result == "FAILED"
    assert "IndexError" in found.message
    assert "test_adapter_contract.py:" in found.where


def test_negative_conditioning_is_made_once(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[list[str]] = []
    adapter = type(subject.adapter)(subject.adapter.config)
    original = adapter.conditioner.encode_prompts

    def counting(prompts: Sequence[str]) -> Condition:
        encoded.append(list(prompts))
        return original(prompts)

    monkeypatch.setattr(adapter.conditioner, "encode_prompts", counting)
    for _ in range(3):
        adapter.ensure_negative_conditioning()
    assert encoded == [[adapter.conditioner.negative_prompt]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wann", "unknown model 'wann': one of wan.*; did you mean 'wan'"),
        ("no_such_module:Adapter", "cannot import 'no_such_module'"),
        ("fastvideo.errors:Adapter", "has no class 'Adapter'"),
        ("fastvideo.errors:UserError", "not a subclass"),
        ("fastvideo.distillation.adapters.base:DistillAdapter", "does not implement"),
    ],
)
def test_a_name_that_is_no_family(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_family(name)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fastvideo.cli import main

    source = "from fastvideo.distillation.adapters.analytic import AnalyticAdapter\n\n\nclass Mine(AnalyticAdapter):\n"
    (tmp_path / "conform_mine.py").write_text(source + '    summary = ""\n')
    monkeypatch.chdir(tmp_path)
    prompts = ["--prompts", "0.5", "-1"]
    assert main(["conformance", "analytic", *prompts]) == 0
    assert main(["conformance", "conform_mine:Mine", *prompts]) == 1
    shown = capsys.readouterr().out
    assert "it declares itself" in shown
    assert "FAILED" in shown
    figures = json.loads(shown.splitlines()[-1])
    assert (figures["family"], figures["failed"]) == ("conform_mine:Mine", ["it declares itself"])
    assert main(["conformance", "analytic", "--set", "meens=1"]) == 2
    assert main(["conformance", "sdxl"]) == 2
    assert "give its folder as --set path=FOLDER, or --tiny" in capsys.readouterr().err
    assert torch.is_grad_enabled()


OWN_METHOD = """
from fastvideo.distillation.methods.fine_tuning.sft import SFTMethod
from fastvideo.distillation.types import RoleLoss

class Mine(SFTMethod):
    def losses(self, batch, step):
        for loss in super().losses(batch, step):
            per_sample = batch.latents.mean((1, 2, 3, 4))
            yield RoleLoss(loss.role, loss.value / per_sample.std(), {"level": per_sample})
"""


def test_a_method_of_ones_own_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastvideo.cli import main

    (tmp_path / "conform_method.py").write_text(OWN_METHOD)
    monkeypatch.chdir(tmp_path)
    assert main(["conformance", "sft", "--set", "learning_rate=0.01"]) == 0
    assert main(["conformance", "conform_method:Mine"]) == 1
    shown = capsys.readouterr().out
    assert "metric 'level'" in shown
    wrong = ["a loss is a finite scalar with scalar metrics off the graph", "a sample does not feel another one"]
    figures = json.loads(shown.splitlines()[-1])
    assert (figures["method"], figures["failed"]) == ("conform_method:Mine", wrong)
    for name, text in (("text", "method: fast"), ("other", "distill_method: dmd2"), ("same", "distill_method: sft")):
        (tmp_path / f"{name}.yaml").write_text(text)
    assert main(["conformance", "sft", "--config", "same.yaml"]) == 0
    for arguments, message in (
        (["sft", "--set", "learning_rat=1"], "did you mean 'learning_rate'"),
        (["sft", "--tiny", "--prompts", "1", "2"], "--tiny, --prompts: for a family alone; 'sft' is a method"),
        (["sft", "--config", "text.yaml"], "method: a mapping of options is expected, got 'fast'"),
        (["sft", "--config", "other.yaml"], "its distill_method is dmd2, not SFTMethod"),
        (["sft", "--config", "tiny_sdxl_dmd2"], "its distill_method is dmd2, not SFTMethod"),
        (["conform_method:SFTMethod", "--set", "x"], "--set takes key=value"),
    ):
        assert main(["conformance", *arguments]) == 2
        assert message in capsys.readouterr().err


INHERITING = """
from conform_base import Base

class Late(Base):
    def active_roles(self, step):
        return ("student",) if step > 9 else ()

class Inheriting(Base):
    pass
"""


def test_what_a_method_inherits_is_placed_and_what_it_never_trains_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastvideo.cli import main

    base = OWN_METHOD[: OWN_METHOD.index("        for")].replace("Mine", "Base")
    (tmp_path / "conform_base.py").write_text(f"{base}        yield batch.latents.view(7)\n")
    (tmp_path / "conform_inheriting.py").write_text(INHERITING)
    monkeypatch.chdir(tmp_path)
    assert main(["conformance", "conform_inheriting:Inheriting"]) == 1
    shown = capsys.readouterr().out
    assert "raised at conform_base.py:7" in " ".join(shown.split())
    assert json.loads(shown.splitlines()[-1])["untrained"] == []
    assert main(["conformance", "conform_inheriting:Late"]) == 1
    shown = capsys.readouterr().out
    assert "\nstudent was trained in none of the four steps, so its loss was not examined: give shorter" in shown
    assert json.loads(shown.splitlines()[-1])["untrained"] == ["student"]


def test_settings_go_over_the_config_by_dotted_keys(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("method:\n  reach: {chunk: 3, sink: 0}\n  rate: 1\n")
    settings = ["reach.chunk=2", "times=[0.1, 0.9]", "teacher_path=null", "other.name=1e-4", "path=[x"]
    assert options_of("method", tmp_path / "run.yaml", settings) == {
        "reach": {"chunk": "2", "sink": 0},
        "rate": 1,
        "times": [0.1, 0.9],
        "teacher_path": None,
        "other": {"name": "1e-4"},
        "path": "[x",
    }


def test_a_tiny_pipeline_of_ones_own_is_written_and_given_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastvideo.cli import main

    source = "from fastvideo.distillation.adapters.sdxl import SDXLAdapter\n\n\nclass Mine(SDXLAdapter):\n"
    (tmp_path / "conform_tiny.py").write_text(source + '    summary = "mine"\n')
    monkeypatch.chdir(tmp_path)
    assert main(["conformance", "conform_tiny:Mine", "--tiny"]) == 2
    assert "by fastvideo.conformance.tiny.save_tiny, and give its folder" in capsys.readouterr().err
    made = MADE["sdxl"]
    pipeline = made.make()
    before = pipeline.unet.conv_in.bias.clone()
    save_tiny(pipeline, tmp_path / "small")
    assert not torch.equal(pipeline.unet.conv_in.bias, before), "zero layers would hide mistakes"
    sizes = [f"{name}={size}" for name, size in made.sizes.items()]
    settings = ["path=small", f"max_sequence_length={made.length}", *sizes]
    assert main(["conformance", "conform_tiny:Mine", "--set", *settings]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["passed"] > 20


@pytest.mark.slow
@pytest.mark.parametrize(("chosen", "threads"), [({}, 1), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_toys_are_checked_on_one_thread_unless_somebody_chose(chosen: dict[str, str], threads: int) -> None:
    free = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "fastvideo.cli", "conformance", "analytic", "--tiny", "--prompts", "0.5", "-1"]
    shown = subprocess.run(command, env=free | chosen, capture_output=True, text=True, check=True).stdout
    assert json.loads(shown.splitlines()[-1])["threads"] == threads


@pytest.mark.slow
def test_a_tiny_pipeline_is_checked_without_a_word_of_the_libraries(capfd: pytest.CaptureFixture[str]) -> None:
    from fastvideo.cli import main

    assert main(["conformance", "sd15", "--tiny"]) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["passed"] > 20
    assert "Loading" not in shown.err
    assert "deprecated" not in shown.err
