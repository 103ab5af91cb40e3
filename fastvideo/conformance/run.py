"""Run the checks on one family, or one method."""

from __future__ import annotations

import inspect
import sysconfig
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml

import fastvideo
from fastvideo.conformance import chunk_checks, feature_checks, folder_checks, network_checks, stock_checks
from fastvideo.conformance.method_checks import METHOD_CHECKS
from fastvideo.conformance.method_subject import MethodSubject, untrained
from fastvideo.conformance.subject import CHECKS, Check, NotApplicable, Subject, Violation
from fastvideo.conformance.tiny import MADE, tiny_options
from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.config.overrides import EMPTY, NOT_YAML
from fastvideo.distillation.config.reading import read_yaml, validate
from fastvideo.distillation.config.recipes import find_config
from fastvideo.distillation.methods.base import DistillMethod
from fastvideo.distillation.registry import ADAPTERS, METHODS, load_adapter, load_method, own_class
from fastvideo.distillation.types import UserError
from fastvideo.inference.progress import tracked
from fastvideo.wording import did_you_mean

T = TypeVar("T")
RULES = (network_checks, chunk_checks, feature_checks, folder_checks, stock_checks)
"""The modules whose import fills :data:`CHECKS`."""


@dataclass(frozen=True)
class Outcome:
    """Result of one check; ``where``: members or line behind a failure."""

    name: str
    result: Literal["passed", "FAILED", "not applicable"]
    message: str = ""
    where: str = ""


def examine(subject: Subject | MethodSubject, checks: Iterable[Check] = tuple(CHECKS)) -> Iterator[Outcome]:
    """Run ``checks`` in order; a failure does not stop the rest."""
    for rule in checks:
        try:
            rule.run(subject)
        except NotApplicable as reason:
            yield Outcome(rule.name, "not applicable", str(reason))
        except Violation as violation:
            yield Outcome(rule.name, "FAILED", str(violation), rule.where)
        except (Exception, SystemExit) as error:  # a class under examination may raise anything
            message = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
            yield Outcome(rule.name, "FAILED", message, f"{rule.where}, raised at {place(error, subject.examined)}")
        else:
            yield Outcome(rule.name, "passed")


def place(error: BaseException, examined: type) -> str:
    """``file:line`` where ``error`` left the module of the examined class, else the last line that is neither of this
    package nor of an installed one nor Python's, else where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    shipped = (str(Path(fastvideo.__file__).parent), sysconfig.get_path("stdlib"), "<")
    inside = [frame for frame in frames if frame.filename == inspect.getsourcefile(examined)]
    outside = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(shipped)]
    last = (inside or outside or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def find_family(name: str) -> type[DistillAdapter[Any]]:
    """The adapter class of a registered family, or of ``package.module:Class``.

    Raises:
        UserError: for an unknown family, module or class, or a class that is not an adapter.
    """
    return _whole(name, load_adapter(name))


def find_method(name: str) -> type[DistillMethod[Any]] | None:
    """The class of a registered method, or of a ``package.module:Class`` that is one; ``None`` for a family's name.

    Raises:
        UserError: as :func:`load_method`, for a class that is neither or does not implement all of it, or for a name
            of neither.
    """
    if ":" in name:
        if not issubclass(found := own_class(name, object), (DistillMethod, DistillAdapter)):
            raise UserError(f"{name!r} is neither a DistillMethod nor a DistillAdapter")
        return _whole(name, load_method(name)) if issubclass(found, DistillMethod) else None
    if name in METHODS:
        return load_method(name)
    if name not in ADAPTERS and name not in MADE:
        known = f"families are {', '.join(ADAPTERS)}; methods {', '.join(METHODS)}; your own is package.module:Class"
        raise UserError(f"unknown name {name!r}: {known}{did_you_mean(name, [*ADAPTERS, *METHODS])}")
    return None


def _whole(name: str, found: type[T]) -> type[T]:
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise UserError(f"{name!r} does not implement {', '.join(missing)}")
    return found


def options_of(
    section: str, config: Path | None, settings: Iterable[str], method: type | None = None
) -> dict[str, Any]:
    """The ``model`` or ``method`` section of a run's config, overridden by ``key=value`` settings of (dotted) keys.

    Raises:
        UserError: for another form of setting, an unreadable config, or one of another method than ``method``.
    """
    options: dict[str, Any] = {}
    if config is not None:
        values = read_yaml(find_config(config))
        named = values.get("distill_method")
        if method is not None and named is not None and load_method(str(named)) is not method:
            raise UserError(f"config {config}: its distill_method is {named}, not {method.__name__}")
        given = values.get(section) or {}
        if not isinstance(given, Mapping):
            raise UserError(f"config {config}: {section}: a mapping of options is expected, got {given!r}")
        options |= given
    for setting in settings:
        key, found, word = setting.partition("=")
        if not found:
            raise UserError(f"--set takes key=value, got {setting!r}")
        *above, last = key.split(".")
        inner = options
        for part in above:
            held = inner.get(part)
            inner[part] = inner = dict(held) if isinstance(held, Mapping) else {}
        inner[last] = None if word in EMPTY else word  # which the option reads by its type
        if word.startswith(("[", "{")):
            with suppress(*NOT_YAML):
                inner[last] = yaml.safe_load(word)
    return options


@contextmanager
def quiet() -> Iterator[None]:
    """Keep diffusers' and transformers' progress bars and remarks off the terminal, where the findings belong."""
    import diffusers.utils.logging
    import transformers.utils.logging

    loggers = diffusers.utils.logging, transformers.utils.logging
    levels = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
            logger.enable_progress_bar()


def conform_method(method: type[DistillMethod[Any]], options: Mapping[str, Any]) -> list[Outcome]:
    """Run every check of a method on it, on exact roles of toy size, with a progress bar.

    One with ``optional_roles`` is checked without them, and with all.

    Raises:
        UserError: for a wrong option.
    """
    subject = MethodSubject(method, options)
    _ = subject.config
    total = len(METHOD_CHECKS)
    outcomes = list(tracked(examine(subject, METHOD_CHECKS), "conformance", total=total))
    if not method.optional_roles:
        return outcomes
    full = tracked(examine(replace(subject, optional=method.optional_roles), METHOD_CHECKS), "all roles", total=total)
    added = f"with the optional {', '.join(method.optional_roles)}: "
    worse = {one.name: replace(one, message=added + one.message) for one in full if one.result == "FAILED"}
    return [one if one.result == "FAILED" else worse.get(one.name, one) for one in outcomes]


def idle_roles(method: type[DistillMethod[Any]], options: Mapping[str, Any]) -> list[str]:
    """Trainable roles that no step of the checks trains; none for a method that cannot begin, as the checks tell."""
    with suppress(Exception):
        return untrained(MethodSubject(method, options).begun()[0])
    return []


def conform(
    family: type[DistillAdapter[Any]],
    options: Mapping[str, Any],
    prompts: tuple[str, str],
    device: str,
    tiny: str | None = None,
) -> list[Outcome]:
    """Build the adapter and run every check on it, with a progress bar.

    ``tiny`` names the family whose tiny pipeline is taken; ``options`` go over its own.

    Raises:
        UserError: for a wrong option, or an unreadable model folder.
    """
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder, quiet() if family.Config.pipelines else nullcontext():
        own = {} if tiny is None else tiny_options(tiny, Path(folder) / "tiny")
        if family.Config.model_fields["path"].is_required() and "path" not in {**own, **options}:
            raise UserError("no model is named: give its folder as --set path=FOLDER, or --tiny for random weights")
        adapter = family(validate(family.Config, {**own, **options}, "of the model"), device)
        subject = Subject(adapter, prompts, Path(folder))
        return list(tracked(examine(subject), "conformance", total=len(CHECKS)))
