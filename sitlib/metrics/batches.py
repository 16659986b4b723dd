"""Running a network over many images: in batches, under a progress bar, where it is fastest."""

from tqdm import tqdm


def batch_starts(count: int, batch_size: int, title: str, progress: bool | str) -> tqdm:
    """First index of each batch of `count` images, under a progress bar if `progress`; a text stands before its title."""
    title = f"{progress}: {title}" if isinstance(progress, str) else title
    return tqdm(
        range(0, count, batch_size),
        title,
        unit="batch",
        mininterval=5.0,
        ncols=110,
        disable=not progress,
    )
