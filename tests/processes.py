"""Trainings that tests/test_engine.py runs in one process, and under torchrun in two."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import nn

from sitlib.data import open_images
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig, code_nats
from sitlib.model.text import TextTokenizer
from sitlib.train.config import ONE_PROCESS, EngineConfig
from sitlib.train.distributed import join_processes, rank
from sitlib.train.loop import train_module
from sitlib.train.tokenizer import train_tokenizer
from workbook.paths import ROOT, resolve
from workbook.profile import load_profile
from workbook.runs import TokenizerRun

PROFILE = load_profile("smoke")


def tokenizer(folder: Path, engine: EngineConfig, **changes) -> tuple[nn.Module, list]:
    """Codes that die quickly, smaller sizes and scale-causal attention: everything
    that processes must agree on."""
    section = PROFILE.tokenizer
    variant = {
        "levels": 3,
        "grid_size": 4,
        "num_codes": 128,
        "decoder_attention": "scale_causal",
        "loss": {"lpips": 0.0, "reset_dead_codes_after": 3, "multiscale": 0.3},
        "optimizer": {"steps": 6, "batch_size": 8, "log_every": 1, "checkpoint_every": 3},
        **changes,
    }
    section = replace(section, variants={**section.variants, "test": variant})
    run = TokenizerRun.of(replace(PROFILE, tokenizer=section), "test", 0)
    images = open_images(resolve(run.data.source), "train")
    options = {"seed": 0, "folder": folder / "states", "engine": engine, "log_folder": folder}
    return train_tokenizer(run.model, run.training, run.data, images, title="test", **options)


def adversary(folder: Path, engine: EngineConfig, **changes) -> tuple[nn.Module, list]:
    """The same with a discriminator, which sees how a part of a batch varies: the same parts are
    needed for the same result. Spectral normalization, which goes on with every part, is off."""
    settings = {"weight": 0.5, "start": 1, "warmup": 1, "ramp": 1, "r1": 0.1, "r1_every": 2}
    return tokenizer(folder, engine, adversarial={**settings, "spectral_norm": False}, **changes)


def generator(
    folder: Path,
    engine: EngineConfig,
    variant: str = "ar_sit4",
    stop_at: int | None = None,
    **changes,
) -> tuple[nn.Module, list]:
    """A small model over random codes, `changes` of its optimizer; it may stop amid a step."""
    shape = replace(PROFILE.autoregressive_variant(variant), dropout=0.0, layers=2)
    settings = {"steps": 6, "batch_size": 8, "log_every": 1, "checkpoint_every": 3, **changes}
    optimizer = replace(PROFILE.autoregressive.optimizer, **settings)
    set_seed(0)
    condition, texts, captions = (["a", "b"], None), None, ["a red cat", "two dogs", "a hat"]
    if shape.text is not None:
        texts = TextTokenizer.train(captions, shape.text.vocab_size, shape.text.max_tokens)
        condition = ([], texts.to_json())
    model = AutoregressiveModel(CodeModelConfig(shape, 4, 16, [64] * 4, 2, *condition))

    def batch_at(step):
        random = torch.Generator().manual_seed(step)
        codes = torch.randint(64, (8, 4, 16), generator=random)
        condition = torch.randint(3, (8,), generator=random)
        return codes, texts.encode(captions)[condition] if texts else condition

    def loss(module, batch, step):
        if step == stop_at:
            raise KeyboardInterrupt
        codes, labels = batch
        return code_nats(module(codes, labels), codes).mean(), {}

    options = {"engine": engine, "log_folder": folder}
    return train_module(model, loss, batch_at, optimizer, folder / "states", {}, **options)


def captioned(folder: Path, engine: EngineConfig, **changes) -> tuple[nn.Module, list]:
    """The same of texts, which all layers read before the first one computes."""
    return generator(folder, engine, "ar_captioned_sit4_sc", **changes)


def in_two_processes(*arguments, timeout: float) -> subprocess.CompletedProcess:
    """Run a script by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "--nproc-per-node", "2", *map(str, arguments)]
    options = {"capture_output": True, "text": True}
    return subprocess.run(command, env=environment, timeout=timeout, **options)


def main() -> None:
    """Everything that needs two processes, one thing after another: starting them takes longer."""
    folder = Path(sys.argv[1])
    join_processes()
    two = replace(ONE_PROCESS, processes=2)
    results = {
        "tokenizer": tokenizer(folder / "tokenizer", two),
        "adversary": adversary(folder / "adversary", two),
    }
    tracked = replace(two, micro_batch_size=2, trackers=["tensorboard"])
    results["generator"] = generator(folder / "ddp", tracked)
    assert torch.distributed.is_initialized(), "results are not written yet"
    recomputed = replace(two, gradient_checkpointing=True, micro_batch_size=2)
    with contextlib.suppress(KeyboardInterrupt):
        captioned(folder / "captioned", recomputed, stop_at=4)
    assert (folder / "captioned/states/step-00000003").exists()
    results["captioned"] = captioned(folder / "captioned", recomputed)
    for name, (model, rows) in results.items():
        torch.save(model.state_dict(), folder / f"{name}-{rank()}.pt")
        (folder / f"{name}-{rank()}.json").write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
