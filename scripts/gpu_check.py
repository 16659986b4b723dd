"""Parts of scripts/gpu_check.sh: `scripts/gpu_check.py machine|precision|steps|train`."""

import argparse
import gc
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from sitlib.files import save_model, write_csv, write_json
from sitlib.metrics.weights import weights_folder
from sitlib.model.sequence import Transformer
from sitlib.train.config import ONE_PROCESS, EngineConfig
from sitlib.train.loop import train_module
from sitlib.train.optim import make_optimizer
from sitlib.train.tokenizer import train_tokenizer
from workbook.describe import descriptions, subject_of
from workbook.profile import Profile, load_profile
from workbook.tokenizers import open_split

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
GIB = 2**30


def machine() -> None:
    """Print versions and devices."""
    print("torch", torch.__version__, "CUDA", torch.version.cuda)
    for index in range(torch.cuda.device_count()):
        print(torch.cuda.get_device_properties(index))


def fit(engine: EngineConfig) -> float:
    """Train a small transformer; its last loss, which is below the first."""
    torch.manual_seed(0)
    model = Transformer(2, 64, 2)
    optimizer = replace(load_profile("smoke").tokenizer.optimizer, steps=20, warmup_steps=0)
    optimizer = replace(optimizer, log_every=1)

    def batch_at(step: int):
        return torch.randn(8, 16, 64, generator=torch.Generator().manual_seed(step))

    def loss(module, batch, step):
        return (module(batch, causal=True) - batch).square().mean(), {}

    with tempfile.TemporaryDirectory() as folder:
        settings = {"folder": Path(folder), "run": {}, "engine": engine}
        _, rows = train_module(model, loss, batch_at, optimizer, **settings)
    assert rows[-1]["loss"] < rows[0]["loss"], rows
    return rows[-1]["loss"]


def precision(_: argparse.Namespace) -> None:
    """Train in every precision, and compiled."""
    for name in ["no", "bf16", *(["fp16"] if HAS_GPU else [])]:
        print(f"precision {name}: loss {fit(replace(ONE_PROCESS, precision=name)):.4f}")
    if HAS_GPU:
        print(f"compiled: loss {fit(replace(ONE_PROCESS, compile=True)):.4f}")


def steps(options: argparse.Namespace) -> None:
    """Make one training step of every model; its peak memory beside that of `describe`."""
    profile = load_profile("smoke" if options.scale == "tiny" else "paper")
    rows = []
    variants = ["sit4", "ar_sit4"] if options.scale == "tiny" else None  # all
    for about in descriptions(profile, variants):
        row = {"model": about.name, "batch": about.batch, "described_gib": about.gpu_bytes / GIB}
        try:
            row |= one_step(profile, about.name, about.batch)
        except torch.cuda.OutOfMemoryError:
            row["error"] = "out of memory"
        except Exception as error:  # the other models are measured all the same
            row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        print(row, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    write_json(Path(options.out) / "steps.json", rows)


def one_step(profile: Profile, name: str, batch: int) -> dict[str, float]:
    """Seconds and peak memory of the second of two steps with random weights and data."""
    with DEVICE:
        subject = subject_of(profile, name, batch)
    is_tokenizer = name in profile.tokenizer.variants
    config = profile.tokenizer_training(name).optimizer if is_tokenizer else None
    config = config or profile.generator_optimizer(name)
    models = [m for m in subject.models if any(p.requires_grad for p in m.parameters())]
    optimizers = [make_optimizer(model, config) for model in models]
    for _ in range(2):
        if HAS_GPU:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=HAS_GPU):
            subject.step()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        peak = torch.cuda.max_memory_allocated() / GIB if HAS_GPU else 0.0
    return {"seconds": time.perf_counter() - began, "measured_gib": peak}


def train(options: argparse.Namespace) -> None:
    """Train `overnight`'s tokenizer of 256 px for so many seconds: a few steps to measure them, then
    as many as there is time for; its weights come back."""
    began, tiny = time.perf_counter(), options.scale == "tiny"
    profile = load_profile("smoke" if tiny else "overnight")
    variant, out = "sit5_sc" if tiny else "sit5_sc_256", Path(options.out)
    config, training = profile.tokenizer_variant(variant), profile.tokenizer_training(variant)
    data, batch = profile.tokenizer_data(variant), 8 if tiny else 64
    has_lpips = (weights_folder() / "alexnet_lpips.safetensors").is_file()  # carried along
    loss = training.loss if has_lpips else replace(training.loss, lpips=0.0)
    training = replace(training, loss=loss, starts_from=None)
    engine = EngineConfig(data_workers=0 if tiny else 12, compile=HAS_GPU)

    def run(count: int):
        schedule = {"steps": count, "warmup_steps": count // 20, "batch_size": batch}
        every = max(1, count // 50)
        schedule |= {"log_every": every, "checkpoint_every": every * 100}
        settings = replace(training, optimizer=replace(training.optimizer, **schedule))
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"seed": 0, "folder": Path(folder), "engine": engine, "title": variant}
            return train_tokenizer(config, settings, data, open_split(data, "train"), **arguments)

    measured = run(20)[1]
    per_step = (measured[-1]["seconds"] - measured[9]["seconds"]) / 10 or 0.01
    left = options.seconds - 2 * (time.perf_counter() - began)
    tokenizer, rows = run(max(20, int(left / per_step)))
    first, last = rows[0], rows[-1]
    lpips = f", LPIPS {last['lpips']:.3f}" if "lpips" in last else ""
    print(f"{last['step']} steps of {batch}, l2 {first['l2']:.3f} -> {last['l2']:.3f}{lpips}")
    write_csv(out / f"{variant}.csv", rows)
    save_model(out / "model.safetensors", tokenizer.cpu().half(), name=variant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {part.__name__: part for part in (precision, steps, train)}
    parser.add_argument("part", choices=["machine", *parts])
    parser.add_argument("--scale", choices=["tiny", "full"], default="full")
    parser.add_argument("--out", default="scratch/gpu_check")
    parser.add_argument("--seconds", type=float, default=480)
    options = parser.parse_args()
    machine() if options.part == "machine" else parts[options.part](options)


if __name__ == "__main__":
    main()
