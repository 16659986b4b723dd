"""Where images are, said in one place: a path in a profile may name a folder of `params.yaml` as `${data_folder}`, as `dvc.yaml` does."""

import re
from functools import cache

import yaml

from sitlib.config.strict import require
from sitlib.paths import resolve

PARAMETERS = "params.yaml"


def filled_in(path: str) -> str:
    """`path` with every `${name}` replaced by that value of `params.yaml`.

    Raises:
        ValueError: `params.yaml` has no such text.
    """
    return re.sub(r"\$\{(\w+)\}", _value, path)


def _value(found: re.Match) -> str:
    file = resolve(PARAMETERS)
    values = _values(file.stat().st_mtime_ns) if file.exists() else {}
    texts = [name for name, value in values.items() if isinstance(value, str)]
    require(
        found[1] in texts,
        f"the path {found.string!r} names {found[0]}, which {PARAMETERS} does not have as a text; it has {', '.join(texts) or 'none'}",
    )
    return values[found[1]]


@cache
def _values(mtime_ns: int) -> dict:
    return yaml.safe_load(resolve(PARAMETERS).read_text()) or {}
