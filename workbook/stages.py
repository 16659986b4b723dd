"""The stages of the pipeline: what `python -m workbook STAGE key=value ...` runs.

A stage is a notebook or a function, and depends on all that the notebook, or the function's module,
imports (`workbook.code_hashes`), and on the files and parameters that dvc.yaml lists.
"""

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from sitlib.files import atomic_write
from sitlib.strict import to_dict
from workbook.code_hashes import code_hashes, digest, notebook_hashes
from workbook.params import pipeline_params, split_run
from workbook.paths import ROOT, resolve
from workbook.profile import Profile, load_profile

# Stage -> notebook: the stage that trains is named by what it does, others by their file.
TRAINING = {
    "train_tokenizer": "02a_tokenizer_training",
    "train_autoregressive": "03a_autoregressive_training",
    "train_text": "04a_text_training",
}
NOTEBOOKS = TRAINING | {
    path.stem.partition("_")[2]: path.stem
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    if path.stem not in TRAINING.values()
}


class Function(NamedTuple):
    """A function of the profile and of keys, which a stage without a notebook runs."""

    module: str  # in this package
    name: str
    scores: str = ""  # JSON file of what it returns, in metrics/; "": it writes its files itself
    keys: Mapping[str, Any] = {}  # besides those of the command line


GENERATION = "evaluate.generation"
FUNCTIONS = {
    "prepare": Function("stages", "prepare"),
    "weights": Function("preflight", "fetch_and_check"),
    "evaluate_tokenizer": Function("evaluate.tokenizer", "evaluate_tokenizer", "tokenizer/{run}"),
    "extract_codes": Function("codes", "extract_run"),
    "real_features": Function(GENERATION, "write_features", keys={"section": "autoregressive"}),
    "evaluate_autoregressive": Function(GENERATION, "evaluate_generator", "generation/{run}"),
    "decode_again": Function(GENERATION, "decode_again", "generation/{run}"),
    "throughput": Function("costs", "throughput", "throughput"),
    "dual_encoder": Function("evaluate.text", "trained_dual_encoder"),
    "real_text_features": Function(GENERATION, "write_features", keys={"section": "text"}),
    "evaluate_text": Function(GENERATION, "evaluate_generator", "text/{run}"),
    "evaluate_applications": Function("applications", "evaluate_applications", "applications"),
    "row": Function("study", "judge_row"),
    "trial": Function("study", "judge_recipe"),
    "generator_trial": Function(
        "study", "judge_generator_recipe", "study/generator_trials/{trial}"
    ),
    "generator": Function("study", "run_generator", "study/generators/{generator}"),
    "rates": Function("rates", "rates", "study/rates/{format}"),
    "efficiency": Function("costs", "efficiency", "study/cost"),
    "examples": Function("site.examples", "write_examples"),
    "report": Function("site.build", "write_report"),
}
# Modules that a stage does not depend on, by how their path begins. The weights are a dependency
# of the stages that read them, so how they were fetched is not.
FETCHING = ("sitlib/metrics/weights",)
# Restyling a figure must not train again; and codes are a dependency of what is trained on them.
SHOWING = ("workbook/names.py", "workbook/figures/", "workbook/site/", "sitlib/sample/")
# Nor do metrics of finished models, but for the networks that are losses.
SHOWING += (
    "sitlib/metrics/reconstruction",
    "sitlib/metrics/generation",
    "sitlib/metrics/statistics",
)
TOKENIZING = ("workbook/tokenizers.py", "sitlib/model/tokenizer.py")
WITHOUT = {
    "weights": (),
    "train_tokenizer": FETCHING + SHOWING,
    "train_autoregressive": FETCHING + SHOWING + TOKENIZING,
    "train_text": FETCHING + SHOWING + TOKENIZING,
    # The study has no more from there than the means in its table of results.
    **dict.fromkeys(
        ("row", "trial", "generator_trial", "generator", "throughput", "efficiency"),
        (*FETCHING, "workbook/effects.py", "workbook/names.py", "workbook/figures/"),
    ),
}


def stage_hashes(stage: str) -> dict[str, str]:
    """Hashes of the notebook or module that a stage runs, and of all modules that it imports."""
    without = WITHOUT.get(stage, FETCHING)
    if stage in NOTEBOOKS:
        return notebook_hashes(ROOT / f"notebooks/{NOTEBOOKS[stage]}.ipynb", without)
    file = f"workbook/{FUNCTIONS[stage].module.replace('.', '/')}.py"
    return {f"workbook/stages.py:{stage}": digest(FUNCTIONS[stage])} | code_hashes([file], without)


def prepare(profile: Profile) -> None:
    """Write what other stages depend on: `build/code/STAGE.json`, hashes of what they run,
    `build/profiles/*.yaml`, profiles with every default, and `build/runs.yaml`, trained models."""
    from workbook.runs import AutoregressiveRun, TokenizerRun

    texts = {
        f"build/code/{stage}.json": json.dumps(stage_hashes(stage), indent=1) + "\n"
        for stage in (*NOTEBOOKS, *FUNCTIONS)
        if stage not in ("prepare", "report")
    }
    for path in (ROOT / "profiles").glob("*.yaml"):
        values = to_dict(load_profile(path.stem))
        texts[f"build/profiles/{path.name}"] = yaml.safe_dump(values, sort_keys=False)
    params, runs = pipeline_params(), {}
    for name in ("tokenizers", "generators", "text_generators"):
        run_class = TokenizerRun if name == "tokenizers" else AutoregressiveRun
        listed = {run: run_class.of(profile, *split_run(run)) for run in params[name]}
        runs[name] = {run: to_dict(values) for run, values in listed.items()}
    texts["build/runs.yaml"] = yaml.safe_dump(runs, sort_keys=False)
    for folder in ("build/code", "build/profiles"):  # without those that are gone
        shutil.rmtree(resolve(folder), ignore_errors=True)
    for name, text in texts.items():
        with atomic_write(resolve(name)) as file:
            file.write_text(text, encoding="utf-8")


# -- edits of code while the pipeline runs -----------------------------------------------------
# DVC looks at the dependencies of a stage when it ends, so code that is edited during a long training
# would be taken for what was trained (https://github.com/iterative/dvc/issues/11058). Entries of
# study/params.yaml are not looked at: their results say what they are of.


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Names whose values are not what they were, or None."""
    names = sorted(name for name in {**before, **after} if before.get(name) != after.get(name))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else None


def stale(stage: str, profile: str) -> str | None:
    """Names of code and keys of the profile that are not what DVC was told of, or None."""
    told = (ROOT / f"build/code/{stage}.json", ROOT / f"build/profiles/{profile}.yaml")
    if "DVC_STAGE" not in os.environ or not all(path.exists() for path in told):
        return None
    code, values = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in told)

    def named(values: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{key} in the profile {profile}": value for key, value in values.items()}

    now = stage_hashes(stage) | named(to_dict(load_profile(profile)))
    return changed(code | named(values), now)
