"""Evaluation of a tokenizer on held-out images, at every size that it takes.

All tokenizers are judged on the same views of every set in the profile's
`tokenizer.evaluation.sets`. Smaller images are the views averaged over squares of pixels, as the
Haar transform does it.
"""

from typing import Any

from sitlib import evaluate, metrics
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import best_device
from sitlib.strict import digest
from workbook.evaluate import stored_scores
from workbook.profile import Profile
from workbook.runs import TokenizerRun
from workbook.tokenizers import held_out_set, trained_tokenizer

SMALLEST_SIZE = 4  # px; for the tokenizer without scales: the coarsest scale of SIT-5
VIEWS = {
    "crops": "random crops of {} held-out photographs",
    "wide": "wide views of {} held-out images",
}


def evaluate_tokenizer(
    profile: Profile, variant: str, seed: int, pipeline: bool = False
) -> dict[str, Any]:
    """Train or load a tokenizer of the profile and measure it on every evaluation set and size.

    But for the `pipeline` itself, its scores of this very run do. A tokenizer of other images than
    the profile's is judged at its full size only, and "the first set" is that of its own images.
    The scores of this set at full size stand at the top level, too, with `usage` of the codebook
    that uses the smallest share (%).
    """
    settings, source = profile.tokenizer.evaluation, profile.tokenizer_data(variant).folder
    # A digest knows no order, and the first set has a role of its own.
    run = digest(TokenizerRun.of(profile, variant, seed), settings, list(settings.sets))
    path = f"metrics/tokenizer/{variant}-seed{seed}.json"
    if not pipeline and (stored := stored_scores(path, run)):
        return stored
    metrics.fetch_weights()
    tokenizer = trained_tokenizer(profile, variant, seed).model.to(best_device())
    config, sizes, (first_set, *_) = tokenizer.config, evaluated_sizes(tokenizer), settings.sets
    if source != profile.data.folder:
        sizes = sizes[:1]
        own = (name for name, image_set in settings.sets.items() if image_set.source == source)
        first_set = next(own, first_set)
    inception = metrics.InceptionMetrics() if settings.inception else None
    first: dict[str, Any] = {}
    sets: dict[str, dict[str, Any]] = {}
    for name, image_set in settings.sets.items():
        sets[name] = {}
        for size in sizes:
            parts = (
                held_out_set(profile, name, config.size, evaluate.PART, start)
                for start in range(0, image_set.views, evaluate.PART)
            )
            options = {"inception": inception, "title": f"{name}, {size} px"}
            scores, values = evaluate.reconstruction_scores(
                tokenizer, parts, size, seed=settings.seed, **options
            )
            sets[name][str(size)] = scores
            scores["protocol"] |= {
                "views": VIEWS[image_set.kind].format(len(scores["photographs"])),
                "source": image_set.source,
                "seed": settings.seed,
            }
            if name == first_set and size == sizes[0]:
                by_photograph = ("photographs", "counts", "by_photograph")
                first = {key: scores[key] for key in scores if key not in by_photograph}
                first["error_by_scale"] = values["errors"].mean(dim=0).tolist()
                counts = metrics.code_counts(values["codes"], max(config.codebook_sizes))
                first |= metrics.codebook_statistics(counts, len(values["codes"]), config)
                first["usage"] = min(book["usage"] for book in first["codebooks"].values())
    parameters = sum(p.numel() for p in tokenizer.parameters())
    return {"run": run, **first, "parameters": parameters, "sets": sets}


def evaluated_sizes(tokenizer: SpectralTokenizer) -> list[int]:
    """Sides in px at which a tokenizer is judged, the full size first.

    Smaller ones need a scale-causal encoder and decoder. The baseline without scales is judged at
    all halves down to 4 px, through enlarged images: see `reconstruct`.
    """
    full, config = tokenizer.sizes[-1], tokenizer.config
    if config.levels == 0:
        halves = (full >> k for k in range(full.bit_length()))
        return [size for size in halves if size >= SMALLEST_SIZE and full % size == 0]
    return tokenizer.sizes[::-1] if config.decoder_attention == "scale_causal" else [full]
