"""The study in `study/params.yaml`: tokenizers at several seeds, trials of recipes, generators.

Each entry is the profile with changes, trained and judged; its result is one JSON file.
`python -m workbook.study` writes the list of all results, `study/results.csv`.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sitlib.data import training_views
from sitlib.evaluate import (
    encode,
    error_by_scale,
    features_of,
    held_out_nats,
    reconstruct,
)
from sitlib.files import atomic_write, write_json
from sitlib.metrics import (
    METRICS,
    code_counts,
    codebook_statistics,
    coded_bits,
    evaluate_reconstructions,
    frechet_distance,
    reconstruction_values,
)
from sitlib.metrics.weights import fetch_weights
from sitlib.model.config import STRICT
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import best_device
from sitlib.strict import digest, from_dict, require, require_known, to_dict
from workbook.codes import load_codes
from workbook.describe import flops
from workbook.errors import command
from workbook.evaluate import generation
from workbook.evaluate.writing import by_passes, half_written
from workbook.generators import trained_generator
from workbook.params import changed, merge, read_yaml
from workbook.paths import resolve
from workbook.profile import Profile, load_profile
from workbook.runs import AutoregressiveRun, TokenizerRun
from workbook.tokenizers import held_out_set, open_split, trained_tokenizer

GRID = "study/params.yaml"
LIST = "study/results.csv"
RESULTS = "metrics/study"  # a folder of each kind
CODED_VIEWS = 1600  # training views whose codes give the frequencies of entropy coding
# A profile with one model alone: the others' tokenizers need not be there.
ALONE = {"autoregressive.samplers": {}, "text.variants": {}, "text.samplers": {}}
Seeds = Annotated[list[NonNegativeInt], Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class Row:
    """A tokenizer that is compared with others."""

    group: str
    of: str  # variant of the profile
    title: str = ""  # of a row of the headline
    changes: dict[str, Any] = Field(default_factory=dict)  # of its keys
    seeds: Seeds = Field([0, 1, 2])


@dataclass(frozen=True, config=STRICT)
class Trials:
    """Changes of the recipe, each tried with every model alike on photographs that it may see."""

    models: dict[str, dict[str, Any]]  # variants of the profile, and changes of their keys
    common: dict[str, Any]  # dotted keys of the profile that all trials change
    changes: dict[str, dict[str, Any]]  # trial -> further ones


@dataclass(frozen=True, config=STRICT)
class Generator:
    """A model over codes of the pipeline, `of` the profile, that is trained otherwise."""

    of: str
    changes: dict[str, Any]  # dotted keys of the profile, in its sections of generators
    seeds: Seeds = Field([0, 1, 2])

    def __post_init__(self):
        sections = ("autoregressive.", "text.")
        wrong = ", ".join(key for key in self.changes if not key.startswith(sections))
        require(not wrong, f"a generator's changes are of autoregressive or text, not {wrong}")


@dataclass(frozen=True, config=STRICT)
class Grid:
    """Content of study/params.yaml. Models are `row_<row>`, `<trial>_<variant>`."""

    profile: str  # where everything comes from that is not said here
    trials: Trials
    generator_trials: Trials  # of the class-conditional models
    rows: dict[str, Row]
    generators: dict[str, Generator]

    def __post_init__(self):
        sentence = "generator_trials.models are taken as the profile has them: write {} after each"
        require(not any(self.generator_trials.models.values()), sentence)

    def row_profile(self, name: str) -> Profile:
        """The profile with the row as its only tokenizer."""
        require_known(name, self.rows, "row of the study")
        return self._alone(f"row_{name}", self.rows[name].of, self.rows[name].changes, {})

    def trial_profile(self, name: str, model: str) -> Profile:
        """The profile with a trial's changes, and `<name>_<model>` as its only tokenizer."""
        require_known(name, self.trials.changes, "trial")
        changes = self.trials.common | self.trials.changes[name]
        require_known(model, self.trials.models, "model of the trials")
        return self._alone(f"{name}_{model}", model, self.trials.models[model], changes)

    def generator_trial_profile(self, name: str) -> Profile:
        """The profile with a trial's changes of generators."""
        trials = self.generator_trials
        require_known(name, trials.changes, "trial of generators")
        return self._changed(name, ALONE | trials.common | trials.changes[name])

    def generator_profile(self, name: str) -> Profile:
        """The profile with the changes of a generator."""
        require_known(name, self.generators, "generator of the study")
        return self._changed(name, self.generators[name].changes)

    def _alone(self, name: str, of: str, keys: dict[str, Any], changes: dict[str, Any]) -> Profile:
        """The changed profile whose only tokenizer is the variant `of` with other keys."""
        variants = load_profile(self.profile).tokenizer.variants
        require_known(of, variants, "tokenizer variant")
        alone = {"tokenizer.variants": {name: merge(variants[of], keys)}}
        alone |= {"autoregressive.variants": {}, "text.dual_encoder.reconstructions": []}
        return self._changed(name, changes | ALONE | alone)

    def _changed(self, name: str, changes: dict[str, Any]) -> Profile:
        changes = changes | {"engine.precision": "no"}  # results of all machines compare
        values = changed(to_dict(load_profile(self.profile)), changes)
        return from_dict(Profile, values, f"{GRID}: {name}")


def load_grid() -> Grid:
    return from_dict(Grid, read_yaml(resolve(GRID)), GRID)


def judged(profile: Profile, name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Scores of a tokenizer for every seed; a training that does not end well is a result, too.

    `coded_bits` are those of an image's codes after entropy coding with the frequencies that
    codes have in training views.
    """
    fetch_weights()
    config, data = profile.tokenizer_variant(name), profile.tokenizer_data(name)
    profile = replace(profile, data=data)  # where it keeps images apart, these are the views
    views, keys = held_out_set(profile, size=config.size)
    originals = features_of([views])
    about: dict[str, Any] = {"photographs": [], "protocol": {}}
    by_seed: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        try:
            trained = trained_tokenizer(profile, name, seed)
        except FloatingPointError as error:
            by_seed[str(seed)] = {"failed": str(error)}
            continue
        codes, reconstructions = reconstruct(trained.model, views)
        scores = evaluate_reconstructions(views, reconstructions, keys)
        about = {key: scores[key] for key in about}
        most = max(config.codebook_sizes)
        usage = codebook_statistics(code_counts(codes, most), len(codes), config)
        images = open_split(data, "train")
        seen = training_views(images, 0, CODED_VIEWS, config.size, seed)[0]
        frequencies = code_counts(encode(trained.model, seen), most)
        by_seed[str(seed)] = {
            **{metric: scores[metric] for metric in (*METRICS, "by_photograph")},
            "fd_lite0": frechet_distance(features_of([reconstructions]), originals),
            "error_by_scale": error_by_scale(views, reconstructions).mean(0).tolist(),
            "preview_psnr": preview_psnr(trained.model, codes, views),
            "coded_bits": coded_bits(codes, frequencies, config),
            "usage": min(book["usage"] for book in usage["codebooks"].values()),
            "seconds": trained.curve["seconds"][-1],
        }
    runs = [TokenizerRun.of(profile, name, seed) for seed in seeds]
    steps = profile.tokenizer_training(name).optimizer.steps
    return {"run": digest(*runs), "steps": steps, **about, "seeds": by_seed}


@torch.no_grad()
def preview_psnr(tokenizer: SpectralTokenizer, codes: Tensor, views: Tensor) -> list[float]:
    """PSNR (dB) of the image of the first 1 ... S scales that a tokenizer decodes from all codes
    [V, S, N], against the views [V, 3, H, H] averaged to its size.
    """
    values = []
    for part, images in zip(codes.split(64), views.split(64), strict=True):
        patches = tokenizer.decode_latents(tokenizer.embed_codes(part))
        previews = [tokenizer.to_images(patches[: k + 1]).clamp(0, 1) for k in range(len(patches))]
        pairs = [(avg_pool2d(images, images.shape[-1] // x.shape[-1]), x) for x in previews]
        values.append([reconstruction_values(*pair, metrics=["psnr"])["psnr"] for pair in pairs])
    return [torch.cat(of_size).mean().item() for of_size in zip(*values, strict=True)]


def run_generator(_: Profile, generator: str) -> dict[str, Any]:
    """Train a generator with every seed; judge it by prompts and judges of the usual profile.

    All of `measure_generator` without sweeps, `half_written` of models that write code by code, and
    `by_passes`.
    """
    fetch_weights()
    grid = load_grid()
    entry, profile = grid.generators[generator], grid.generator_profile(generator)
    usual = load_profile(grid.profile)
    section = usual.generator_section(entry.of)
    without = replace(section.evaluation, top_p_sweep=[], guidance_sweep=[])
    usual = replace(usual, **{section.name: replace(section, evaluation=without)})
    real = generation.real_features(usual, entry.of)
    by_seed = {}
    for seed in entry.seeds:
        trained = trained_generator(profile, entry.of, seed)
        model = trained.model.to(best_device())
        samples = generation.draw_all(model, usual, entry.of)
        is_masked = model.config.transformer.masked
        by_seed[str(seed)] = {
            **generation.measure_generator(model, usual, entry.of, samples, real),
            **({} if is_masked else {"half_written": half_written(model, usual, entry.of)}),
            "by_passes": by_passes(model, usual, entry.of, real["held_out"]),
            "seconds": trained.curve["seconds"][-1],
        }
    return {
        **vars(entry),
        "run": digest(*(AutoregressiveRun.of(profile, entry.of, seed) for seed in entry.seeds)),
        "steps": profile.generator_optimizer(entry.of).steps,
        "seeds": by_seed,
    }


def judge_row(_: Profile, row: str) -> None:
    """Train and judge a row with every seed, count what it costs; its models are not kept."""
    grid, variant = load_grid(), f"row_{row}"
    profile, entry = grid.row_profile(row), grid.rows[row]
    config = profile.tokenizer_variant(variant)
    tokenizer = SpectralTokenizer(config).eval()
    with torch.no_grad():
        operations = flops(lambda: tokenizer(torch.rand(1, 3, config.size, config.size)))
    result = {
        **vars(entry),
        "tokens": config.num_scales * config.tokens_per_scale,
        "bits": config.bits(),
        "parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        "flops_per_image": operations,
        **judged(profile, variant, entry.seeds),
    }
    _write(f"rows/{row}", result, variant)


def judge_recipe(_: Profile, trial: str) -> None:
    """Train and judge every model with the changes of a trial; they are not kept."""
    grid = load_grid()
    names = {model: f"{trial}_{model}" for model in grid.trials.models}
    models = {m: judged(grid.trial_profile(trial, m), name, [0]) for m, name in names.items()}
    about = {"common": grid.trials.common, "changes": grid.trials.changes[trial]}
    _write(f"trials/{trial}", about | {"models": models}, *names.values())


def judge_generator_recipe(_: Profile, trial: str) -> dict[str, Any]:
    """Train every generator with the changes of a trial; nats of views that training did not see.

    Codes are of tokenizers that did not see them either.
    """
    grid, models = load_grid(), {}
    profile = grid.generator_trial_profile(trial)
    for model in grid.generator_trials.models:
        trained, codes = trained_generator(profile, model, 0), load_codes(profile, model)
        models[model] = held_out_nats(trained.model, codes.held_out, codes.held_out_labels)
        models[model] |= {"views": len(codes.held_out), "seconds": trained.curve["seconds"][-1]}
    return {"changes": grid.generator_trials.changes[trial], "models": models}


def _write(name: str, result: dict[str, Any], *models: str) -> None:
    """Write a result, then remove the tokenizers that it was measured on."""
    write_json(resolve(f"metrics/study/{name}.json"), result)
    for model in models:
        for folder in resolve("scratch/tokenizer").glob(f"{model}-seed*"):
            shutil.rmtree(folder, ignore_errors=True)


def write_list() -> None:
    """Write the names of all results and digests of their files.

    Notebooks depend on this list in DVC, not on the results, whose stages would run otherwise.
    """
    lines = ["result,file"]
    for file in sorted(resolve(RESULTS).rglob("*.json")):
        name = file.relative_to(resolve(RESULTS)).with_suffix("").as_posix()
        lines.append(f"{name},{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}")
    with atomic_write(resolve(LIST)) as path:
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    command(write_list)
