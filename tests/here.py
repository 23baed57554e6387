"""``fluffle`` in the process of the tests, for commands that neither wait nor are killed."""

import contextlib
import io
import sys
from unittest import mock

from fluffle_common.cli import app


def fluffle(*words: object) -> tuple[int, str, str]:
    """Run a command; return its exit code, stdout and stderr."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with (
        mock.patch.object(sys, "argv", ["fluffle", *map(str, words)]),
        mock.patch.object(sys, "path", [*sys.path]),  # loading a user's file changes it
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = app._exit_code()
    stdout, stderr = (each.buffer.getvalue().decode() for each in (out, err))
    return code, stdout, stderr
