"""What tests/test_states.py runs in a process of its own: `tests/killed.py <what> <folder>`.

Whatever works is a child, forked from this process, which has imported torch and computed nothing:
so starting one again takes no time.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from workbook import codes, runs
from workbook.code_hashes import code_hashes
from workbook.codes import extract_codes, load_codes
from workbook.generators import trained_generator
from workbook.profile import Profile, load_profile
from workbook.tokenizers import trained_tokenizer

KILLS = 2
SHORT = {"batch_size": 4, "log_every": 2, "checkpoint_every": 2, "ema_decay": 0.9}
GAN = {"weight": 0.1, "start": 1, "warmup": 2, "ramp": 2, "r1": 1.0, "r1_every": 2}


def profile_of(images: Path) -> Profile:
    """Small models with everything that has a state: restarts, an opponent, dropout."""
    smoke = load_profile("smoke")
    variant = {
        "size": 32,
        "levels": 2,
        "grid_size": 4,
        "num_codes": 32,
        "loss": {"lpips": 0.0, "reset_dead_codes_after": 2},
        "adversarial": GAN,
        "optimizer": {"steps": 40, **SHORT},
    }
    tokenizer = replace(smoke.tokenizer, variants={"sit": variant})
    data = replace(smoke.data, source=str(images), size=32, normalization_views=32)
    generator = {"tokenizer": "sit", "optimizer": {"steps": 60, **SHORT}}
    views = replace(smoke.autoregressive.codes, views_per_image=24, held_out_views=16)
    classes = replace(smoke.autoregressive, variants={"ar": generator}, codes=views)
    judge = replace(smoke.text.dual_encoder, reconstructions=[])
    text = replace(smoke.text, variants={}, samplers={}, dual_encoder=judge)
    return replace(smoke, data=data, tokenizer=tokenizer, autoregressive=classes, text=text)


def draw_images(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for split, kind, n in product(("train", "test"), "ab", range(5)):
        file = folder / split / kind / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(generator.integers(256, size=(6, 6, 3), dtype=np.uint8))
        noise.resize((40, 40), Image.Resampling.BICUBIC).save(file)


def child(work: Callable[[], object]) -> int:
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def finish(work: Callable[[], object]) -> None:
    _, status = os.waitpid(child(work), 0)
    assert status == 0, "see above"


def kill_and_finish(work: Callable[[], object], progress: Callable[[], int]) -> None:
    """Kill `work` soon, then again and again when it has got on, at a random moment between two
    states or shards; let it finish."""

    def next_progress() -> float:
        seen, ended = progress(), os.WEXITED | os.WNOHANG | os.WNOWAIT
        while progress() <= seen and os.waitid(os.P_PID, pid, ended) is None:
            time.sleep(0.002)
        return time.perf_counter()

    def kill() -> None:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "it had ended already: there is too little to do"

    pid = child(work)
    time.sleep(random.uniform(0, 0.3))
    kill()
    for _ in range(KILLS):
        pid = child(work)
        began = next_progress()
        time.sleep(random.uniform(0, next_progress() - began))
        kill()
    finish(work)


def main(what: str, folder: Path) -> None:
    draw_images(folder / "images")
    profile, shared = profile_of(folder / "images"), folder / "shared"
    for module in (runs, codes):
        module.resolve = lambda path: shared / path
    codes.BATCH, codes.SHARD_BYTES = 6, 1
    code_hashes(["workbook/generators.py"])  # kept for all children

    def newest_state() -> int:
        names = (path.name for path in folder.glob("killed/.ckpt/*/step-*"))
        return max((int(name.removeprefix("step-")) for name in names), default=0)

    def finished_shards() -> int:
        return len(list(folder.glob("killed/.codes.unfinished/*.safetensors")))

    def train(model: Callable[..., object], variant: str, home: Path) -> None:
        runs.resolve = lambda path: home / path
        model(profile, variant, 0, pipeline=True)

    random.seed(what)
    if what == "tokenizer":
        work, progress = partial(train, trained_tokenizer, "sit"), newest_state
    elif what == "generator":
        finish(lambda: load_codes(profile, "ar"))
        work, progress = partial(train, trained_generator, "ar"), newest_state
    else:
        finish(lambda: trained_tokenizer(profile, "sit", 0))
        work, progress = lambda home: extract_codes(profile, "ar", home / "codes"), finished_shards
    finish(partial(work, folder / "whole"))
    kill_and_finish(partial(work, folder / "killed"), progress)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
