"""What the processes of tests/test_engine.py run under torchrun (`tests/processes.py <folder>`), and what it compares with."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from sitlib.data import open_images
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig, code_nats
from sitlib.model.text import TextTokenizer
from sitlib.train.config import EngineConfig
from sitlib.train.distributed import process_index
from sitlib.train.engine import ONE_PROCESS, join_processes
from sitlib.train.loop import Phase, seed_everything, train
from workbook.profile import load_profile
from workbook.runs import TokenizerRun
from workbook.tokenizers import train_tokenizer

PROFILE = load_profile("smoke")


def tokenizer(folder: Path, engine: EngineConfig, **changes) -> tuple[nn.Module, list]:
    """Moving-average codes that die quickly, smaller sizes and scale-causal attention: everything that processes must agree on."""
    section = PROFILE.tokenizer
    variant = {
        "levels": 3,
        "grid_size": 4,
        "codebook_update": "ema",
        "num_codes": 128,
        "decoder_attention": "scale_causal",
        "loss": {"lpips": 0.0, "restart_after": 3, "multiscale": 0.3},
        "optimizer": {"steps": 6, "batch_size": 8, "log_every": 1, "checkpoint_every": 3},
        **changes,
    }
    profile = replace(
        PROFILE, tokenizer=replace(section, variants={**section.variants, "test": variant})
    )
    run = TokenizerRun.of(profile, "test", 0)
    images = open_images(run.data.source, "train")
    return train_tokenizer(run, images, folder / "states", "test", engine=engine)


def adversary(folder: Path, engine: EngineConfig, **changes) -> tuple[nn.Module, list]:
    """The same with a discriminator, which sees how a part of a batch varies: the same parts are needed for the same result.

    Spectral normalization goes on by a round with every part, and so is left out.
    """
    settings = {"weight": 0.5, "start": 1, "warmup": 1, "ramp": 1, "r1": 0.1, "r1_every": 2}
    return tokenizer(folder, engine, adversarial={**settings, "spectral_norm": False}, **changes)


def generator(
    folder: Path,
    engine: EngineConfig,
    variant: str = "ar_sit4",
    stop_at: int | None = None,
    **changes,
) -> tuple[nn.Module, list]:
    """A small model over random codes, `changes` of its optimizer; `stop_at` raises in the middle of that step."""
    shape = replace(PROFILE.autoregressive_variant(variant), dropout=0.0, layers=2)
    settings = {"steps": 6, "batch_size": 8, "log_every": 1, "checkpoint_every": 3, **changes}
    optimizer = replace(PROFILE.autoregressive.optimizer, **settings)
    seed_everything(0)
    classes, texts, captions = ["a", "b"], None, ["a red cat", "two dogs", "a hat"]
    if shape.text is not None:
        classes, texts = (
            [],
            TextTokenizer.train(captions, shape.text.vocabulary, shape.text.max_tokens),
        )
    model = AutoregressiveModel(
        CodeModelConfig(shape, 4, 16, 64, 2, classes, texts.to_json() if texts else None)
    )

    def batch_at(step, part):
        random = torch.Generator().manual_seed(step)
        codes = torch.randint(64, (8, 4, 16), generator=random)
        condition = torch.randint(3, (8,), generator=random)
        return part.of((codes, texts.encode(captions)[condition] if texts else condition))

    def loss(module, batch, step):
        if step == stop_at:
            raise KeyboardInterrupt
        codes, labels = batch
        return code_nats(module(codes, labels), codes).mean(), {}

    phase = Phase(model, loss)
    rows = train([phase], batch_at, optimizer, checkpoints=folder / "states", engine=engine)
    return phase.module, rows


def captioned(folder: Path, engine: EngineConfig, **changes) -> tuple[nn.Module, list]:
    """The same of texts, which all layers read before the first one computes."""
    return generator(folder, engine, "ar_captioned_sit4_sc", **changes)


def main() -> None:
    """Everything that needs two processes, one thing after another: starting them takes longer."""
    folder = Path(sys.argv[1])
    join_processes()
    two = replace(ONE_PROCESS, processes=2, strategy="ddp")
    sharded = replace(two, strategy="fsdp")
    results = {
        "tokenizer-ddp": tokenizer(folder / "tokenizer", two),
        "adversary-ddp": adversary(folder / "adversary", two),
    }
    with mock.patch("sitlib.train.engine.resolve", lambda path: folder / path):
        tracked = replace(two, micro_batch_size=2, trackers=["tensorboard"])
        results["generator-ddp"] = generator(folder / "ddp", tracked)
    assert torch.distributed.is_initialized(), "results are not written yet"
    with contextlib.suppress(KeyboardInterrupt):
        generator(folder / "fsdp", sharded, stop_at=4)
    assert (folder / "fsdp/states/step-00000003").exists()
    refused = AssertionError(
        "GPUs (nccl) cannot send what lies on a CPU, where the whole of a sharded model is"
    )
    with mock.patch("sitlib.train.engine.of_first_process", side_effect=refused):
        results["generator-fsdp"] = generator(folder / "fsdp", sharded)
        recomputed = replace(sharded, activation_checkpointing=True, micro_batch_size=2)
        results["captioned-fsdp"] = captioned(folder / "captioned", recomputed)
    for name, (model, rows) in results.items():
        torch.save(model.state_dict(), folder / f"{name}-{process_index()}.pt")
        (folder / f"{name}-{process_index()}.json").write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
