"""The engine: many processes as one, and a loop that loses nothing whatever is killed."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import processes
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from sitlib.model.config import TextEncoderConfig
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.model.sequence import Block, BlockOptions, Transformer
from sitlib.model.text import TextTokenizer
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import ADBlock, ADTransformer, SequenceLayout
from sitlib.strict import ConfigError, from_dict, to_dict
from sitlib.train import checkpoint as states
from sitlib.train import loop as training
from sitlib.train.checkpoint import StateError
from sitlib.train.distributed import ONE_PROCESS, Engine, Microbatch, precision
from sitlib.train.loop import TrainLoop, train_module
from sitlib.train.optim import learning_rate_factor, make_optimizer
from sitlib.train.tokenizer import PICTURES
from workbook.paths import ROOT
from workbook.profile import Profile, load_profile
from workbook.runs import launch_command, stream

SMOKE = load_profile("smoke")
OPTIMISER = replace(
    SMOKE.tokenizer.optimizer, steps=10, warmup_steps=4, checkpoint_every=3, log_every=1
)


def network():
    set_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))


def batch_at(step, part):
    return part.of(torch.randn(16, 4, generator=torch.Generator().manual_seed(step)))


def loss(module, batch, step):
    value = (module(batch) - batch).square().mean()
    return value, {"l2": value.detach()}


# -- one process, as before ------------------------------------------------------------------------


def fit(folder, model=None, loss_fn=None, optimizer=OPTIMISER, run=None, **options):
    """Train a small network with dropout in `folder`; the network and its curve."""
    options = {"log_folder": folder.parent, **options}
    model, loss_fn = model or network(), loss_fn or loss
    return train_module(
        model, loss_fn, batch_at, optimizer, folder=folder, run=run or {}, **options
    )


def test_one_process_trains_to_the_bit_what_a_plain_loop_trains(tmp_path):
    model, _ = fit(tmp_path / "states")
    plain = network()
    optimizer = make_optimizer(plain, OPTIMISER)
    for step in range(OPTIMISER.steps):
        for group in optimizer.param_groups:
            group["lr"] = OPTIMISER.learning_rate * learning_rate_factor(step, OPTIMISER)
        loss(plain, batch_at(step, Microbatch(0, 1)), step)[0].backward()
        nn.utils.clip_grad_norm_(plain.parameters(), OPTIMISER.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_parts_of_a_batch_are_all_of_it_in_order():
    batch = torch.arange(12), torch.arange(12.0)
    parts = [Microbatch(index, 4).of(batch) for index in range(4)]
    assert [len(part[0]) for part in parts] == [3] * 4
    assert torch.equal(torch.cat([part[1] for part in parts]), batch[1])
    # Nothing else is sent along by a process that makes it.
    assert all(
        tensor.untyped_storage().nbytes() == tensor.nbytes for part in parts for tensor in part
    )


@pytest.mark.parametrize("what", [processes.tokenizer, processes.generator])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, what):
    whole = what(tmp_path / "whole", ONE_PROCESS)
    assert_alike(what(tmp_path / "parts", replace(ONE_PROCESS, micro_batch_size=2)), whole)


@pytest.mark.parametrize("what", [processes.tokenizer, processes.generator])
def test_whoever_makes_the_batches_they_are_the_same(tmp_path, what):
    alone, _ = what(tmp_path / "thread", ONE_PROCESS)
    shared, _ = what(tmp_path / "workers", replace(ONE_PROCESS, data_workers=2))
    for (name, ours), theirs in zip(
        shared.state_dict().items(), alone.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(("at_a_time", "parts"), [(0, 1), (12, 1), (11, 2), (5, 3), (1, 12)])
def test_a_share_passes_in_as_few_equal_parts_as_memory_permits(at_a_time, parts):
    engine = replace(ONE_PROCESS, strategy="ddp", processes=2, micro_batch_size=at_a_time)
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
    assert [sorted(row) for row in rows] == [sorted(row) for row in other_rows]
    for row, expected in zip(rows, other_rows, strict=True):
        for name in row.keys() - {"seconds"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), (
                row["step"],
                name,
            )


def in_two_processes(*arguments, timeout):
    """Run a script by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command, options = [*torchrun, "--nproc-per-node", "2", *map(str, arguments)], {"text": True}
    return subprocess.run(command, env=environment, capture_output=True, timeout=timeout, **options)


def test_two_processes_train_what_one_trains(tmp_path):
    """Weights, codebooks, restarts, adversary, texts and curve: with DDP, accumulated too, and sharded with a kill (gloo on CPUs)."""
    result = in_two_processes(ROOT / "tests/processes.py", tmp_path, timeout=180)
    assert result.returncode == 0, result.stderr[-3000:]
    one = {
        name: getattr(processes, name)(tmp_path / f"one-{name}", ONE_PROCESS)
        for name in ("tokenizer", "generator", "captioned")
    }
    # Each process has four images, and so has each part here.
    one["adversary"] = processes.adversary(
        tmp_path / "one-adversary", replace(ONE_PROCESS, micro_batch_size=4)
    )
    restarted = [row["restarted"] for row in one["tokenizer"][1]]
    assert sum(restarted) > 0 and restarted[0] == 0
    assert all(row["adversarial"] and row["discriminator"] for row in one["adversary"][1][3:])
    for name in (
        "tokenizer-ddp",
        "adversary-ddp",
        "generator-ddp",
        "generator-fsdp",
        "captioned-fsdp",
    ):
        weights, others = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        assert all(torch.equal(value, others[key]) for key, value in weights.items()), name
        rows = json.loads((tmp_path / f"{name}-0.json").read_text())
        assert_alike((weights, rows), one[name.split("-")[0]])


def test_more_processes_than_there_are_is_refused(tmp_path):
    with pytest.raises(ValueError, match="asks for 2 processes and there are 1"):
        Engine(replace(ONE_PROCESS, strategy="ddp", processes=2), 8, tmp_path)


@pytest.mark.skipif(find_spec("aim") is not None, reason="aim is installed")
def test_a_tracker_that_is_not_installed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"engine\.trackers: aim: install the package"):
        Engine(replace(ONE_PROCESS, trackers=["aim", "tensorboard"]), 8, tmp_path)


def test_a_state_of_one_process_is_gone_on_from_and_one_of_sharded_models_refused(tmp_path):
    processes.generator(tmp_path, ONE_PROCESS)
    (state,) = (tmp_path / "states").glob("step-*")
    progress = json.loads((state / "progress.json").read_text())
    (state / "progress.json").write_text(json.dumps(progress | {"strategy": "fsdp"}))
    with pytest.raises(
        StateError,
        match="holds a state of engine.strategy fsdp: set that, or remove the folder",
    ):
        processes.generator(tmp_path, ONE_PROCESS)


# -- starting them ---------------------------------------------------------------------------------


def test_one_machine_is_started_with_torchrun_and_several_with_srun(tmp_path, monkeypatch):
    engine = replace(ONE_PROCESS, strategy="ddp", processes=8)
    command = launch_command(engine, ["-m", "module"], {})
    expected = "-m torch.distributed.run --nproc-per-node 8 --standalone -m module"
    assert command[1:] == expected.split()
    with pytest.raises(ValueError, match="start this from a SLURM job of as many nodes"):
        launch_command(replace(engine, machines=4), [], {"MASTER_ADDR": "a"})
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    job = {"SLURM_JOB_NUM_NODES": "4", "SLURM_CPUS_PER_TASK": "64", "MASTER_ADDR": "a"}
    command = launch_command(replace(engine, machines=4), ["-m", "module"], job)
    srun = "srun --nodes 4 --ntasks-per-node 1 --kill-on-bad-exit=1 --cpus-per-task 64"
    assert command[:9] == [*srun.split(), sys.executable]


FAILING = """
from sitlib.train.distributed import barrier, rank
from workbook.runs import training_command

def train(*_):
    if rank() == 1:
        raise {error}
    barrier()

training_command(train)
"""


@pytest.mark.parametrize(
    ("error", "told"),
    [("OSError(28, 'no room')", "disk is full"), ("KeyError('x')", "KeyError: 'x'")],
)
def test_an_error_in_one_process_is_told_and_ends_the_others(tmp_path, error, told):
    (tmp_path / "failing.py").write_text(FAILING.format(error=error))
    run = ["--profile", "smoke", "--variant", "sit4"]
    result = in_two_processes(tmp_path / "failing.py", *run, timeout=60)  # 0 would wait for hours
    assert result.returncode != 0 and told in result.stderr, result.stderr[-2000:]


@pytest.mark.parametrize(("machines", "nodes"), [(1, 8), (4, 2), (2, 1)])
def test_a_slurm_job_of_more_or_fewer_nodes_than_machines_is_refused(machines, nodes):
    engine = replace(ONE_PROCESS, strategy="ddp", processes=8, machines=machines)
    sentence = rf"job has {nodes} node\(s\), .* is {machines}: .*--nodes={machines}\), or set machines: {nodes}\."
    with pytest.raises(ValueError, match=sentence):
        launch_command(engine, [], {"SLURM_JOB_NUM_NODES": str(nodes), "MASTER_ADDR": "a"})
    command = launch_command(
        replace(engine, machines=1), ["-m", "module"], {"SLURM_JOB_NUM_NODES": "1"}
    )
    assert command[-3:] == ["--standalone", "-m", "module"]


def test_the_slurm_script_asks_for_what_its_profile_uses():
    script = (ROOT / "scripts/slurm.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --(\S+)=(\S+)$", script, re.MULTILINE))
    (name,) = re.findall(r"PROFILE:-(\w+)", script)
    engine = load_profile(name).engine
    assert (asked["nodes"], asked["gpus-per-node"]) == (str(engine.machines), str(engine.processes))


@pytest.mark.parametrize("restarts", [0, 1])
def test_the_slurm_script_checks_its_nodes_and_after_a_requeue_removes_dvcs_marks(
    tmp_path, restarts
):
    programs, marks = tmp_path / "programs", tmp_path / ".dvc/tmp/rwlock"
    for file, text in (
        (programs / "python", '#!/bin/sh\necho "$@" >> called\n'),
        (programs / "scontrol", "#!/bin/sh\necho first; echo second\n"),
        (tmp_path / ".venv/bin/activate", ""),
        (marks, "{}"),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    environment = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "nodes",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    subprocess.run(
        ["bash", ROOT / "scripts/slurm.sh", "-S", "data_folder=x"], env=environment, check=True
    )
    assert (tmp_path / "called").read_text().splitlines() == [
        "-m workbook.preflight paper",
        "-m dvc exp run --set-param profile=paper -S data_folder=x",
    ]
    assert marks.exists() == (not restarts)


def test_what_a_program_prints_appears_and_its_exit_code_is_told(capsys):
    assert stream([sys.executable, "-c", "print('grün', flush=True); raise SystemExit(3)"]) == 3
    assert capsys.readouterr().out == "grün\n"


# -- kill anything, lose nothing -------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["safetensors", "torch", "progress"])
def test_a_full_disk_ends_with_a_sentence_and_the_last_good_state(tmp_path, monkeypatch, writer):
    full, now = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), {"step": 0}

    def fails(real):
        def write(*arguments, **options):
            if now["step"] >= 6:
                raise full
            return real(*arguments, **options)

        return write

    def watched(module, batch, step):
        now["step"] = step
        return loss(module, batch, step)

    import accelerate.checkpointing as checkpointing

    module, name = {
        "safetensors": (checkpointing, "save"),
        "torch": (torch, "save"),
        "progress": (states, "fsync"),
    }[writer]
    monkeypatch.setattr(module, name, fails(getattr(module, name)))
    sentence = "No space left on device.*Make room, then .*: step 00000006 is intact"
    with pytest.raises(StateError, match=sentence):
        fit(tmp_path / "full", loss_fn=watched)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "full").glob("*/")] == ["step-00000006"]
    resumed, whole = fit(tmp_path / "full")[0], fit(tmp_path / "whole")[0]
    assert torch.equal(resumed[0].weight, whole[0].weight)


def test_a_second_run_of_the_same_states_is_refused_while_the_first_lives(tmp_path):
    def greedy(module, batch, step):
        if step == 2:
            with pytest.raises(StateError, match=f"is being trained by process {os.getpid()} on "):
                fit(tmp_path / "states")
        return loss(module, batch, step)

    fit(tmp_path / "states", loss_fn=greedy)
    fit(tmp_path / "states")  # free again


def test_another_run_in_the_folder_is_refused_with_what_differs(tmp_path):
    run = {"model": {"width": 8, "name": "a"}, "seed": 0}
    fit(tmp_path / "states", run=run)
    assert json.loads((tmp_path / "states/run.json").read_text()) == run
    fit(tmp_path / "states", run=run)  # goes on
    other = {"model": {"width": 16, "name": "a"}, "seed": 1}
    with pytest.raises(StateError, match="step 10 of another run .model.width 8, not 16; seed 0, "):
        fit(tmp_path / "states", run=other)


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from sitlib.train.checkpoint import locked
with locked(Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    died = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert died.returncode == -signal.SIGKILL and list(tmp_path.parent.glob("locks/*.lock"))
    with states.locked(tmp_path):
        pass


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


@every_device
@pytest.mark.parametrize("attention", ["full", "scale_causal"])
def test_encoding_and_decoding_fall_back_to_no_materialised_scores(attention, device):
    sizes = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("width", 128), ("heads", 2), ("attention", attention))
    }
    tokenizer = SpectralTokenizer(replace(SMOKE.tokenizer_variant("sit4"), **sizes)).to(device)
    side = tokenizer.config.size
    with sdpa_kernel(FAST):
        tokenizer.decode(tokenizer.encode(torch.rand(2, 3, side, side, device=device)))


def test_blocks_that_read_texts_compile_and_are_computed_again_whatever_the_length():
    """The text models of the profile `paper`: more layers than a function may have graphs, and texts of changing length."""
    texts = TextTokenizer.train(["a red cat", "a blue dog"], 300, 16)
    text = TextEncoderConfig(layers=9, vocab_size=300, max_tokens=16)
    shape = replace(
        SMOKE.autoregressive_variant("ar_sit4"), layers=9, width=16, heads=2, text=text, dropout=0.0
    )
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(AutoregressiveModel(CodeModelConfig(shape, 3, 4, 20, 2, [], texts.to_json())))
        for head in models[-1].heads:
            nn.init.normal_(head.weight)
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
            tokens = torch.randint(1, texts.vocab_size, (2, length))
            for model in models:
                model.zero_grad()
                model(codes, tokens).square().mean().backward()
            for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
                if theirs.grad is not None:
                    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_a_block_compiles_as_one_graph():
    torch.manual_seed(0)
    block = ADBlock(32, 2, 4.0)
    x_by_type, layout = (
        [torch.randn(2, 4, 32), torch.randn(2, 8, 32)],
        SequenceLayout(3, 4, "scale_causal"),
    )
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for ours, theirs in zip(compiled(x_by_type, layout), block(x_by_type, layout), strict=True):
        torch.testing.assert_close(ours, theirs)


class Waits(TorchDispatchMode):
    """Refuses what a GPU has to be waited for: numbers that Python reads, and results whose size depends on numbers."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        places = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.names or any(x is not None and x.dtype == torch.bool for x in places):
            raise RuntimeError(f"{name} waits")
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits():
    """Waiting for the GPU is an error; on a CPU, which never has to wait, what would wait for a GPU is."""
    if not torch.cuda.is_available():
        with Waits():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def adversary(folder, **optimizer):
    """Codes restart on GPUs only: there for all codes, because a CPU first looks how many are needed."""
    restarts = 2 * torch.cuda.is_available()
    settings = {"lpips": 0.0, "reset_dead_codes_after": restarts, "multiscale": 0.3}
    optimizer = {"steps": 6, "batch_size": 8, "checkpoint_every": 3, **optimizer}
    return processes.adversary(folder, ONE_PROCESS, loss=settings, optimizer=optimizer)


@pytest.mark.parametrize(
    "what",
    [
        adversary,
        partial(processes.generator, engine=ONE_PROCESS),
        partial(processes.captioned, engine=replace(ONE_PROCESS, gradient_checkpointing=True)),
    ],
    ids=["tokenizer with a discriminator", "model of classes", "model of texts"],
)
def test_between_rows_of_the_curve_nothing_waits_for_the_gpu(tmp_path, monkeypatch, what):
    """From the first loss of a step to that of the next; the steps that write rows may wait."""
    real, guarded, guard = TrainLoop.steps, [], ExitStack()

    def steps(self, *arguments):
        for step, microbatches in real(self, *arguments):
            guard.close()
            if (step + 1) % 3:
                guarded.append(step)
                guard.enter_context(nothing_waits())
            yield step, microbatches

    monkeypatch.setattr(TrainLoop, "steps", steps)
    # The schedule reads a number that is never on a GPU.
    monkeypatch.setattr(training, "learning_rate_factor", lambda step, config: 1.0)
    with guard:
        _, rows = what(tmp_path, log_every=3)
    assert guarded == [0, 1, 3, 4] and [row["step"] for row in rows] == [3, 6]
    if what is adversary:
        assert rows[-1]["adversarial"] and rows[-1]["discriminator"]
        assert rows[-1]["restarted"] > 0 or not torch.cuda.is_available()


# -- what is shown while it trains -----------------------------------------------------------------


SHOWN = replace(ONE_PROCESS, trackers=["tensorboard"], images_every=3)


def test_trackers_get_a_row_once_when_a_run_is_killed_and_goes_on(tmp_path):
    """It goes on from step 6, after it has told of step 8: a curve in TensorBoard has these steps once."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )

    def stopped(module, batch, step):
        if step == 8:
            raise KeyboardInterrupt
        return loss(module, batch, step)

    options = {"engine": replace(SHOWN, images_every=0), "title": "net, seed 0"}
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "key-images", loss_fn=stopped, **options)
    _, rows = fit(tmp_path / "key-images", **options)
    events = event_accumulator.EventAccumulator(str(tmp_path / "trackers/net-seed-0-key"))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("l2")]
    assert told == [(row["step"], pytest.approx(row["l2"])) for row in rows]


def assert_shown(folder, size):
    """The pictures of steps 3 and 6, in TensorBoard and as files, of this width and height."""
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(str(folder / "trackers/test-states"))
    events.Reload()
    shown = [(event.step, event.width, event.height) for event in events.Images("images")]
    assert shown == [(3, *size), (6, *size)]
    files = sorted((folder / "images/test-states").iterdir())
    assert [file.name for file in files] == ["step-00000003.png", "step-00000006.png"]
    assert {Image.open(file).size for file in files} == {size}


def test_reconstructions_are_shown_while_a_tokenizer_trains(tmp_path):
    pytest.importorskip("tensorboard")
    shown, _ = processes.tokenizer(tmp_path, SHOWN)
    assert_shown(tmp_path, (2 * PICTURES * 64, 64))
    plain, _ = processes.tokenizer(tmp_path / "plain", ONE_PROCESS)
    assert all(map(torch.equal, shown.state_dict().values(), plain.state_dict().values()))


def test_what_cannot_be_shown_costs_no_state(tmp_path, monkeypatch):
    def fails(self, row):
        if row["step"] == 6:
            raise OSError("the tracker is not there")

    monkeypatch.setattr(Engine, "log", fails)
    with pytest.raises(OSError, match="the tracker is not there"):
        fit(tmp_path / "states")
    assert [path.name for path in (tmp_path / "states").glob("*/")] == ["step-00000006"]


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"processes": 2}, "2 processes need strategy: ddp or fsdp, it is single"),
        ({"machines": 0}, "machines must be greater than 0"),
        (
            {"strategy": "ddp", "processes": 3},
            "3 processes share every batch equally, but batch_size of tokenizer.vit_vqgan is 8",
        ),
        ({"micro_batch_size": -1}, "micro_batch_size must be greater than or equal to 0"),
        ({"precision": "bf8"}, "'auto', 'no', 'bf16' or 'fp16'"),
        ({"trackers": ["tensorbored"]}, "tensorboard"),
        ({"strategy": "fsdp"}, "fsdp shards over several processes, and there is one: set single"),
        (
            {"strategy": "fsdp", "processes": 2, "images_every": 10},
            "strategy fsdp shards them: set images_every: 0",
        ),
        ({"proceses": 2}, "did you mean 'processes'"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, sentence):
    values = to_dict(load_profile("smoke"))
    values["engine"] |= changes
    with pytest.raises(ConfigError) as caught:
        from_dict(Profile, values)
    assert sentence in str(caught.value)


def test_a_gpus_precision_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision("bf16") == "bf16"
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        precision("fp16")


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "no"), ({}, "no")],
)
def test_a_cpu_computes_in_bf16_if_it_multiplies_matrices_in_it(monkeypatch, capabilities, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision("auto") == chosen


def test_bf16_trains_too(tmp_path):
    start = network()[0].weight.detach().clone()
    model, rows = fit(tmp_path / "states", engine=replace(ONE_PROCESS, precision="bf16"))
    assert model[0].weight.dtype == torch.float32 and not torch.equal(model[0].weight, start)
    assert rows[-1]["l2"] > 0
