"""Strict dataclasses: unknown keys, wrong types and impossible combinations are refused with a sentence that says what to do."""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError


class ConfigError(ValueError):
    """A profile or parameter that cannot be used; the message says which key and what would be accepted."""


def require(condition: bool, sentence: str) -> None:
    """Raises ValueError with the sentence unless the condition holds."""
    if not condition:
        raise ValueError(sentence)


def require_seed(seed: int, name: str = "seed") -> None:
    """Raises ValueError for a seed that no random generator takes."""
    require(seed >= 0, f"{name} must not be negative, it is {seed}")


class Strict:
    """Base of every section: frozen by its decorator; extra keys and silent type conversions are refused."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)


def from_dict(cls: type, values: dict[str, Any], where: str = "configuration") -> Any:
    """A dataclass of this module from plain values, strictly.

    Raises:
        ConfigError: one line for every key that is wrong, with the nearest known key where one was misspelt.
    """
    try:
        return _adapter(cls).validate_json(
            json.dumps(values)
        )  # strict about types, yet takes mappings for classes
    except ValidationError as error:
        raise ConfigError(
            "\n".join(_sentence(cls, problem, where) for problem in error.errors())
        ) from None


@cache  # making one takes longer than using it
def _adapter(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a dataclass of this module; `from_dict` takes them back."""
    return dataclasses.asdict(config)


def optional_key(default: Any) -> Any:
    """A field for a key that may be left out and then means `default`.

    At its default it is no part of a `digest`, so that a key that is new changes the name of nothing that was made without it.
    """
    return dataclasses.field(default=default, metadata={"optional": True})


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that name a combination of configurations and plain values; equal parts give equal digests."""
    text = json.dumps([_named(part) for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _named(part: Any) -> Any:
    """Plain values of what a digest names, without optional keys at their defaults."""
    if dataclasses.is_dataclass(part):
        return {
            field.name: _named(getattr(part, field.name))
            for field in dataclasses.fields(part)
            if not (field.metadata.get("optional") and getattr(part, field.name) == field.default)
        }
    if isinstance(part, dict):
        return {key: _named(value) for key, value in part.items()}
    return [_named(item) for item in part] if isinstance(part, (list, tuple)) else part


def changes_of(own: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """The keys in which a variant's part `name` differs from the section's."""
    changes = own.get(name, {})
    if not isinstance(changes, dict):
        raise ConfigError(
            f"{where}.{name} lists the keys in which the variant differs, it is {changes!r}."
        )
    return changes


def known(name: str, names: dict[str, Any], what: str) -> None:
    """Raises ConfigError unless `name` is one of `names`."""
    if name not in names:
        raise ConfigError(
            f"{what}: {name!r} is not known; the profile has {', '.join(names)}{nearest(name, names)}."
        )


def nearest(name: str, names) -> str:
    """ " (did you mean ...?)" where one of the known names is like the unknown one, else nothing."""
    match = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _sentence(cls: type, problem: Mapping[str, Any], where: str) -> str:
    """One pydantic problem as a sentence that names the key and what would be accepted."""
    key = ".".join(str(part) for part in problem["loc"])
    kind, value = problem["type"], problem["input"]
    if kind == "unexpected_keyword_argument":
        fields = _fields_at(cls, problem["loc"][:-1])
        return f"{where}: {key} is not a known key{nearest(str(problem['loc'][-1]), fields)}; known here: {', '.join(fields)}."
    if kind in ("missing", "missing_argument"):
        return f"{where}: {key} is missing; add it."
    if kind == "value_error":
        lines = str(problem["ctx"]["error"]).split(
            "\n"
        )  # several where a variant, put together later, lacks several keys
        return "\n".join(
            f"{where}: {key + ': ' if key else ''}{line.rstrip('.')}." for line in lines
        )
    hint = (
        " (YAML reads 1e-3 as text: write 1.0e-3)"
        if isinstance(value, str) and "float" in kind
        else ""
    )
    return f"{where}: {key}: {problem['msg'].lower()}, it is {value!r}{hint}."


def _fields_at(cls: type, location: tuple) -> list[str]:
    for part in location:
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        cls = cast(type, types.get(part, cls))
    return [field.name for field in dataclasses.fields(cls)]
