"""Runs a command of a pipeline stage and records how long it took, and where: `python -m workbook.reporting.timed`."""

import argparse
import subprocess
import sys
import time

from sitlib.files import write_json
from workbook.paths import resolve
from workbook.reporting.machine import machine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbook.reporting.timed", description=__doc__)
    parser.add_argument("--stage", required=True, help="name of the stage")
    parser.add_argument(
        "--seconds", required=True, help="JSON file for the wall time and the machine"
    )
    parser.add_argument("module", help="module to run, as in python -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    began = time.perf_counter()
    status = subprocess.run([sys.executable, "-m", options.module, *options.arguments]).returncode
    if status:
        sys.exit(status)
    record = {
        "stage": options.stage,
        "seconds": round(time.perf_counter() - began, 1),
        "machine": machine(),
    }
    write_json(resolve(options.seconds), record)


if __name__ == "__main__":
    main()
