"""Put a trained model into the package, in half precision, with its card and its scores.

    python scripts/package_weights.py models/tokenizer/sit5_sc-seed0 photos-256 --data data/landscapes data/things

The scores are of the very file that is written, by `sit evaluate` on the held-out images of every
folder of --data; of a model of texts also how often a dual encoder of the profile recognises what
was asked for. The card says what the weights were made of: the training curve beside the model
tells steps, hours and machine.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from sitlib.cli import main as sit
from sitlib.files import load_model, read_csv, read_json, read_metadata, save_model, write_json
from sitlib.metrics import METRICS
from sitlib.model.config import SamplingConfig
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.pretrained import CHECKPOINT, PACKAGED
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample.generate import generate
from sitlib.strict import to_dict
from workbook.evaluate.text import KINDS, Judge, prompts
from workbook.figures.tables import markdown_table
from workbook.machine import machine
from workbook.profile import load_profile
from workbook.site.compare import with_interval

CARD = """---
library_name: sitlib
license: cc-by-sa-4.0
tags: [image-tokenizer, wavelets, vector-quantization]
---

# {name}

{about}

    from {module} import {class_name}
    model = {class_name}.from_pretrained("{name}")

| | |
|---|---|
| class, parameters | `{class_name}`, {parameters:.1f} million, stored in half precision |
| tokens, bits | {tokens} |
| training | {steps:,} steps in {hours:.1f} hours on {machine}; `{profile}` says the whole recipe{start} |
| images | {images} |
| licence | the images are under free licences, some of them share-alike (data/README.md lists each); so are these weights |

Held-out images of each set, never seen in training; brackets are 95 % bootstrap intervals over {groups}.

{table}

{notes} `scores-*.json` beside this card say how each number was measured.

**Limits.** {limits}
"""

SAMPLER = ("top_p", "guidance", "choice_temperature")
BORDER = """`border` is the mean difference of pixels across the borders of tokens over that inside them, beside
the originals' own: above it the grid can be seen, below it borders are smoother than the image."""
DISTANCES = """FD-Lite0 and KID compare as many samples with real images, and with what the tokenizer leaves of
these, which has a row of its own; ± is a jackknife over photographs or names. Sampler: {sampler}."""
RECOGNISED = """An image is recognised if a dual encoder, trained on real images and on what the tokenizer leaves of
them, finds its caption the most similar one among {candidates} of different names. What it recognises of the real
images, and of their reconstructions, is the ceiling."""


def package(run: Path, name: str, options: argparse.Namespace) -> None:
    """Write the folder of a packaged model."""
    path, folder = run / CHECKPOINT, PACKAGED / name
    is_generator = read_metadata(path)["class"] == AutoregressiveModel.__name__
    cls = AutoregressiveModel if is_generator else SpectralTokenizer
    model = load_model(path, cls)
    if is_generator:  # its tokenizer is found by name
        transformer = replace(model.config.transformer, tokenizer=options.tokenizer)
        chosen = {key: getattr(options, key) for key in SAMPLER}
        chosen = {key: value for key, value in chosen.items() if value is not None}
        sampling = replace(model.config.sampling or SamplingConfig(), **chosen)
        model.config = replace(model.config, transformer=transformer, sampling=sampling)
    save_model(folder / CHECKPOINT, model.half(), name=name)
    write_json(folder / "config.json", to_dict(model.config))
    results, model_has_texts = {}, is_generator and model.text_tokenizer is not None
    for data in map(Path, options.data):
        scores = folder / f"scores-{data.name}.json"
        views = ["--views", options.views, "--kind", "wide"] if options.views else []
        if sit(["evaluate", str(folder), str(data), "-o", str(scores), "--overwrite", *views]):
            raise SystemExit(f"{name} could not be judged on {data}")
        results[data.name] = read_json(scores)
    notes = BORDER
    if is_generator:
        notes = DISTANCES.format(
            sampler=f"top-p {sampling.top_p:g}, guidance {sampling.guidance:g}"
            + f", {sampling.steps_per_scale} passes a scale, choice temperature "
            f"{sampling.choice_temperature:g}" * model.config.transformer.masked
        )
        if model_has_texts:
            scores, asked = recognised(name, options), load_profile(options.profile).text.evaluation
            write_json(folder / "scores-names.json", scores)
            found = RECOGNISED.format(candidates=asked.candidates)
            notes = f"{names_table(scores)}\n\n{found} {notes}"
    curve = read_csv(Path("metrics/curves") / run.parent.name / f"{run.name}.csv")
    config, about = model.config, machine()
    per_scale, sizes = config.tokens_per_scale, config.codebook_sizes
    tokens = f"{config.num_scales} scales of {per_scale} tokens; codebooks {sizes}"
    if not is_generator:
        tokens += f"; {config.bits():,.0f} bits an image of {config.size} px"
    text = CARD.format(
        name=name,
        about=options.about,
        module=cls.__module__,
        class_name=cls.__name__,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        tokens=tokens,
        steps=int(curve["step"][-1]),
        hours=curve["seconds"][-1] / 3600,
        machine=about["gpu"]
        or f"{options.cores} of {about['logical_cores']} cores, {about['cpu']}",
        profile=f"profiles/{options.profile}.yaml",
        start=f", started from {options.start}" if options.start else "",
        images=options.images,
        groups="names" if model_has_texts else "photographs",
        table=table(results),
        notes=notes,
        limits=options.limits,
    )
    (folder / "README.md").write_text(text)
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.1f} MB")


def recognised(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """R-precision of samples of the packaged models, by the dual encoder of the profile."""
    profile = load_profile(options.profile)
    model = AutoregressiveModel.from_pretrained(name)
    tokenizer = SpectralTokenizer.from_pretrained(options.tokenizer)
    asked = {kind: prompts(profile, kind) for kind in KINDS}
    samples = {kind: generate(model, of.captions, progress=kind) for kind, of in asked.items()}
    scores = Judge(profile).prompt_scores(tokenizer, asked, samples)
    for of in scores["kinds"].values():
        del of["samples"]["by_prompt"]
    return scores | {
        "sampling": to_dict(model.config.sampling),
        "prompts": len(asked["seen"].names),
    }


def names_table(scores: dict[str, Any]) -> str:
    rows = []
    for kind, of in scores["kinds"].items():
        shares = {key: f"{of[key]['r_precision']:.1f}" for key in ("reconstruction", "real")}
        drawn = with_interval(of["samples"]["r_precision"], *of["samples"]["interval"], digits=1)
        rows.append({"recognised, %": KINDS[kind], "samples": drawn})
        rows[-1] |= {"reconstructions": shares["reconstruction"], "real images": shares["real"]}
        rows[-1]["chance"] = f"{of['samples']['chance']:.0f}"
    return markdown_table(rows)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Scores of every set in Markdown."""
    rows = []
    for name, result in results.items():
        scores, reference = result["scores"], result["manifest"]["reference"]
        if result["manifest"]["task"] == "samples":
            near = scores["to_reconstructions"]
            again = f"{near['fd_lite0']:.0f} ± {near['jackknife']['fd_lite0']:.0f}"
            kinds = (("", scores, again), (", reconstructions", scores["reconstruction"], ""))
            for what, of, near in kinds:
                row = {"set": name + what, "samples": reference["views"]}
                errors = of["jackknife"]
                row |= {
                    "FD-Lite0": f"{of['fd_lite0']:.0f} ± {errors['fd_lite0']:.0f}",
                    "KID x 1000": f"{1000 * of['kid']:.0f} ± {1000 * errors['kid']:.0f}",
                }
                rows.append(row | {"FD to reconstructions": near})
            continue
        row = {"set": name, "images": reference["views"], "px": reference["size"]}
        for key, digits in (("psnr", 2), ("lpips_alex", 3), ("lpips_vgg", 3)):
            row[METRICS[key].title] = with_interval(scores[key], *scores["intervals"][key], digits)
        row["border"] = f"{scores['border']:.2f} ({scores['border_originals']:.2f})"
        rows.append(row)
    return markdown_table(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the trained model")
    parser.add_argument("name", help="of the packaged one")
    parser.add_argument("--data", nargs="+", default=["data/landscapes"])
    parser.add_argument("--profile", default="overnight")
    parser.add_argument("--tokenizer", help="packaged tokenizer of a generator")
    for key in SAMPLER:
        parser.add_argument(
            f"--{key.replace('_', '-')}", type=float, help="of a generator's sampler"
        )
    parser.add_argument("--views", help="of every set (default: one of every image)")
    parser.add_argument("--start", help="what training started from")
    parser.add_argument("--cores", default=1, type=int)
    for text in ("about", "images", "limits"):
        parser.add_argument(f"--{text}", required=True)
    options = parser.parse_args()
    package(options.run, options.name, options)
