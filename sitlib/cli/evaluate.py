"""`sit evaluate`: a model's scores on a folder of images, and how they were got.

The file that is written has a `manifest` beside the `scores`; scores compare only where manifests
agree in what was judged and how.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch

from sitlib import evaluate as judge
from sitlib.cli import files
from sitlib.cli.sample import load_sampler
from sitlib.data import (
    RESIZING,
    ImageSource,
    has_splits,
    held_out_positions,
    open_captioned,
    open_images,
)
from sitlib.files import read_metadata, sha256_of, write_json
from sitlib.metrics import GENERATION_METRICS, METRICS, InceptionMetrics
from sitlib.metrics.weights import TRUNKS, load_trunk
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import best_device
from sitlib.sample.generate import generate
from sitlib.strict import require, to_dict

SEED = 0  # of views, of subsets of KID
ROWS = {name: (m.title, m.digits, m.factor) for name, m in (METRICS | GENERATION_METRICS).items()}
ROWS |= {
    "border": ("border of tokens", 3, 1),
    "border_originals": ("border, originals", 3, 1),
    "bits_per_pixel": ("bits per pixel", 3, 1),
    "fid": ("FID", 2, 1),
    "inception_score": ("Inception score", 2, 1),
}


def evaluate(options: argparse.Namespace) -> int:
    """Judge reconstructions of a tokenizer, or samples of a generator."""
    jobs = files.Jobs(options)
    path = files.find_checkpoint(options.checkpoint, *files.KINDS.values())
    folder = Path(options.data).resolve()
    target = jobs.file or jobs.folder / f"{path.resolve().parent.name}-{folder.name}.json"
    jobs.reserve(target)
    is_generator = read_metadata(path).get("class") == AutoregressiveModel.__name__
    for net in () if is_generator else TRUNKS:  # a missing one is an error before all else
        load_trunk(net)
    options.split = options.split or ("test" if has_splits(folder) else "all")
    source, digest = open_images(folder, options.split), hashlib.sha256()
    judged = _samples if is_generator else _reconstructions
    (size, count, photographs), protocol, scores = judged(options, path, source, digest)
    manifest = {
        "task": "samples" if is_generator else "reconstructions",
        "weights": {"name": path.resolve().parent.name, "sha256": sha256_of(path)},
        "reference": {
            **{"folder": folder.name, "split": options.split, "kind": options.kind, "size": size},
            "resize": RESIZING + (", averaged down" if options.size else ""),
            **{"views": count, "photographs": photographs, "seed": SEED},
            "sha256": digest.hexdigest(),
        },
        "protocol": scores.pop("protocol") | protocol,
        "device": _name(torch.device(options.device or best_device())),
        "versions": judge.versions(),
    }
    for key in ("photographs", "counts", "by_photograph"):
        scores.pop(key, None)
    write_json(target, {"manifest": manifest, "scores": scores})
    for key, (title, digits, factor) in ROWS.items():
        if scores.get(key) is not None:
            print(f"{title:20} {factor * scores[key]:>10.{digits}f}")
    print(target)
    return 0


def _positions(options: argparse.Namespace, source: ImageSource) -> list[int]:
    """Positions of the photographs of all views: as many as asked for, or one of each."""
    count = options.views or len(source)
    require(count > 1, "one view cannot be judged: give --views 2 or more.")
    is_new = options.kind != "center" or count <= len(source)
    images = f"{len(source)} of these images can be judged"
    require(is_new, f"{images}, and each has one center: give --kind wide, or fewer --views.")
    return held_out_positions(source, count, SEED)


def _reconstructions(
    options: argparse.Namespace, path: Path, source: ImageSource, digest: Any
) -> tuple[tuple[int, int, int], dict[str, Any], dict[str, Any]]:
    """Size, views and photographs; protocol and scores of views after the tokenizer."""
    positions = _positions(options, source)
    tokenizer, _ = files.load_checkpoint(str(path), SpectralTokenizer, options.device)
    full, count = tokenizer.sizes[-1], len(positions)
    views = judge.hashed(judge.view_parts(source, count, full, SEED, options.kind), digest)
    inception = InceptionMetrics() if options.inception else None
    options_of = {"seed": SEED, "inception": inception, "title": "reconstructions"}
    scores, _ = judge.reconstruction_scores(tokenizer, views, options.size, **options_of)
    of = (options.size or full, count, len(set(positions)))
    return of, {"precision": _precision(tokenizer.device)}, scores


def _samples(
    options: argparse.Namespace, path: Path, source: ImageSource, digest: Any
) -> tuple[tuple[int, int, int], dict[str, Any], dict[str, Any]]:
    """As `_reconstructions`, of samples for the classes, or the names, of the views."""
    require(options.size is None, "--size is of tokenizers: samples have the size of their model.")
    inception = InceptionMetrics() if options.inception else None  # before samples are drawn
    model, tokenizer, sampling = load_sampler(str(path), options)
    source = source.labeled() if model.config.classes else source
    positions = _positions(options, source)
    count = len(positions)
    if model.config.classes:
        names = [source.samples[position].class_name for position in positions]
        other = sorted({str(name) for name in names} - {*model.config.classes})
        sentence = f"{source.where} has classes that the model does not know: {', '.join(other)}"
        require(not other, f"{sentence}. It knows {', '.join(model.config.classes)}.")
        asked = torch.tensor([model.config.classes.index(str(name)) for name in names])
        told = "classes of the views"
    else:
        named = open_captioned(options.data, options.split, "names", phrasing="new", count=1)
        asked = [named.captions[position][0] for position in positions]
        told = "names of the views, in new phrasings"
    size = tokenizer.config.size
    parts = [*judge.hashed(judge.view_parts(source, count, size, SEED, options.kind), digest)]
    images = judge.decode(tokenizer, generate(model, asked, sampling, progress="samples").cpu())
    again = [judge.reconstruct(tokenizer, views)[1] for views, _ in parts]
    features = map(judge.features_of, ([images], [views for views, _ in parts], again))
    scores = judge.sample_scores(
        *features,
        kid_subset_size=min(100, max(2, count // 2)),
        # More than the views of a photograph, or precision asks for the very same one.
        neighbors=min(count - 1, 3 * -(-count // len(source))),
        seed=SEED,
        groups=positions,
    )
    if inception is not None:
        inception.add(images, real=False, title="samples")
        for views, _ in parts:
            inception.add(views, real=True, title="views")
        scores |= inception.compute(seed=SEED)
    protocol = {"precision": _precision(tokenizer.device), "prompts": told}
    of = (size, count, len(set(positions)))
    return of, protocol | {"sampler": to_dict(sampling)}, scores


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _precision(device: torch.device) -> str:
    """Of the model's products: see `inference_autocast`."""
    return "float32" if device.type == "cpu" else f"{device.type}, mixed"
