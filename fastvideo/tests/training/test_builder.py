"""Config to method, without a real model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel
from torch import nn

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticFolder
from fastvideo.distillation.builder import (
    build_adapter,
    build_families,
    build_method,
    build_wan_dmd2_method,
    check_needs,
    load_role,
)
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Method
from fastvideo.distillation.registry import run_schema
from fastvideo.errors import UserError

ROLES = {"student": {"trainable": True}, "teacher": {"trainable": False}, "critic": {"trainable": True}}


def wan_config(**changes: object):
    values = {"distill_model": "wan", "distill_method": "dmd2", "output": "unused", "model": {}, "method": {}}
    return validate(run_schema("wan", "dmd2"), values | {"roles": ROLES} | changes, "test")


def toy_network() -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        text_dim=64,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=8,
    )


def test_build_wan_dmd2_method_needs_no_real_network() -> None:
    networks = {role: toy_network() for role in ROLES}
    method = build_wan_dmd2_method(wan_config(), networks=networks)
    assert isinstance(method, DMD2Method)
    assert method.bundle.roles == ("student", "teacher", "critic")
    assert method.student.network is networks["student"]
    assert method.student.training is not None
    assert method.critic.training is not None
    assert method.teacher.training is None
    assert not any(p.requires_grad for p in method.teacher.network.parameters())
    assert method.critic.training.learning_rate == method.config.critic_learning_rate


def test_build_wan_dmd2_method_refuses_another_combination(analytic_values: dict) -> None:
    config = validate(run_schema("analytic", "dmd2"), analytic_values, "test")
    with pytest.raises(UserError, match="analytic x dmd2"):
        build_wan_dmd2_method(config)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"student": {"trainable": True}}, "'critic' is missing; role 'teacher' is missing"),
        (ROLES | {"teacher": {"trainable": True}}, "'teacher' must be frozen, but is trainable"),
        (ROLES | {"student": {"trainable": False}}, "'student' must be trained, but is frozen"),
        (ROLES | {"discriminator": {"trainable": True}}, "'discriminator' is unknown"),
    ],
)
def test_wrong_roles_are_refused_before_anything_is_loaded(roles: dict, message: str) -> None:
    config = wan_config(roles=roles)
    adapter = build_adapter(config)
    adapter.folder.load_network = lambda path=None: pytest.fail("loaded a network for a wrong config")  # type: ignore[method-assign]
    with pytest.raises(UserError, match=message):
        build_method(config, adapter)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        build_adapter(wan_config(model={"path": str(tmp_path)}))
    with pytest.raises(UserError, match="does not exist"):
        build_adapter(wan_config(model={"path": str(tmp_path / "absent" / "x")}))
    (tmp_path / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    with pytest.raises(UserError, match="holds a CogVideoXPipeline; this family reads WanPipeline"):
        build_adapter(wan_config(model={"path": str(tmp_path)}))


def test_a_prompt_that_is_too_long_is_refused() -> None:
    adapter = build_adapter(wan_config())
    with pytest.raises(UserError, match=r"prompt has \d+ tokens, the text encoder takes 16"):
        adapter.conditioner.encode_prompts(["a green seven moving up and left " * 4])


def test_a_vae_config_without_scale_factors_gets_the_defaults_of_diffusers(tmp_path) -> None:
    """The published Wan 2.1 checkpoints were saved before these keys existed."""
    source = Path(build_adapter(wan_config()).folder.pipeline.source)
    shutil.copytree(source, tmp_path / "old")
    file = tmp_path / "old" / "vae" / "config.json"
    config = json.loads(file.read_text())
    for key in ("scale_factor_temporal", "scale_factor_spatial"):
        assert config.pop(key)
    file.write_text(json.dumps(config))
    assert build_adapter(wan_config(model={"path": str(tmp_path / "old")})).codec.latent_shape == (16, 3, 4, 4)


def test_a_missing_component_is_one_message(tmp_path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    adapter = build_adapter(wan_config(model={"path": str(tmp_path)}))
    with pytest.raises(UserError, match="cannot read the config of 'transformer'"):
        _ = adapter.codec.latent_shape
    with pytest.raises(UserError, match="cannot load 'transformer'"):
        adapter.folder.load_network()


def test_a_family_without_what_a_method_needs_is_refused_before_anything_is_loaded(
    analytic_values: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = validate(run_schema("analytic", "dmd2"), analytic_values, "test")
    check_needs(config)
    monkeypatch.setattr(DMD2Method, "needs_of", classmethod(lambda cls, config: frozenset({"jvp", "features"})))
    monkeypatch.setattr(AnalyticAdapter, "supports", frozenset({"features"}))
    monkeypatch.setattr(AnalyticFolder, "load_network", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError) as refusal:
        build_method(config, build_adapter(config))
    message = str(refusal.value)
    assert message.startswith("dmd2 needs jvp of the model family, which analytic does not have: ")
    assert "method.jvp: central_difference" in message
    assert message.endswith("sft")


def test_the_student_of_a_method_of_flow_maps_is_one_and_the_teacher_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = wan_config()
    families = build_families(config, build_adapter(config), Processes())
    assert "flow_map_head" not in dict(load_role(config, families, "student").named_children())
    monkeypatch.setattr(DMD2Method, "needs_of", classmethod(lambda cls, config: frozenset({"flow_map"})))
    assert "flow_map_head" in dict(load_role(config, families, "student").named_children())
    assert "flow_map_head" not in dict(load_role(config, families, "teacher").named_children())
