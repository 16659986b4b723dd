"""The machine and the lock file that results are of, recorded with every stage."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

from workbook.paths import ROOT


def lock_hash() -> str | None:
    """First 12 hexadecimal digits of the SHA-256 of requirements.lock, if it was installed."""
    installed = ROOT / ".venv/installed"  # the Makefile writes the lock's name into it
    lock = ROOT / "requirements.lock"
    if not lock.exists() or (installed.exists() and lock.name not in installed.read_text()):
        return None
    return hashlib.sha256(lock.read_bytes()).hexdigest()[:12]


def machine() -> dict[str, Any]:
    """Processor, logical cores this process may use, memory in GiB, GPUs (null without one), and
    what `precision: auto` means here."""
    has_affinity = hasattr(os, "sched_getaffinity")
    has_pages = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 if has_pages else None
    gpus = _gpus()
    names = ", ".join(sorted({name for name, _ in gpus}))
    return {
        "cpu": _cpu_info("model name") or platform.processor() or platform.machine() or "unknown",
        "logical_cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "memory_gib": memory and round(memory, 1),
        "gpu": (f"{len(gpus)} x {names}" if len(gpus) > 1 else names) if gpus else None,
        "auto_precision": _auto_precision(gpus),
    }


def _auto_precision(gpus: list[tuple[str, float]]) -> Literal["no", "fp16", "bf16"]:
    """As sitlib's `precision` decides it."""
    if gpus:
        return "bf16" if gpus[0][1] >= 8 else "fp16"
    return "bf16" if {"amx_bf16", "avx512_bf16"} & {*_cpu_info("flags").split()} else "no"


def _gpus() -> list[tuple[str, float]]:
    """Name and compute capability of every GPU that NVIDIA's driver knows."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    rows = re.findall(r"^(.+), (\d+\.\d+)$", answer.stdout, re.MULTILINE)
    return [(name, float(capability)) for name, capability in rows if answer.returncode == 0]


def _cpu_info(key: str) -> str:
    """A line of Linux's /proc/cpuinfo; "" elsewhere."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else ""
    match = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
    return " ".join(match[1].split()) if match else ""
