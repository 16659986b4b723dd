"""Errors that are the user's to mend: one sentence on the terminal instead of a traceback."""

import errno
import os
import sys
from collections.abc import Callable

# Told by name: to import all modules that raise them takes seconds.
SENTENCES = ("StateError", "NotebookFailed", "DiskError")


def sentence_of(error: BaseException) -> str | None:
    """Sentence for a user about an error that is not the code's, or None."""
    if isinstance(error, ValueError | FileNotFoundError) or type(error).__name__ in SENTENCES:
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full ({error}): make room, then give the same command again."
    return None


def command(main: Callable[[], None]) -> None:
    """Run the `main` of a module; a mistake of the user ends in a sentence and exit code 1."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever reads, `head` for instance, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if (sentence := sentence_of(error)) is None:
            raise
        sys.exit(sentence)
