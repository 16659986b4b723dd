"""The machine that a stage of the pipeline ran on, recorded with the stage: results may be gathered on another one.

Told without torch, which takes seconds to import.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal


def machine() -> dict[str, Any]:
    """Processor, logical cores this process may use, memory in GiB, GPUs (null without one), and what `precision: auto` means here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    gpus = _gpus()
    names = sorted({name for name, _ in gpus})
    return {
        "cpu": _of_cpu("model name") or platform.processor() or platform.machine() or "unknown",
        "logical_cores": cores,
        "memory_gib": memory,
        "gpu": f"{f'{len(gpus)} x ' * (len(gpus) > 1)}{', '.join(names)}" if gpus else None,
        "auto_precision": _auto_precision(gpus),
    }


def _auto_precision(gpus: list[tuple[str, float]]) -> Literal["no", "fp16", "bf16"]:
    """As `sitlib.model.precision.precision` decides it."""
    if gpus:
        return "bf16" if gpus[0][1] >= 8 else "fp16"
    return "bf16" if "amx_bf16" in _of_cpu("flags").split() else "no"


def _gpus() -> list[tuple[str, float]]:
    """Name and compute capability of every GPU that NVIDIA's driver knows."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True)
    rows = (
        re.findall(r"^(.+), (\d+\.\d+)$", found.stdout, re.MULTILINE)
        if found.returncode == 0
        else []
    )
    return [(name, float(capability)) for name, capability in rows]


def _of_cpu(key: str) -> str:
    """A line of Linux's /proc/cpuinfo; "" elsewhere."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else ""
    match = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
    return " ".join(match[1].split()) if match else ""
