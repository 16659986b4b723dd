"""Running a network over many images: in batches, under a progress bar, where it is fastest."""

import torch
from tqdm import tqdm


def batch_starts(count: int, batch_size: int, title: str, progress: bool | str) -> tqdm:
    """First index of each batch of `count` images, under a progress bar if `progress`; a text stands before its title."""
    title = f"{progress}: {title}" if isinstance(progress, str) else title
    return tqdm(
        range(0, count, batch_size), title, unit="batch", mininterval=5.0, ncols=110, disable=not progress
    )


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
