"""The stages of the pipeline: what `python -m workbook STAGE key=value ...` runs.

A stage is a notebook or a function, and each imports what it needs in its body: what a stage
imports is what it depends on (`workbook.code_hashes`). Functions write the files that dvc.yaml
lists as the stage's outputs.
"""

import inspect
import json
import shutil
import subprocess
import sys

import yaml

from sitlib.files import atomic_write, write_json, write_tensors
from sitlib.strict import to_dict
from workbook.code_hashes import function_hashes, notebook_hashes
from workbook.params import pipeline_params, split_run
from workbook.paths import ROOT, resolve
from workbook.profile import Profile, load_profile, read_yaml

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
# Modules that a stage does not depend on, by how their path begins. The weights are a dependency
# of the stages that read them, so how they were fetched is not.
FETCHING = ("sitlib/metrics/weights",)
# Restyling a figure must not train again; and codes are a dependency of what is trained on them.
SHOWING = ("workbook/names.py", "workbook/figures/", "workbook/site/", "sitlib/sample/")
TOKENIZING = ("workbook/tokenizers.py", "sitlib/model/tokenizer.py")
WITHOUT = {
    "weights": (),
    "train_tokenizer": FETCHING + SHOWING,
    "train_autoregressive": FETCHING + SHOWING + TOKENIZING,
    "train_text": FETCHING + SHOWING + TOKENIZING,
}


def stage_hashes(stage: str) -> dict[str, str]:
    """Hashes of the notebook or function that a stage runs, and of all modules that it imports."""
    without = WITHOUT.get(stage, FETCHING)
    if stage in NOTEBOOKS:
        return notebook_hashes(ROOT / f"notebooks/{NOTEBOOKS[stage]}.ipynb", without)
    return function_hashes("workbook/stages.py", stage, without)


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


def weights(profile: Profile) -> None:
    """Fetch the networks that judge images, and look at all images and captions that are needed."""
    from sitlib.metrics import InceptionMetrics
    from sitlib.metrics.weights import fetch_weights
    from workbook.preflight import check_images

    fetch_weights(resolve("weights"))
    if profile.tokenizer.evaluation.inception:
        InceptionMetrics()
    check_images(profile, pipeline_params())


def evaluate_tokenizer(profile: Profile, run: str) -> None:
    """Reconstruct held-out photographs, emoji and extra photographs at every resolution."""
    from workbook.evaluate.tokenizer import evaluate_tokenizer

    scores = evaluate_tokenizer(profile, *split_run(run), pipeline=True)
    write_json(resolve(f"metrics/tokenizer/{run}.json"), scores)


def extract_codes(profile: Profile, run: str, workers: int | None = None) -> None:
    """Encode wide views of all images by a frozen tokenizer."""
    from workbook.codes import extract_codes

    tokenizer, seed = split_run(run)
    variants = [*profile.autoregressive.variants, *profile.text.variants]
    generator = next(
        (v for v in variants if profile.autoregressive_variant(v).tokenizer == tokenizer), None
    )
    if generator is None:
        raise ValueError(f"No model of the profile is over codes of {tokenizer}.")
    if seed != (wanted := profile.generator_section(generator).tokenizer_seed):
        raise ValueError(
            f"{run} is listed in params.yaml, and tokenizer_seed of the profile is {wanted}: "
            "make them the same."
        )
    processes = profile.engine.data_workers if workers is None else workers
    codes = extract_codes(profile, generator, resolve(f"codes/{run}"), processes)
    shape = list(codes.train.shape[1:])
    print(f"{len(codes.train)} training and {len(codes.held_out)} held-out code maps, {shape} each")


def real_features(profile: Profile) -> None:
    """Features of real views, to which class-conditional samples are compared."""
    from workbook.evaluate.generation import REAL, real_features

    variant = next(iter(profile.autoregressive.variants))
    write_tensors(resolve(REAL), real_features(profile, variant), {})


def evaluate_autoregressive(profile: Profile, run: str) -> None:
    """Samples of a class-conditional model, their distances to real views, held-out nats."""
    from workbook.evaluate.generation import evaluate_generator

    scores = evaluate_generator(profile, *split_run(run), pipeline=True)
    write_json(resolve(f"metrics/generation/{run}.json"), scores)


def decode_again(profile: Profile, run: str, of: str, decoder: str) -> None:
    """Distances of the samples of a model that a second decoder decodes."""
    from workbook.evaluate.generation import evaluate_generator

    scores = evaluate_generator(profile, *split_run(of), split_run(decoder)[0], pipeline=True)
    write_json(resolve(f"metrics/generation/{run}.json"), scores)


def throughput(profile: Profile, rounds: int = 4) -> None:
    """Images a second and peak memory at every size, in the profile's and the paper's geometry."""
    from workbook.costs import throughput

    write_json(resolve("metrics/throughput.json"), throughput(profile, rounds))


def dual_encoder(profile: Profile) -> None:
    """Train the dual encoder of images and captions that judges text-conditional samples."""
    from workbook.evaluate.text import trained_dual_encoder

    trained_dual_encoder(profile, pipeline=True)


def real_text_features(profile: Profile) -> None:
    """Features of the real images of all prompts."""
    from workbook.evaluate.generation import REAL_TEXT, real_features

    variant = next(iter(profile.text.variants))
    write_tensors(resolve(REAL_TEXT), real_features(profile, variant), {})


def evaluate_text(profile: Profile, run: str) -> None:
    """Samples of a text-conditional model, and how often the dual encoder recognizes them."""
    from workbook.evaluate.generation import evaluate_generator

    scores = evaluate_generator(profile, *split_run(run), pipeline=True)
    write_json(resolve(f"metrics/text/{run}.json"), scores)


def evaluate_applications(profile: Profile) -> None:
    """Rates, upsampling, editing and previews, measured on held-out images."""
    from workbook import applications

    scores = applications.evaluate_applications(profile, pipeline=True)
    write_json(resolve(applications.FILE), scores)


def core_ablation(profile: Profile, row: str) -> None:
    """Train and judge a row of the ablations with one seed, without a model over its codes."""
    from workbook.ablate import forget, load_grid, run_row

    scores = run_row(load_grid(), row, core=True)
    write_json(resolve(f"metrics/core_ablations/{row}.json"), scores)
    forget(row)


def row(profile: Profile, row: str) -> None:
    """Train and judge a row of the ablations with every seed."""
    from workbook.ablate import forget, load_grid, run_row

    write_json(resolve(f"metrics/ablations/{row}.json"), run_row(load_grid(), row))
    forget(row)


def rung(profile: Profile, rung: str) -> None:
    """Train and judge a model of one size over the codes of a tokenizer of the pipeline."""
    from workbook.ablate import load_grid, run_rung

    write_json(resolve(f"metrics/ladder/{rung}.json"), run_rung(load_grid(), rung))


def text(profile: Profile, trial: str) -> None:
    """Train and judge a text-conditional model for longer, or otherwise, than the pipeline's."""
    from workbook.ablate import load_grid, run_text_trial

    write_json(resolve(f"metrics/text_trials/{trial}.json"), run_text_trial(load_grid(), trial))


def efficiency(profile: Profile) -> None:
    """Time, memory and operations of SIT and ViT-VQGAN from 64 to 1024 px."""
    from workbook.costs import efficiency

    grid = read_yaml(resolve("ablations/params.yaml"))  # whose stages are all of its own profile
    write_json(resolve("metrics/efficiency/cost.json"), efficiency(load_profile(grid["profile"])))


def examples(profile: Profile) -> None:
    """Photographs through every tokenizer, for the front page, and the picture of the project."""
    from workbook.site.examples import write_examples

    write_examples(profile, resolve("reports/examples.json"), resolve("reports/overview.png"))


def report(profile: Profile) -> None:
    """Results in one file, the pages of all reports, the front page and the API documentation."""
    from workbook.site.build import build
    from workbook.site.results import write_results

    write_results(ROOT)
    shutil.rmtree(resolve("reports/api"), ignore_errors=True)
    pages = ["-m", "pdoc", "-d", "google", "--no-show-source", "-o", "reports/api", "sitlib"]
    subprocess.run([sys.executable, *pages], check=True, cwd=ROOT)
    build(ROOT)


FUNCTIONS = {
    name: function
    for name, function in list(globals().items())
    if inspect.isfunction(function) and function.__module__ == __name__ and name != "stage_hashes"
}
