"""One real optimization step of the paper's SIT-4 and ViT-VQGAN at 256 px on the CPU, batch 1: that the shapes train, and what it takes.

    python benchmarks/paper_step.py [--variants vit_vqgan sit4] [--steps 2]

The models, losses (LPIPS-VGG, discriminator) and optimizer are those of the paper profile, in float32; codebooks are not started with
k-means, and the discriminator speaks from the first step on. Pretrained LPIPS weights are not needed: random ones cost the same.
"""

import argparse
import math
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, installed or not

import torch

from sitlib.train.optim import make_optimizer
from workbook.estimates import cost, tokenizer_subject
from workbook.profile import load_profile


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["vit_vqgan", "sit4"])
    parser.add_argument("--profile", default="paper")
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args(arguments)
    profile = load_profile(options.profile)
    for variant in options.variants:
        config, training = profile.tokenizer_variant(variant), profile.tokenizer_training(variant)
        torch.manual_seed(0)
        subject = tokenizer_subject(config, training, 1)
        learning = [
            model for model in subject.models if any(p.requires_grad for p in model.parameters())
        ]
        optimizers = [make_optimizer(model, training.optimizer) for model in learning]
        before = [p.detach().clone() for model in learning for p in model.parameters()]
        seconds = []
        for _ in range(options.steps):
            began = time.perf_counter()
            subject.step()
            for model, optimizer in zip(learning, optimizers, strict=True):
                norm = torch.nn.utils.clip_grad_norm_(
                    model.parameters(), training.optimizer.clip_norm
                )
                assert math.isfinite(norm)
                optimizer.step()
                optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
        after = [p.detach() for model in learning for p in model.parameters()]
        moved = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        found = cost(lambda c=config, t=training: tokenizer_subject(c, t, 1))
        print(
            f"{variant}: {config.size} px, {sum(p.numel() for p in learning[0].parameters()) / 1e6:.1f} M parameters, "
            f"{moved} of {len(after)} tensors moved; {', '.join(f'{s:.1f}' for s in seconds)} s a step on {torch.get_num_threads()} "
            f"thread(s), {found.step_flops / 1e9:.0f} GFLOP, {found.peak_bytes / 2**30:.2f} GiB estimated without moments, "
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB at most resident"
        )


if __name__ == "__main__":
    main()
