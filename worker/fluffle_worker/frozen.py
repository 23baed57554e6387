"""The frozen tensors of a task: those in use, and those that the coordinator has sent.

The latter are kept in the state folder, so that they need not be sent again after a restart::

    runs/workers/letters/client-1/
        frozen-c0cfac1ff56f74d4.safetensors
"""

from __future__ import annotations

from pathlib import Path

from fluffle_common.cli.console import warn
from fluffle_common.cli.user_code import call_task, warn_in_full
from fluffle_common.durable_files import make_folder
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.tensors.checkpoint import read_metadata
from fluffle_common.tensors.frozen import (
    IN_METADATA,
    NO_FROZEN,
    Frozen,
    frozen_file,
    frozen_of,
    read_frozen,
    save_frozen,
)
from fluffle_common.tensors.layout import Weights, signature_of
from fluffle_worker.results import arrays
from fluffle_worker.signature import check_signature, difference
from fluffle_worker.task import Task


class FrozenTensors:
    """The frozen tensors of a task; see ``Task`` for its part in it.

    Args:
        task: a task with ``frozen``, and perhaps ``share_frozen`` and ``use_frozen``.
        folder: the folder for received tensors; None keeps them in memory only.

    Raises:
        TaskError: if the task's ``frozen`` fails, or returns tensors to share that cannot travel.
    """

    def __init__(self, task: Task, folder: Path | None = None) -> None:
        self._task, self._folder = task, folder
        self.shared = bool(getattr(task, "share_frozen", False))
        try:
            own = self._of_the_task()
        except TaskError as why:
            if why.__cause__ is not None:
                warn_in_full(why.__cause__, "task")
            raise
        self.signature = signature_of(own)
        if self.shared:
            if not own:
                raise TaskError(
                    "the task has share_frozen=True, but no frozen tensors; return them from its "
                    "frozen(), or remove share_frozen"
                )
            if not callable(getattr(task, "use_frozen", None)):
                raise TaskError(
                    "the task has share_frozen=True, but no method use_frozen; add the method, or "
                    "remove share_frozen"
                )
            check_signature(self.signature)
        self._in_use = frozen_of(own).digest
        self._received = self._kept() if self.shared else NO_FROZEN

    @property
    def digests(self) -> tuple[str, ...]:
        """The digests of all frozen tensors that the worker holds, in use or not."""
        return tuple(digest for digest in (self._in_use, self._received.digest) if digest)

    def to_share(self) -> Weights:
        """Return the frozen tensors that go with the first weights; none if they are not shared."""
        return self._of_the_task() if self.shared else {}

    def receive(self, frozen: Frozen) -> bool:
        """Take the frozen tensors that came with work, if any; return whether they are new.

        They are not checked before they are used.
        """
        new = frozen.digest not in ("", *self.digests)
        if new:
            self._received = frozen
        return new

    def use(self, digest: str | None) -> None:
        """Make the task use the frozen tensors of this digest; None changes nothing.

        It blocks and runs the task's code: call it in the training thread.

        Raises:
            TaskError: if they are not here, do not match their digest, or do not fit the task.
        """
        received = self._received
        if digest in (None, self._in_use):
            return
        if digest != received.digest:
            raise TaskError(
                f"this worker has not received the run's frozen tensors (digest {digest:.16}…)"
            )
        found = frozen_of(received.tensors).digest
        if found != digest:
            self._forget(received)
            raise TaskError(
                f"the received frozen tensors have the digest {found:.16}…; expected the digest "
                f"{digest:.16}…"
            )
        if mismatch := difference(signature_of(received.tensors), self.signature):
            raise TaskError(mismatch)
        self._task.use_frozen(received.tensors)  # type: ignore[attr-defined]
        self._in_use = digest
        self._forget(received)
        self._keep(received)

    def _forget(self, received: Frozen) -> None:
        if self._received is received:  # others may have been received meanwhile
            self._received = NO_FROZEN

    def _of_the_task(self) -> Weights:
        give = getattr(self._task, "frozen", None)
        given = call_task("the task's frozen() failed", give) if callable(give) else {}
        return arrays(given, "frozen()", "the frozen tensors")

    def _kept(self) -> Frozen:
        """Read the file of an earlier process, unless it is damaged or no longer fits.

        The task goes on with its own until work needs these.
        """
        for path in self._files():
            try:
                found = read_frozen(path.parent, read_metadata(path).get(IN_METADATA, ""))
            except UsageError:
                continue
            if found.digest and not difference(signature_of(found.tensors), self.signature):
                return found
        return NO_FROZEN

    def _keep(self, frozen: Frozen) -> None:
        if self._folder is None:
            return
        path = frozen_file(self._folder, frozen.digest)
        try:
            make_folder(self._folder)
            save_frozen(self._folder, frozen)
            for other in self._files():
                if other != path:
                    other.unlink(missing_ok=True)
        except OSError as why:
            warn(
                f"cannot write {path} ({why.strerror}); after a restart, this worker must receive "
                "the frozen tensors again"
            )

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("frozen-*.safetensors")) if self._folder else []
