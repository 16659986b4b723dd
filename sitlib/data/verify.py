"""Whether shards are as they were written: `python -m sitlib.data.verify FOLDER`.

Opening a source compares the sizes of its shards with the manifest, which costs nothing; this reads all of them once.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from sitlib.data.index import DataError
from sitlib.data.manifest import SUFFIX, check_shards, sha256_of, shards_of
from sitlib.paths import resolve


def verify(folder: str | Path) -> int:
    """Compares every shard of the manifests in `folder` with its checksum; the number of shards.

    Raises:
        DataError: no manifest, an unfinished conversion, or shards that are missing, cut off or changed (all are named).
    """
    folder = resolve(folder)
    check_shards(folder)
    shards = [shard for file in sorted(folder.glob(f"*{SUFFIX}")) for shard in shards_of(file)]
    if not shards:
        raise DataError(
            f"There is no manifest (*{SUFFIX}) in {folder}: it was not written by sitlib.data.convert."
        )
    bar = tqdm(shards, f"checking {folder.name}", unit="shard", mininterval=2.0, ncols=110)
    if changed := [
        shard["name"] for shard in bar if sha256_of(folder / shard["name"]) != shard["sha256"]
    ]:
        raise DataError(
            f"{len(changed)} of {len(shards)} shards in {folder} differ from their checksums: {', '.join(changed)}. Copy them again."
        )
    return len(shards)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sitlib.data.verify",
        description="Compares converted shards with their checksums.",
    )
    parser.add_argument("folder", help="folder of shards that sitlib.data.convert has written")
    try:
        print(f"all {verify(parser.parse_args().folder)} shards are as they were written")
    except DataError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
