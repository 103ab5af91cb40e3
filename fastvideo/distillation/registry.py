"""Names to classes. A new method or family is one file and one line here; its module is imported on first use.

One of another package needs no line: its name in a config is ``package.module:Class``.
"""

from __future__ import annotations

import inspect
import sys
import sysconfig
import traceback
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.adapters.export.base import Exporter
from fastvideo.distillation.config.base import MethodConfig
from fastvideo.distillation.config.schema import RunConfig
from fastvideo.distillation.config.sections import AdapterConfig
from fastvideo.distillation.config.trajectories import TrajectoryOptions
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.errors import UserError
from fastvideo.wording import did_you_mean

METHODS = {
    "kd": "fastvideo.distillation.methods.knowledge_distillation.kd:KDMethod",
    "causal_kd": "fastvideo.distillation.methods.knowledge_distillation.causal_kd:CausalKDMethod",
    "cm": "fastvideo.distillation.methods.consistency_model.cm:CMMethod",
    "causal_cd": "fastvideo.distillation.methods.consistency_model.causal_cd:CausalCDMethod",
    "tcm": "fastvideo.distillation.methods.consistency_model.tcm:TCMMethod",
    "anyflow": "fastvideo.distillation.methods.distribution_matching.anyflow:AnyFlowMethod",
    "anyflow_pretrain": "fastvideo.distillation.methods.distribution_matching.anyflow:AnyFlowPretrainMethod",
    "causvid": "fastvideo.distillation.methods.distribution_matching.causvid:CausVidMethod",
    "self_forcing": "fastvideo.distillation.methods.distribution_matching.self_forcing:SelfForcingMethod",
    "streaming_tuning": "fastvideo.distillation.methods.distribution_matching.streaming_tuning:StreamingTuningMethod",
    "dmd2": "fastvideo.distillation.methods.distribution_matching.dmd2:DMD2Method",
    "phased_dmd": "fastvideo.distillation.methods.distribution_matching.phased_dmd:PhasedDMDMethod",
    "dmd2_frames": "fastvideo.distillation.methods.distribution_matching.dmd2_frames:DMD2FramesMethod",
    "dmd2_gan": "fastvideo.distillation.methods.distribution_matching.dmd2_gan:DMD2GANMethod",
    "f_distill": "fastvideo.distillation.methods.distribution_matching.f_distill:FDistillMethod",
    "ladd": "fastvideo.distillation.methods.distribution_matching.ladd:LADDMethod",
    "mean_flow": "fastvideo.distillation.methods.consistency_model.mean_flow:MeanFlowMethod",
    "rcm": "fastvideo.distillation.methods.distribution_matching.rcm:RCMMethod",
    "scm": "fastvideo.distillation.methods.consistency_model.scm:SCMMethod",
    "sft": "fastvideo.distillation.methods.fine_tuning.sft:SFTMethod",
    "causal_sft": "fastvideo.distillation.methods.fine_tuning.causal_sft:CausalSFTMethod",
}
"""Algorithms, by name."""

ADAPTERS = {
    "wan": "fastvideo.distillation.adapters.wan_family.adapter:WanFamily",
    "cogvideox": "fastvideo.distillation.adapters.cogvideox:CogVideoXAdapter",
    "sdxl": "fastvideo.distillation.adapters.sdxl:SDXLAdapter",
    "sd15": "fastvideo.distillation.adapters.sd15:SD15Adapter",
    "qwen_image": "fastvideo.distillation.adapters.qwen_image:QwenImageAdapter",
    "z_image": "fastvideo.distillation.adapters.z_image:ZImageAdapter",
    "flux2": "fastvideo.distillation.adapters.flux2:Flux2Adapter",
    "flux": "fastvideo.distillation.adapters.flux:FluxAdapter",
    "krea2": "fastvideo.distillation.adapters.krea2:Krea2Adapter",
    "sd3": "fastvideo.distillation.adapters.sd3:SD3Adapter",
    "ltx": "fastvideo.distillation.adapters.ltx:LTXAdapter",
    "ltx2": "fastvideo.distillation.adapters.ltx2.adapter:LTX2Adapter",
    "kandinsky5": "fastvideo.distillation.adapters.kandinsky5:Kandinsky5Adapter",
    "hunyuan15": "fastvideo.distillation.adapters.hunyuan15:Hunyuan15Adapter",
    "analytic": "fastvideo.distillation.adapters.analytic:AnalyticAdapter",
}
"""Model families, by name."""

STABLE_DIFFUSION = "fastvideo.distillation.adapters.export.stable_diffusion"
FLOW = "fastvideo.distillation.adapters.export.flow:FlowExporter"
FLUX2 = "fastvideo.distillation.adapters.export.flux2:Flux2Exporter"
EXPORTERS = {
    "WanPipeline": "fastvideo.distillation.adapters.export.wan:WanExporter",
    "StableDiffusionXLPipeline": f"{STABLE_DIFFUSION}:SDXLExporter",
    "StableDiffusionPipeline": f"{STABLE_DIFFUSION}:StableDiffusionExporter",
    "QwenImagePipeline": FLOW,
    "ZImagePipeline": FLOW,
    "Flux2KleinPipeline": FLUX2,
    "Flux2Pipeline": FLUX2,
    "FluxPipeline": FLOW,
    "Krea2Pipeline": FLOW,
    "StableDiffusion3Pipeline": FLOW,
    "LTXPipeline": FLOW,
    "LTX2Pipeline": "fastvideo.distillation.adapters.export.ltx2:LTX2Exporter",
    "HunyuanVideo15Pipeline": "fastvideo.distillation.adapters.export.hunyuan15:Hunyuan15Exporter",
    "Kandinsky5T2VPipeline": "fastvideo.distillation.adapters.export.kandinsky5:Kandinsky5Exporter",
    "CogVideoXPipeline": "fastvideo.distillation.adapters.export.cogvideox:CogVideoXExporter",
}
"""Exporters, by the diffusers pipeline of their family."""


def _load(registry: Mapping[str, str], kind: str, name: str, base: type) -> Any:
    if ":" in name:
        return own_class(name, base)
    if name not in registry:
        known = f"one of {', '.join(registry)}, or package.module:Class of your own"
        raise UserError(f"unknown {kind} {name!r}: {known}{did_you_mean(name, registry)}")
    module, attribute = registry[name].split(":")
    return getattr(import_module(module), attribute)


def own_class(name: str, base: type) -> Any:
    """The class that ``package.module:Class`` names, of an installed package or of a file in the working folder.

    Raises:
        UserError: for a module that is not there or fails while it is imported (with file and line), a class that it
            does not have (with the nearest one), or one that is no subclass of ``base``.
    """
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # as `python -m` does
        sys.path.insert(0, here)
    try:
        imported = vars(import_module(module))
    except (Exception, SystemExit) as error:  # a module may raise anything, and a script ends
        place = _place(error)
        raise UserError(f"cannot import {module!r} (from {here}): {place}{_cause(error, bool(place))}") from error
    if attribute not in imported:
        own = [word for word, found in imported.items() if inspect.isclass(found) and found.__module__ == module]
        known = [word for word in own if issubclass(imported[word], base)] or own
        listed = f"; it has {', '.join(known)}" if known else ""
        raise UserError(f"module {module!r} has no class {attribute!r}{listed}{did_you_mean(attribute, known)}")
    found = imported[attribute]
    if not inspect.isclass(found):
        raise UserError(f"{name!r} is no class, but of type {type(found).__name__}")
    if not issubclass(found, base):
        raise UserError(f"{name!r} is not a subclass of {base.__module__}.{base.__qualname__}")
    return found


def _place(error: BaseException) -> str:
    """``file:line: `` of the last line outside of Python's and installed packages that an import ran; empty if none."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: "
    shipped = ("<frozen ", sysconfig.get_path("stdlib"))
    frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename != __file__]
    ran = [one for one in frames if "site-packages" in one.filename or not one.filename.startswith(shipped)]
    own = [one for one in ran if "site-packages" not in one.filename] or ran
    return f"{own[-1].filename}:{own[-1].lineno}: " if own else ""


def _cause(error: BaseException, inside: bool) -> str:
    """Type and text of the error that ended an import; of a module that is not there, its sentence alone."""
    text = (error.msg if isinstance(error, SyntaxError) else str(error)) or "no message"
    return f"{type(error).__name__}: {text}" if inside else text


def load_method(name: str) -> type[DistillMethod[Any]]:
    """The method of that name, or of ``package.module:Class``.

    Raises:
        UserError: with the list of names, or as :func:`own_class`, or if it does not declare what it has to, or trains
            on stored trajectories and its config does not say which.
    """
    found = cast(type[DistillMethod[Any]], _load(METHODS, "method", name, DistillMethod))
    if missing := [one for one in DistillMethod.__annotations__ if not hasattr(found, one)]:
        raise UserError(f"{name} does not declare {', '.join(missing)}, as every DistillMethod has to")
    if not (inspect.isclass(found.Config) and issubclass(found.Config, MethodConfig)):
        wanted = f"{MethodConfig.__module__}.{MethodConfig.__qualname__}"
        raise UserError(f"{name}.Config is no subclass of {wanted}, whose fields are the options of a method")
    if found.needs_trajectories and not issubclass(found.Config, TrajectoryOptions):
        raise UserError(
            f"{name} has needs_trajectories, so its config says which trajectories: derive {found.Config.__qualname__} "
            f"from {TrajectoryOptions.__module__}.{TrajectoryOptions.__qualname__}"
        )
    return found


_own_families: dict[str, str] = {}
"""Adapters of other packages that this process has loaded, by their pipelines."""


def load_adapter(name: str) -> type[DistillAdapter[Any]]:
    """The model family of that name, or of ``package.module:Class``, whose pipelines are known from then on.

    Raises:
        UserError: with the list of names, or as :func:`own_class`.
    """
    found = cast(type[DistillAdapter[Any]], _load(ADAPTERS, "model", name, DistillAdapter))
    if ":" in name:
        config = getattr(found, "Config", AdapterConfig)  # conformance says what an unfinished class lacks
        _own_families.update(dict.fromkeys(config.pipelines, name))
    return found


def load_exporter(config: AdapterConfig) -> Exporter:
    """The exporter of a family; one that refuses if there is none."""
    name = next((name for name in config.pipelines if name in EXPORTERS), config.exporter)
    exporter: type[Exporter] = _load(EXPORTERS, "pipeline", name, Exporter) if name else Exporter
    return exporter(config)


def families() -> dict[str, str]:
    """The adapter of each diffusers pipeline class (``_class_name`` in ``model_index.json``), as the adapters say."""
    return _own_families | _families()


@cache
def _families() -> dict[str, str]:
    return {pipeline: name for name in ADAPTERS for pipeline in load_adapter(name).Config.pipelines}


def run_schema(model: str, method: str) -> type[RunConfig[Any, Any]]:
    """The config's class for a family and a method."""
    adapter: type[AdapterConfig] = load_adapter(model).Config
    options: type[MethodConfig] = load_method(method).Config
    return _schema(adapter, options)


@cache
def _schema(adapter: type[AdapterConfig], options: type[MethodConfig]) -> type[RunConfig[Any, Any]]:
    """Kept: pydantic forgets a class that nobody holds, and looks for its docstrings again in all modules."""
    return RunConfig[adapter, options]  # type: ignore[valid-type]
