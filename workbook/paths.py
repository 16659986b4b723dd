"""Where things are: paths in profiles and notebooks are written relative to the project's root.

JupyterLab starts a kernel in the notebook's own folder and papermill in the caller's, so nothing
may depend on the working directory.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def resolve(path: str | Path) -> Path:
    """Absolute form of `path`; a relative one is taken from the project's root, whatever the
    working directory.
    """
    path = Path(path).expanduser()
    return path if path.is_absolute() else ROOT / path
