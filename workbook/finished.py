"""What training has made, kept until the pipeline has gone through: `python -m workbook.finished` forgets it.

Between the end of a training and the moment at which DVC has its model lie the rest of a notebook, hashes and copies of gigabytes, and DVC
removes the outputs of a stage before it runs it again. A machine that fails there would cost days. So the files of a finished run stay
linked under `.ckpt/finished`, and the same run takes them from there. They take no room until DVC has copies, then that of a model. The
last stage of the pipeline forgets them; from then on a stage that is forced trains again.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from sitlib.files import atomic_write
from workbook.paths import resolve

FOLDER = ".ckpt/finished"


class Finished:
    """The files of one run, of which there may have been others with the same output.

    Args:
        output: names what the run makes.
        key: names the run, with its code and its images (`runs.resume_key`).
        folder: of all finished runs.
    """

    def __init__(self, output: str, key: str, folder: Path):
        self._others, self._own = folder / output, folder / output / key

    def keep(self, files: Mapping[str, Path]) -> None:
        """Keeps files under the names that they are given, instead of those of earlier runs with the same output."""
        partial = self._others / "partial"
        shutil.rmtree(self._others, ignore_errors=True)
        for name, file in files.items():
            _link(file, partial / name)
        os.replace(partial, self._own)

    def restore(self, files: Mapping[str, Path]) -> bool:
        """Puts the kept files where they belong; False if there are none of this run."""
        if not self._own.is_dir():
            return False
        for name, file in files.items():
            _link(self._own / name, file)
        return True


def _link(file: Path, other: Path) -> None:
    """A second name of a file, or a copy where the file system has no such thing; replaces what is there."""
    with atomic_write(other) as partial:
        partial.unlink(
            missing_ok=True
        )  # of a process that was killed: a name of the very file that a copy would overwrite
        try:
            os.link(file, partial)
        except OSError:
            shutil.copyfile(file, partial)


def forget(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    forget(resolve(FOLDER))
