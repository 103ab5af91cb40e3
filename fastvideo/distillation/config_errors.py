"""What is wrong with a config, for people: the key's path, and the nearest right key for a wrong one."""

from __future__ import annotations

import difflib
from types import UnionType
from typing import Any, get_args

from pydantic import BaseModel


def explain(schema: type[BaseModel], problem: dict[str, Any]) -> str:
    """One line about a problem that pydantic found: the key's full path, and what is wrong there."""
    path = ".".join(str(part) for part in problem["loc"]) or "(top level)"
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        given = f" (got {problem['input']!r})" if problem["type"] not in ("missing", "value_error") else ""
        return f"{path}: {message}{given}"
    known = _fields_at(schema, problem["loc"][:-1])
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"{path}: unknown key; {hint}"


def _fields_at(schema: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys that are allowed at a location of the config."""
    current: Any = schema
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            current = current.model_fields[str(part)].annotation
        else:  # a mapping of sections, such as roles
            current = current.__args__[1]
        options = [one for one in get_args(current) if one is not type(None)]
        if isinstance(current, UnionType) and len(options) == 1:  # a section that may be left out
            current = options[0]
    return list(current.model_fields)
