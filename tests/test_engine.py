"""The engine: many processes as one; memory, precision and speed; what is shown."""

import json
from dataclasses import replace
from importlib.util import find_spec

import processes
import pytest
import torch
from PIL import Image
from tiny import TEXTS, new_generator
from torch.nn.attention import SDPBackend, sdpa_kernel

from sitlib.model.block import Block, BlockOptions
from sitlib.model.config import TextEncoderConfig
from sitlib.model.sequence import Transformer
from sitlib.model.transformer import ADTransformer
from sitlib.train.config import ONE_PROCESS
from sitlib.train.distributed import make_accelerator, precision
from sitlib.train.tokenizer import PICTURES
from workbook.paths import ROOT


@pytest.mark.parametrize("what", [processes.tokenizer, processes.generator])
def test_batches_are_the_same_whoever_makes_them_and_in_however_many_parts(tmp_path, what):
    whole = what(tmp_path / "whole", ONE_PROCESS)
    model, _ = what(tmp_path / "workers", replace(ONE_PROCESS, data_workers=2))
    assert all(map(torch.equal, model.state_dict().values(), whole[0].state_dict().values()))
    assert_alike(what(tmp_path / "parts", replace(ONE_PROCESS, micro_batch_size=2)), whole)


@pytest.mark.parametrize(("at_a_time", "parts"), [(0, 1), (12, 1), (11, 2), (5, 3)])
def test_a_share_passes_in_as_few_equal_parts_as_memory_permits(at_a_time, parts):
    engine = replace(ONE_PROCESS, processes=2, micro_batch_size=at_a_time)
    assert engine.accumulation(24) == parts


# -- several processes -----------------------------------------------------------------------------


def assert_alike(ours, theirs):
    """Models and curves, up to the order of additions."""
    (model, rows), (other, other_rows) = ours, theirs
    ours = model if isinstance(model, dict) else model.state_dict()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(
            ours[name], value, atol=5e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    for row, expected in zip(rows, other_rows, strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**expected, "seconds": 0}, 1e-4, 1e-6)


def test_two_processes_train_what_one_trains(tmp_path):
    """Weights, codebooks, restarts, adversary, texts and curve: with DDP, accumulated and
    killed (gloo on CPUs)."""
    result = processes.in_two_processes(ROOT / "tests/processes.py", tmp_path, timeout=180)
    assert result.returncode == 0, result.stderr[-3000:]
    one = {
        name: getattr(processes, name)(tmp_path / f"one-{name}", ONE_PROCESS)
        for name in ("tokenizer", "generator", "captioned")
    }
    # Each process has four images, and so has each part here.
    parts = replace(ONE_PROCESS, micro_batch_size=4)
    one["adversary"] = processes.adversary(tmp_path / "one-adversary", parts)
    restarted = [row["restarted"] for row in one["tokenizer"][1]]
    assert sum(restarted) > 0 and restarted[0] == 0
    assert all(row["adversarial"] and row["discriminator"] for row in one["adversary"][1][3:])
    for name in ("tokenizer", "adversary", "generator", "captioned"):
        weights, others = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        assert all(torch.equal(value, others[key]) for key, value in weights.items()), name
        rows = json.loads((tmp_path / f"{name}-0.json").read_text())
        assert_alike((weights, rows), one[name])


def test_more_processes_than_there_are_and_trackers_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="asks for 2 processes and there are 1"):
        make_accelerator(replace(ONE_PROCESS, processes=2), tmp_path)
    if find_spec("aim") is None:
        with pytest.raises(ValueError, match=r"engine\.trackers: aim: install the package"):
            make_accelerator(replace(ONE_PROCESS, trackers=["aim", "tensorboard"]), tmp_path)


# -- memory and speed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: Transformer(3, 32, 2, dropout=0.2), lambda: ADTransformer(3, 2, 32, 3, 2)]
)
def test_recomputed_activations_give_the_same_gradients(make):
    gradients = []
    for gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        model = make().train()
        model.gradient_checkpointing = gradient_checkpointing
        x = torch.randn(2, 12, 32)
        model(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


FAST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
every_device = pytest.mark.parametrize("device", DEVICES)


@every_device
@pytest.mark.parametrize("case", ["full", "causal", "padded", "cross"])
def test_no_attention_falls_back_to_materialised_scores(case, device):
    options = BlockOptions(cross_attention=case == "cross")
    model = Transformer(2, 128, 2, options=options).to(device)
    x = torch.randn(2, 64, 128, device=device)
    mask = torch.arange(64, device=device) < torch.tensor([[40], [64]], device=device)
    with sdpa_kernel(FAST), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        context = model.encode_context(x, mask) if case == "cross" else None
        mask = mask if case == "padded" else None
        model(x, case == "causal", mask_BT=mask, context=context).float().square().mean().backward()


def test_blocks_that_read_texts_compile_and_are_computed_again_whatever_the_length():
    """As in the profile `paper`: more layers than a function may have graphs, any length."""
    shape = {"layers": 9, "text": TextEncoderConfig(9, 300, TEXTS.max_tokens)}
    models = [new_generator("text", **shape).train() for _ in range(2)]  # of the same weights
    plain, compiled = models
    for part in compiled.modules():
        if isinstance(part, Transformer):
            part.gradient_checkpointing = True
        if isinstance(part, Block):
            part.compile(backend="eager", fullgraph=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for length in (5, 7, 9):
            codes = torch.randint(20, (2, 3, 4))
            tokens = torch.randint(1, TEXTS.vocab_size, (2, length))
            for model in models:
                model.zero_grad()
                model(codes, tokens).square().mean().backward()
            for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
                if theirs.grad is not None:
                    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


# -- what is shown while it trains -----------------------------------------------------------------


def test_reconstructions_are_shown_while_a_tokenizer_trains(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown, _ = processes.tokenizer(
        tmp_path, replace(ONE_PROCESS, trackers=["tensorboard"], images_every=3)
    )
    events = accumulator.EventAccumulator(str(tmp_path / "trackers/test-states"))
    events.Reload()
    size = (2 * PICTURES * 64, 64)  # px, of the pictures of steps 3 and 6
    told = [(event.step, event.width, event.height) for event in events.Images("images")]
    assert told == [(3, *size), (6, *size)]
    files = sorted((tmp_path / "images/test-states").iterdir())
    assert [file.name for file in files] == ["step-00000003.png", "step-00000006.png"]
    assert {Image.open(file).size for file in files} == {size}
    plain, _ = processes.tokenizer(tmp_path / "plain", ONE_PROCESS)
    assert all(map(torch.equal, shown.state_dict().values(), plain.state_dict().values()))


# -- precision -------------------------------------------------------------------------------------


def test_a_cpu_computes_in_bf16_if_it_multiplies_matrices_in_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for kind, chosen in (("amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("avx512_f", "no")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda kind=kind: {kind: True})
        assert (precision("bf16"), precision("auto")) == ("bf16", chosen)
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        precision("fp16")
