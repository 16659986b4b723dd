"""Run a stage of the pipeline: `python -m workbook STAGE key=value ...`.

    python -m workbook train_tokenizer run=sit4-seed0
    python -m workbook evaluate_tokenizer run=sit4-seed0 profile=smoke
    python -m workbook describe paper gpu=A100 variants=[sit4]   # what a profile takes, see
    describe.py

Paths of reports, metrics and models follow from the names of the stage and of the run. The profile
is that of params.yaml unless it is given. dvc.yaml lists the same commands, so that `dvc repro`
runs those that are not up to date; `python -m workbook` alone lists the stages.
"""

import inspect
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from sitlib.files import write_json
from workbook.code_hashes import read_notebook
from workbook.errors import command
from workbook.machine import lock_hash, machine
from workbook.params import pipeline_params, split_run
from workbook.paths import resolve
from workbook.profile import load_profile
from workbook.stage_inputs import changed, inputs, stale_code
from workbook.stages import FUNCTIONS, NOTEBOOKS, PIPELINE

NAMING = ("run", "row", "rung", "trial")  # keys whose values name the outputs of a stage
UNTIMED = ("prepare", "report")  # the one takes no time, the other shows the times


def value(text: str) -> Any:
    """A value of the command line: YAML (`0` an int, `[a, b]` a list) in which `1e-4` is a float.

    Raises:
        ValueError: it is no YAML.
    """
    if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text):
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{text!r} is not a YAML value: quote it.") from None


def parsed(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Stage and keys of a command line.

    Raises:
        ValueError: there is no such stage, or an argument is not `key=value`.
    """
    stage, *pairs = arguments
    if stage not in NOTEBOOKS and stage not in FUNCTIONS:
        stages = ", ".join(sorted([*NOTEBOOKS, *FUNCTIONS]))
        raise ValueError(f"There is no stage {stage!r}; there are {stages}.")
    if wrong := [pair for pair in pairs if not re.match(r"\w+=", pair)]:
        raise ValueError(f"{wrong[0]!r} is not of the form key=value.")
    return stage, {key: value(text) for key, _, text in (pair.partition("=") for pair in pairs)}


def run(stage: str, keys: Mapping[str, Any]) -> None:
    """Run a stage, and record how long it took, and where, in `metrics/seconds`.

    Raises:
        ValueError: the keys are not those of the stage, or an input changed while it ran.
    """
    name = keys.get("profile", pipeline_params()["profile"])
    keys = {key: value for key, value in keys.items() if key != "profile"}
    names = [str(keys[key]) for key in NAMING if key in keys]
    record: dict[str, Any] = {"stage": "@".join([stage, *names])}
    if edited := stale_code(stage):
        raise ValueError(f"Edited since this run of the pipeline began: {edited}. Start it again.")
    before, began = inputs(stage, keys), time.perf_counter()
    if stage in NOTEBOOKS:
        record["report"] = run_stage_notebook(stage, name, keys)
    else:
        function = FUNCTIONS[stage]
        check_keys(function, stage, None, **keys)
        function(load_profile(name), **keys)
    if edited := changed(before, inputs(stage, keys)):
        raise ValueError(
            f"Edited while {record['stage']} ran: {edited}. What it made may be of either version, so it "
            "does not count: run it again."
        )
    if stage not in UNTIMED:
        seconds = round(time.perf_counter() - began, 1)
        record |= {"seconds": seconds, "machine": machine(), "lock": lock_hash()}
        write_json(resolve(f"metrics/seconds/{'-'.join([stage, *names])}.json"), record)


def check_keys(function: Callable, stage: str, *arguments: Any, **keys: Any) -> None:
    """Raise ValueError unless a function takes these keys."""
    try:
        inspect.signature(function).bind(*arguments, **keys)
    except TypeError as error:
        raise ValueError(f"The stage {stage}: {error}.") from None


def run_stage_notebook(stage: str, profile: str, keys: Mapping[str, Any]) -> str:
    """Execute the notebook of a stage; the name of its report."""
    from workbook.run_notebook import parameters_cell, run_notebook

    path = resolve(f"notebooks/{NOTEBOOKS[stage]}.ipynb")
    report = "-".join([path.stem, *(str(keys[key]) for key in NAMING if key in keys)])
    parameters = dict(keys)
    if "run" in parameters:
        parameters["variant"], parameters["seed"] = split_run(parameters.pop("run"))
    usual = {"profile": profile, **PIPELINE}
    names = parameters_cell(read_notebook(path))
    parameters = {name: usual[name] for name in usual if name in names} | parameters
    run_notebook(path, resolve(f"reports/{report}.ipynb"), parameters)
    return report


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        stages = "\n    ".join([*NOTEBOOKS, *FUNCTIONS])
        print(f"{__doc__}\nStages:\n    {stages}")
    elif arguments[0] == "describe":
        from workbook.describe import describe

        names = [text if "=" in text else f"profile={text}" for text in arguments[1:]]
        keys = {key: value(text) for key, _, text in (name.partition("=") for name in names)}
        check_keys(describe, "describe", **keys)
        describe(**keys)
    else:
        run(*parsed(arguments))


if __name__ == "__main__":
    command(main)
