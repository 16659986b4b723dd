"""Put a trained model into the package, in half precision, with its card and its scores.

    python scripts/package_weights.py models/tokenizer/sit5_sc-seed0 photos-256 --data data/landscapes data/things

The scores are of the very file that is written, by `sit evaluate` on the held-out images of every
folder of --data. The card says what the weights were made of: the training curve beside the model
tells steps, hours and machine.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from sitlib.cli import main as sit
from sitlib.files import load_model, read_csv, read_json, read_metadata, save_model, write_json
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.pretrained import CHECKPOINT, PACKAGED
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import to_dict
from workbook.machine import machine

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

Held-out images of each set, never seen in training; brackets are 95 % bootstrap intervals over photographs.

{table}

`border` is the mean difference of pixels across the borders of tokens over that inside them, beside
the originals' own. `scores-*.json` beside this card say how each number was measured.

**Limits.** {limits}
"""


def package(run: Path, name: str, options: argparse.Namespace) -> None:
    """Write the folder of a packaged model."""
    path, folder = run / CHECKPOINT, PACKAGED / name
    is_generator = read_metadata(path)["class"] == AutoregressiveModel.__name__
    cls = AutoregressiveModel if is_generator else SpectralTokenizer
    model = load_model(path, cls)
    if is_generator:  # its tokenizer is found by name
        transformer = replace(model.config.transformer, tokenizer=options.tokenizer)
        model.config = replace(model.config, transformer=transformer)
    save_model(folder / CHECKPOINT, model.half(), name=name)
    write_json(folder / "config.json", to_dict(model.config))
    rows = []
    for data in map(Path, options.data):
        scores = folder / f"scores-{data.name}.json"
        if sit(["evaluate", str(folder), str(data), "-o", str(scores), "--overwrite"]):
            raise SystemExit(f"{name} could not be judged on {data}")
        rows.append((data.name, read_json(scores)))
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
        table=table(rows),
        limits=options.limits,
    )
    (folder / "README.md").write_text(text)
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.1f} MB")


def table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """Scores of every set in Markdown."""
    if rows[0][1]["manifest"]["task"] == "samples":
        lines = [
            "| set | samples | FD-Lite0 | KID x 1000 | FD to reconstructions |",
            "|---|---|---|---|---|",
        ]
        for name, result in rows:
            s, n = result["scores"], result["manifest"]["reference"]["views"]
            again = s["to_reconstructions"]["fd_lite0"]
            lines.append(
                f"| {name} | {n} | {s['fd_lite0']:.1f} | {1000 * s['kid']:.2f} | {again:.1f} |"
            )
        return "\n".join(lines)
    lines = ["| set | images | px | PSNR, dB | LPIPS-Alex | LPIPS-VGG | FD-Lite0 | border |"]
    lines.append("|---" * 8 + "|")
    for name, result in rows:
        scores, reference = result["scores"], result["manifest"]["reference"]
        cells = [name, str(reference["views"]), str(reference["size"])]
        for key, digits in (("psnr", 2), ("lpips_alex", 3), ("lpips_vgg", 3)):
            low, high = scores["intervals"][key]
            cells.append(f"{scores[key]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        cells.append(f"{scores['fd_lite0']:.1f}")
        cells.append(f"{scores['border']:.2f} ({scores['border_originals']:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the trained model")
    parser.add_argument("name", help="of the packaged one")
    parser.add_argument("--data", nargs="+", default=["data/landscapes"])
    parser.add_argument("--profile", default="overnight")
    parser.add_argument("--tokenizer", help="packaged tokenizer of a generator")
    parser.add_argument("--start", help="what training started from")
    parser.add_argument("--cores", default=1, type=int)
    for text in ("about", "images", "limits"):
        parser.add_argument(f"--{text}", required=True)
    options = parser.parse_args()
    package(options.run, options.name, options)
