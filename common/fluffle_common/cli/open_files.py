"""The limit on the number of open files, which ``ulimit -n`` shows and sets."""

from __future__ import annotations

import errno
import resource


def too_many_files(why: OSError) -> str:
    """Return one line for the user if too many files are open, else an empty text."""
    if why.errno == errno.ENFILE:
        return "too many open files on this machine; end other programs and run this command again"
    if why.errno != errno.EMFILE:
        return ""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"too many open files; raise the limit of {limit} open files per process, for example "
        "with 'ulimit -n 4096'"
    )
