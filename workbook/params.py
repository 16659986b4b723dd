"""`params.yaml`: what the pipeline runs, and where the images are; YAML that is read strictly."""

import copy
import re
from pathlib import Path
from typing import Any

import yaml

from sitlib.strict import ConfigError
from workbook.paths import ROOT


def pipeline_params() -> dict[str, Any]:
    """Content of `params.yaml`: the profile, the folders of images and the runs of every stage.

    Raises:
        ValueError: it cannot be read, or names no profile.
    """
    params = read_yaml(ROOT / "params.yaml")
    if not isinstance(params.get("profile"), str):
        raise ValueError("params.yaml needs a line such as `profile: quick`.")
    return params


def split_run(run: str) -> tuple[str, int]:
    """Variant and seed of a run: "sit4-seed0" -> ("sit4", 0).

    Raises:
        ValueError: it is not named so.
    """
    variant, _, seed = str(run).rpartition("-seed")
    if not variant or not re.fullmatch("0|[1-9][0-9]*", seed):  # one name for each
        raise ValueError(f"{run!r} is no run: write <variant>-seed<number>, such as sit4-seed0.")
    return variant, int(seed)


def seeds_by_variant(runs: list[str] | dict[str, Any]) -> dict[str, list[int]]:
    """Variant -> its seeds, of a list of runs such as `tokenizers` in params.yaml."""
    seeds: dict[str, list[int]] = {}
    for variant, seed in map(split_run, runs):
        seeds.setdefault(variant, []).append(seed)
    return seeds


def fill_in(values: Any, parameters: dict[str, Any]) -> Any:
    """Plain values with every `${name}` in a text replaced by that text of params.yaml.

    Raises:
        ConfigError: there is no such text.
    """

    def text(match: re.Match) -> str:
        if not isinstance(found := parameters.get(match[1]), str):
            names = ", ".join(key for key, x in parameters.items() if isinstance(x, str))
            raise ConfigError(
                f"the path {values!r} names {match[0]}, which params.yaml does not have as a text; "
                f"it has {names or 'none'}."
            )
        return found

    if isinstance(values, dict):
        return {key: fill_in(value, parameters) for key, value in values.items()}
    return re.sub(r"\$\{(\w+)\}", text, values) if isinstance(values, str) else values


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key that stands twice in a mapping; PyYAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            problem = f"the key {twice.pop()} is there twice"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Content of a YAML file.

    Raises:
        ConfigError: it is no valid YAML, no mapping, or a key stands in it twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path.name} is not valid YAML: {reason}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must be a mapping of keys to values.")
    return values


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, mapping by mapping; lists are replaced."""
    merged = dict(base)
    for key, value in changes.items():
        is_section = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if is_section else value
    return merged


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Values of a whole profile (`to_dict`) with those at dotted keys, which it has, replaced."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.get(name, {}) if isinstance(section, dict) else {}
        if last not in section:
            raise ConfigError(f"a change of {key}, which the profile does not have.")
        section[last] = value
    return values
