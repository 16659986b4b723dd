"""A ladder of model sizes over the codes of one tokenizer: `python -m workbook.ladder --rung NAME --output FILE`.

Small versions of the paper's first open question: how do the losses and the distances of autoregressive models over SIT's and ViT-VQGAN's
codes, and of a diffusion model, change with size? A rung stands in ablations/params.yaml under `ladder`; all are trained on the same codes
for the same number of sequences.
"""

import argparse
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from sitlib.files import Row, write_json
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import digest, require_known, to_dict
from sitlib.train.config import OptimizerConfig
from sitlib.train.engine import Microbatch
from sitlib.train.loop import Logged, train_module
from workbook.codes import Codes, load_codes
from workbook.diffusion import DiffusionConfig, DiffusionModel, FlowConfig
from workbook.errors import command
from workbook.estimates import flops
from workbook.evaluate import decode, held_out_nats
from workbook.evaluate.generation import distances_to_held_out, draw_samples, sampled_labels
from workbook.generators import trained_generator
from workbook.paths import resolve
from workbook.profile import Profile, load_profile
from workbook.rows import Rung, load_ablations
from workbook.tokenizers import trained_tokenizer
from workbook.train_or_load import AutoregressiveRun, CodesRun, Trained, train_or_load

HELD_OUT_TIMES = 8  # at which the diffusion model's held-out loss is measured, evenly spaced


@dataclass(frozen=True)
class DiffusionRun:
    """Everything that determines a trained diffusion model, its tokenizer included."""

    made_by: ClassVar[str] = "workbook/ladder.py"

    codes: CodesRun
    model: DiffusionConfig
    optimizer: OptimizerConfig
    seed: int

    @property
    def source(self) -> str:
        return self.codes.tokenizer.source


def run_rung(profile: Profile, rung: Rung, name: str, seed: int = 0) -> dict[str, Any]:
    """Trains and judges one rung.

    Returns:
        The rung; `parameters` and of them `block_parameters`, without embeddings and heads; `training_flops`; `sampling_flops` of an image
        without guidance and without a cache's overhead (for the diffusion model of all its steps); `held_out_loss`: nats per image, or
        the mean squared error of velocities; `fd_lite0`, `kid`, precision and recall of samples; `seconds` of training; `run`.
    """
    profile = with_rung(profile, rung, name)
    variant = f"ar_{name}"
    codes = load_codes(profile, variant)
    tokenizer = trained_tokenizer(
        profile, rung.tokenizer, profile.autoregressive.tokenizer_seed
    ).model
    if rung.kind == "autoregressive":
        found = trained_generator(profile, variant, seed)
        run = digest(AutoregressiveRun.of(profile, variant, seed))
        tokens = codes.held_out[0].numel()
        loss = (
            held_out_nats(found.model, codes.held_out, codes.held_out_labels)["nats_per_token"]
            * tokens
        )
        forward = partial(found.model, codes.held_out[:1], codes.held_out_labels[:1])
    else:
        found, run = trained_diffusion(profile, variant, rung, codes, tokenizer, seed)
        loss = held_out_velocity_error(found.model, codes, tokenizer)
        vectors = tokenizer.embed_codes(codes.held_out[:1]).detach()
        forward = partial(found.model, vectors, torch.zeros(1), codes.held_out_labels[:1])
    with torch.no_grad():
        operations = flops(forward)
    began = time.perf_counter()
    images = decode(tokenizer, _samples(found.model, profile, rung, tokenizer))
    sampling_seconds = time.perf_counter() - began
    passes = 2 * rung.sampling_steps - 1 if rung.kind == "diffusion" else 1
    return {
        **vars(rung),
        "run": run,
        "parameters": sum(p.numel() for p in found.model.parameters()),
        "block_parameters": sum(p.numel() for p in found.model.transformer.parameters()),
        "training_flops": 3 * operations * rung.steps * rung.batch_size,
        "sampling_flops": passes * operations,
        "held_out_loss": loss,
        "seconds": found.curve["seconds"][-1],
        "sampling_seconds": sampling_seconds,
        **distances_to_held_out(images, profile, variant),
    }


def with_rung(profile: Profile, rung: Rung, name: str) -> Profile:
    """The profile with `ar_<name>` as its only model over codes: that of the rung, or of its size where it is a diffusion model."""
    section = profile.autoregressive
    shape = {key: getattr(rung, key) for key in ("tokenizer", "layers", "width", "heads")}
    optimizer = {key: getattr(rung, key) for key in ("steps", "batch_size", "learning_rate")}
    section = replace(
        section, variants={f"ar_{name}": {**shape, "optimizer": optimizer}}, samplers={}
    )
    text = replace(profile.text, variants={}, samplers={})
    return replace(profile, autoregressive=section, text=text)


def trained_diffusion(
    profile: Profile,
    variant: str,
    rung: Rung,
    codes: Codes,
    tokenizer: SpectralTokenizer,
    seed: int,
) -> tuple[Trained[DiffusionModel], str]:
    """The diffusion model of a rung, trained now or earlier, and the digest of its run."""
    shape = profile.autoregressive_variant(variant)
    names = ("layers", "width", "heads", "mlp_ratio", "dropout", "condition_dropout")
    config = DiffusionConfig(**{key: getattr(shape, key) for key in names})
    run = DiffusionRun(
        CodesRun.of(profile, variant), config, profile.generator_optimizer(variant), seed
    )

    def train_now(folder: Path) -> tuple[DiffusionModel, list[Row]]:
        set_seed(seed)
        _, num_scales, tokens = codes.train.shape
        model = DiffusionModel(
            FlowConfig(config, num_scales, tokens, tokenizer.config.code_dim, codes.classes)
        )

        def batch_at(step: int, part: Microbatch) -> tuple[Tensor, ...]:
            generator = np.random.default_rng([seed, step])
            chosen = torch.from_numpy(
                generator.integers(len(codes.train), size=run.optimizer.batch_size)
            )
            with torch.no_grad():
                vectors = tokenizer.embed_codes(codes.train[chosen])
            noise = torch.from_numpy(generator.standard_normal(vectors.shape, dtype=np.float32))
            # Times near the middle more often, where the direction is hardest to tell (arXiv 2403.03206).
            at = torch.sigmoid(
                torch.from_numpy(generator.standard_normal(len(chosen), dtype=np.float32))
            )
            hidden = torch.from_numpy(generator.random(len(chosen)) < config.condition_dropout)
            labels = codes.train_labels[chosen]
            told = torch.where(hidden, model.unconditional(labels), labels)
            return part.of((vectors, told, noise, at))

        def loss(module: nn.Module, batch: tuple[Tensor, ...], step: int) -> tuple[Tensor, Logged]:
            return cast(DiffusionModel, module).loss(*batch).mean(), {}

        title = f"{variant}, diffusion, seed {seed}"
        return train_module(
            model, loss, batch_at, run.optimizer, folder=folder, run=to_dict(run), title=title
        )

    return train_or_load(
        run, "diffusion", variant, DiffusionModel, train_now, pipeline=False
    ), digest(run)


@torch.no_grad()
def held_out_velocity_error(
    model: DiffusionModel, codes: Codes, tokenizer: SpectralTokenizer
) -> float:
    """Mean squared error of the velocity on held-out codes, over evenly spaced times and one fixed noise of each image."""
    vectors = tokenizer.embed_codes(codes.held_out)
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
    errors = [
        model.loss(vectors, codes.held_out_labels, noise, torch.full((len(vectors),), at)).mean()
        for at in ((torch.arange(HELD_OUT_TIMES) + 0.5) / HELD_OUT_TIMES).tolist()
    ]
    return float(torch.stack(errors).mean())


def _samples(
    model: AutoregressiveModel | DiffusionModel,
    profile: Profile,
    rung: Rung,
    tokenizer: SpectralTokenizer,
) -> Tensor:
    """Codes [count, S, N] drawn with the profile's guidance, of classes as frequent as among the reference views."""
    settings, sampling = profile.autoregressive.evaluation, profile.autoregressive.sampling
    if isinstance(model, AutoregressiveModel):
        return draw_samples(model, profile, settings.samples, sampling)[0]
    labels = sampled_labels(profile, settings.samples)
    vectors = model.sample(
        labels, steps=rung.sampling_steps, guidance=sampling.guidance, seed=sampling.seed
    )
    return tokenizer.quantize(vectors).codes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbook.ladder", description=__doc__)
    parser.add_argument(
        "--rung", required=True, help="name under `ladder` in ablations/params.yaml"
    )
    parser.add_argument("--output", required=True, help="JSON file to write")
    arguments = parser.parse_args()
    ablations = load_ablations()
    require_known(arguments.rung, ablations.ladder, "rung")
    profile = load_profile(ablations.profile)
    write_json(
        resolve(arguments.output),
        run_rung(profile, ablations.ladder[arguments.rung], arguments.rung),
    )


if __name__ == "__main__":
    command(main)
