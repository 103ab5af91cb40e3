"""Published architectures: the config files of checkpoints, without weights, so that a plan needs no download."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastvideo.distillation.adapters.diffusers.attention import NATIVE, check_attention
from fastvideo.distillation.adapters.diffusers.pipeline import EMBEDDED
from fastvideo.distillation.adapters.diffusers.single_file import is_single_file
from fastvideo.distillation.builder import Config
from fastvideo.distillation.types import UserError

ARCHITECTURES = {
    "wan2.1-t2v-1.3b": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
    "wan2.1-t2v-14b": ("Wan-AI/Wan2.1-T2V-14B-Diffusers",),
    "wan2.2-t2v-a14b": ("Wan-AI/Wan2.2-T2V-A14B-Diffusers",),
    "wan2.2-i2v-a14b": ("Wan-AI/Wan2.2-I2V-A14B-Diffusers",),
    "wan2.2-ti2v-5b": ("Wan-AI/Wan2.2-TI2V-5B-Diffusers",),
    "cogvideox-2b": ("THUDM/CogVideoX-2b", "zai-org/CogVideoX-2b"),
    "cogvideox-5b": ("THUDM/CogVideoX-5b", "zai-org/CogVideoX-5b"),
    "qwen-image": ("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"),
    "kandinsky5-t2v-lite": tuple(
        f"kandinskylab/Kandinsky-5.0-T2V-Lite-{kind}-5s-Diffusers" for kind in ("sft", "pretrain")
    ),
    "hunyuan-video-1.5-t2v": tuple(
        f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{size}_t2v" for size in ("480p", "720p")
    ),
    "ltx-2": ("Lightricks/LTX-2",),
    "flux2-dev": ("black-forest-labs/FLUX.2-dev",),
    "sdxl-base-1.0": ("stabilityai/stable-diffusion-xl-base-1.0",),
}
"""Names of ``published/``, and the hub ids that they are the configs of."""


def architecture_folder(name: str) -> Path:
    """The config files of a published architecture.

    Raises:
        UserError: with the list of names.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"--architecture {name!r}: one of {', '.join(ARCHITECTURES)} is expected")
    return Path(str(files("fastvideo").joinpath("planning/published", name)))


def config_folder(path: str, architecture: str | None = None) -> str:
    """Folder with the config files of the model ``path``: its own folder, or those that ship with this package.

    Args:
        path: as in a run's config.
        architecture: what to take for a path that is neither a folder nor known.

    Raises:
        UserError: if there is no such folder and no architecture stands for it.
    """
    if path in EMBEDDED or Path(path).is_dir() or is_single_file(path):
        return path
    known = {hub_id.lower(): name for name, ids in ARCHITECTURES.items() for hub_id in ids}
    name = known.get(path.lower(), architecture)
    if name is None:
        raise UserError(
            f"model {path!r} is no folder or file here, and its architecture is not among the published ones that ship "
            f"with this package: name the one it has with --architecture ({', '.join(ARCHITECTURES)})"
        )
    return str(architecture_folder(name))


def without_weights(config: Config, architecture: str | None = None) -> Config:
    """The config over models that have config files, with kernels that every machine has.

    A backend of attention decides about speed, not about what a step keeps, and may not run here at all.

    Raises:
        UserError: for a model without a known architecture, or a backend that diffusers does not have.
    """

    def named(section: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if section is None:
            return None
        path = section.get("path")
        return {**section, **_kernels(section), **({} if path is None else {"path": config_folder(path, architecture)})}

    roles = {
        name: role.model_copy(update={**(named({"path": role.path}) or {}), "model": named(role.model)})
        for name, role in config.roles.items()
    }
    model = config.model.model_copy(update=named(config.model.model_dump()))
    return config.model_copy(update={"model": model, "roles": roles})


def _kernels(section: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``model`` section that choose kernels, as every machine has them."""
    if "attention_backend" in section:
        check_attention(section["attention_backend"])
    everywhere = {"attention_backend": NATIVE, "compile_blocks": False}
    return {field: value for field, value in everywhere.items() if field in section}
