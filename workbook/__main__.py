"""Run a stage of the pipeline: `python -m workbook STAGE key=value ...`.

    python -m workbook train_tokenizer run=sit4-seed0
    python -m workbook evaluate_tokenizer run=sit4-seed0 profile=smoke
    python -m workbook describe paper gpu=A100 variants=[sit4]   # what a profile takes

Paths of reports, metrics and models follow from the names of the stage and of the run. The profile
is that of params.yaml unless it is given. dvc.yaml lists the same commands, so that `dvc repro`
runs those that are not up to date; `python -m workbook` alone lists the stages.
"""

import inspect
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import yaml

from sitlib.files import write_json
from sitlib.strict import require

try:
    from workbook import code_hashes
    from workbook.errors import command
    from workbook.machine import lock_hash, machine
    from workbook.params import pipeline_params, split_run
    from workbook.paths import resolve
    from workbook.profile import Profile, load_profile
    from workbook.stages import FUNCTIONS, NOTEBOOKS, changed, stage_hashes, stale
except ModuleNotFoundError as error:
    sys.exit(f"{error}: in a clone of this repository, pip install '.[lab]' for the workbook.")

# Keys whose values name the outputs of a stage.
NAMING = ("run", "row", "trial", "generator", "format")
UNTIMED = ("prepare", "report")  # the one takes no time, the other shows the times


def values(arguments: Sequence[str]) -> dict[str, Any]:
    """Keys and values of `key=value` arguments, in YAML: `0` is an int, `[a, b]` a list.

    Raises:
        ValueError: an argument is not of this form.
    """
    wrong = ", ".join(text for text in arguments if not re.match(r"\w+=.", text))
    require(not wrong, f"{wrong}: arguments are of the form key=value.")
    pairs = (argument.partition("=") for argument in arguments)
    try:
        return {key: yaml.safe_load(text) for key, _, text in pairs}
    except yaml.YAMLError as error:
        raise ValueError(f"{' '.join(arguments)}: a value is no YAML, quote it.") from error


def call(function: Callable, stage: str, *arguments: Any, **keys: Any) -> Any:
    """Call the function of a stage. Raises ValueError if these are not its keys."""
    try:
        inspect.signature(function).bind(*arguments, **keys)
    except TypeError as error:
        raise ValueError(f"The stage {stage}: {error}.") from None
    return function(*arguments, **keys)


def run(stage: str, keys: Mapping[str, Any]) -> None:
    """Run a stage, and record how long it took, and where, in `metrics/seconds`.

    Raises:
        ValueError: there is no such stage, the keys are not its own, or its code changed while it
            ran.
    """
    if stage not in NOTEBOOKS and stage not in FUNCTIONS:
        stages = ", ".join(sorted([*NOTEBOOKS, *FUNCTIONS]))
        raise ValueError(f"There is no stage {stage!r}; there are {stages}.")
    profile = keys.get("profile", pipeline_params()["profile"])
    keys = {key: value for key, value in keys.items() if key != "profile"}
    names = [str(keys[key]) for key in NAMING if key in keys]
    record: dict[str, Any] = {"stage": "@".join([stage, *names])}
    if edited := stale(stage, profile):
        raise ValueError(f"Edited since this run of the pipeline began: {edited}. Start it again.")
    before, began = stage_hashes(stage), time.perf_counter()
    if stage in NOTEBOOKS:
        record["report"] = run_stage_notebook(stage, profile, keys)
    else:
        run_function(stage, load_profile(profile), keys)
    code_hashes.module.cache_clear()
    if edited := changed(before, stage_hashes(stage)):
        raise ValueError(
            f"Edited while {record['stage']} ran: {edited}. What it made may be of either version, "
            "so it does not count: run it again."
        )
    if stage not in UNTIMED:
        seconds = round(time.perf_counter() - began, 1)
        record |= {"seconds": seconds, "machine": machine(), "lock": lock_hash()}
        write_json(resolve(f"metrics/seconds/{'-'.join([stage, *names])}.json"), record)


def split(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with the variant and the seed of a run instead of its name."""
    variant, seed = split_run(str(keys.get("run", "")))
    return {"variant": variant, "seed": seed} | {key: keys[key] for key in keys if key != "run"}


def run_function(stage: str, profile: Profile, keys: Mapping[str, Any]) -> None:
    """Call the function of a stage, and write the scores that it returns."""
    module, name, scores, more = FUNCTIONS[stage]
    function = getattr(import_module(f"workbook.{module}"), name)
    names = inspect.signature(function).parameters
    given = {**(split(keys) if "variant" in names else keys), **more}
    given |= {"pipeline": True} if "pipeline" in names else {}
    result = call(function, stage, profile, **given)
    if scores:
        write_json(resolve(f"metrics/{scores.format(**keys)}.json"), result)


def run_stage_notebook(stage: str, profile: str, keys: Mapping[str, Any]) -> str:
    """Execute the notebook of a stage; the name of its report."""
    from workbook.run_notebook import parameters_cell, run_notebook

    path = resolve(f"notebooks/{NOTEBOOKS[stage]}.ipynb")
    report = "-".join([path.stem, *(str(keys[key]) for key in NAMING if key in keys)])
    parameters = split(keys) if "run" in keys else dict(keys)
    usual = {"profile": profile, "pipeline": True, "live": False}  # where a notebook has them
    names = parameters_cell(code_hashes.read_notebook(path))
    parameters = {name: usual[name] for name in usual if name in names} | parameters
    run_notebook(path, resolve(f"reports/{report}.ipynb"), parameters)
    return report


def main() -> None:
    stage, *arguments = sys.argv[1:] or ["--help"]
    if stage in ("-h", "--help"):
        stages = "\n    ".join([*NOTEBOOKS, *FUNCTIONS])
        print(f"{__doc__}\nStages:\n    {stages}")
    elif stage == "describe":
        from workbook.describe import describe

        named = [text if "=" in text else f"profile={text}" for text in arguments]
        call(describe, stage, **values(named))
    else:
        run(stage, values(arguments))


if __name__ == "__main__":
    command(main)
