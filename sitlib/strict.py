"""Configurations from plain values, strictly: every mistake is a sentence that says what to do."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A configuration that cannot be used: which key, and what would be accepted."""


def require(condition: bool, sentence: str) -> None:
    """Raise ValueError with the sentence unless the condition holds."""
    if not condition:
        raise ValueError(sentence)


def from_dict(cls: type[Config], values: Mapping[str, Any], where: str = "configuration") -> Config:
    """Make a dataclass from plain values; `where`, such as the name of a file, begins sentences."""
    try:
        # Through JSON: strict about types, yet mappings become dataclasses.
        return _adapter(cls).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        sentences = [_sentence(cls, problem, where) for problem in error.errors()]
        raise ConfigError("\n".join(sentences)) from None


@cache  # making one takes longer than using it
def _adapter(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a dataclass, which `from_dict` takes back."""
    return asdict(config)


def digest(*values: Any) -> str:
    """16 hexadecimal digits that name dataclasses and plain values; equal ones of equal values."""
    text = json.dumps(values, sort_keys=True, default=to_dict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def require_known(name: str, names: Iterable[str], what: str) -> None:
    """Raise ConfigError unless `name` is one of `names`."""
    if name not in (names := list(names)):
        there = ", ".join(names)
        raise ConfigError(f"{what}: {name!r} is not known{nearest(name, names)}; there is {there}.")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return " (did you mean ...?)" if one of `names` is like `name`, else ""."""
    match = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _sentence(cls: type, problem: Mapping[str, Any], where: str) -> str:
    """One line about a problem that pydantic found in a configuration of class `cls`."""
    *parents, last = map(str, problem["loc"] or ("",))
    key, kind, value = ".".join([*parents, last]), problem["type"], problem["input"]
    if kind == "unexpected_keyword_argument":
        names = _field_names(cls, parents)
        near, known = nearest(last, names), ", ".join(names)
        return f"{where}: {key} is not a known key{near}; known are {known}."
    if kind in ("missing", "missing_argument"):
        return f"{where}: {key} is missing; add it."
    if kind == "value_error":  # of several lines where it is about variants, put together later
        lines = str(problem["ctx"]["error"]).split("\n")
        prefix = f"{where}: {key}: " if key else f"{where}: "
        return "\n".join(f"{prefix}{line.rstrip('.')}." for line in lines)
    is_number = isinstance(value, str) and "float" in kind
    hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if is_number else ""
    message = re.sub("^(Input|String) should", "must", problem["msg"])
    return f"{where}: {key} {message}, it is {value!r}{hint}."


def _field_names(cls: Any, path: list[str]) -> list[str]:
    """Keys of the dataclass at a path of keys below `cls`."""
    for key in path:
        cls = get_type_hints(cls).get(key, cls) if is_dataclass(cls) else cls
        cls = next((item for item in get_args(cls) if is_dataclass(item)), cls)
    return [field.name for field in fields(cls)] if is_dataclass(cls) else []
