"""Finding a RabbitMQ on this machine, or unpacking Debian's packages of it without root.

Unpacked packages go to ``$XDG_CACHE_HOME/fluffle/rabbitmq/<distribution>-<version>-<machine>/``:
nothing is installed, no service is started, and removing that folder undoes all of it.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fluffle_common.cli.settings import cache_folder
from fluffle_common.errors import BrokerError

_SYSTEM_LIB = Path("/usr/lib/rabbitmq/lib")
_SERVER = "rabbitmq-server"

REMEDIES = (
    "install rabbitmq-server, or start Docker, or point --url (FLUFFLE_URL) at a RabbitMQ you run"
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Installation:
    """A RabbitMQ that can be started."""

    server: Path
    """The server script itself."""
    origin: Literal["installed", "unpacked"]
    path: tuple[Path, ...] = ()
    """Folders to look for programs in, before those of PATH."""
    libraries: tuple[Path, ...] = ()
    """Folders with shared libraries that the system does not have."""


def find_installed(system_lib: Path = _SYSTEM_LIB) -> Installation | None:
    """Find the system's own RabbitMQ.

    Debian and Fedora keep the real script in a folder with the version in its name, and put a
    wrapper on PATH that insists on root; elsewhere (Homebrew, the generic archive) what is on PATH
    is the script itself.
    """
    found = _newest(system_lib.glob(f"rabbitmq_server-*/sbin/{_SERVER}"))
    if found is None:
        on_path = shutil.which(_SERVER)
        found = Path(on_path) if on_path else None
    return Installation(found, "installed") if found else None


def find_unpacked(cache: Path | None = None) -> Installation | None:
    """Find packages that were unpacked earlier."""
    root = cache or _cache_folder()
    try:
        server = _newest(root.glob(f"usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/{_SERVER}"))
    except PermissionError:  # `unpack` will say so
        return None
    if server is None:
        return None
    libraries = (*root.glob("usr/lib/*-linux-*"), *root.glob("lib/*-linux-*"))
    return Installation(
        server, "unpacked", (root / "usr/lib/erlang/bin", root / "usr/bin"), libraries
    )


def unpack(say: Say, cache: Path | None = None) -> Installation:
    """Download Debian's packages of RabbitMQ and Erlang and unpack them into the cache.

    Raises:
        BrokerError: apt cannot reach or does not know the packages, or the disk is full.
    """
    root = cache or _cache_folder()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        # Beside its final place, so that one rename makes it whole or not there at all.
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=root.parent) as scratch:
            whole = _unpack_into(Path(scratch), say)
            try:
                whole.rename(root)
            except OSError as taken:
                # Somebody else was quicker; theirs is as good.
                if taken.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
    except OSError as failed:
        raise BrokerError(
            f"cannot unpack RabbitMQ into {root.parent}: {failed.strerror or failed}; "
            "make room there, or set XDG_CACHE_HOME to another folder"
        ) from failed
    found = find_unpacked(root)
    if found is None:
        raise BrokerError(f"the packages in {root} hold no {_SERVER}; remove that folder")
    return found


def _unpack_into(scratch: Path, say: Say) -> Path:
    debs = scratch / "debs"
    debs.mkdir()
    apt = _Apt(scratch)
    names = _needed(apt, say)
    say(f"downloading {len(names)} packages of RabbitMQ and Erlang (about 35 MB)")
    try:
        apt.run("download", *names, cwd=debs)
    except _AptFailed:
        # A mirror keeps only the newest version; lists that are older name one that is gone.
        apt.update(say)
        apt.run("download", *_needed(apt, say), cwd=debs)
    whole = scratch / "whole"
    for position, deb in enumerate(sorted(debs.glob("*.deb")), start=1):
        say(f"unpacking {deb.name.partition('_')[0]} ({position} of {len(names)})")
        _run(["dpkg-deb", "--extract", str(deb), str(whole)], cwd=scratch)
    _rewrite_erl(whole)
    return whole


def _needed(apt: _Apt, say: Say) -> list[str]:
    """List the packages to fetch: what an installation would add to this machine."""
    try:
        names = apt.simulate()
    except _AptFailed as failed:
        if not failed.unknown_package:
            raise
        apt.update(say)
        names = apt.simulate()
    if "erlang-base" in names:
        return names
    # An Erlang of the system is of no use to an unpacked RabbitMQ when any application is missing
    # in it; so fetch the whole of it, as if nothing were installed.
    bare = apt.simulate("-o", "Dir::State::status=/dev/null")
    return sorted({*names, *(each for each in bare if each.startswith("erlang-"))})


class _AptFailed(BrokerError):
    """apt said no."""

    def __init__(self, told: str) -> None:
        lines = [line for line in told.splitlines() if line.startswith("E:")]
        reason = lines[0].removeprefix("E:").strip() if lines else "it gave no reason"
        self.unknown_package = "Unable to locate package" in told or "no installation cand" in told
        super().__init__(f"apt-get cannot fetch RabbitMQ ({reason}); {REMEDIES}")


class _Apt:
    """apt-get as this user can run it, with state of its own once it had to update the lists."""

    def __init__(self, scratch: Path) -> None:
        self._private = scratch / "apt"
        # As root, apt would download as another user, who cannot write into our folder.
        self._options: tuple[str, ...] = ("-o", "APT::Sandbox::User=root")

    def simulate(self, *options: str) -> list[str]:
        """List the packages that installing RabbitMQ would add."""
        told = self.run(*options, "install", "-s", "--no-install-recommends", _SERVER)
        return sorted(re.findall(r"^Inst (\S+)", told, flags=re.MULTILINE))

    def update(self, say: Say) -> None:
        """Fetch new package lists: the system's as root, private ones otherwise."""
        say("updating the package lists")
        if os.geteuid() != 0:
            for each in ("lists/partial", "cache/archives/partial"):
                (self._private / each).mkdir(parents=True, exist_ok=True)
            self._options = (
                *("-o", f"Dir::State::lists={self._private}/lists"),
                *("-o", f"Dir::Cache={self._private}/cache"),
                *("-o", "Debug::NoLocking=1"),
            )
        self.run("update")

    def run(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run apt-get and return what it printed."""
        return _run(["apt-get", "-q", *self._options, *arguments], cwd=cwd or self._private.parent)


def _run(command: Sequence[str], *, cwd: Path) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return done.stdout
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if command[0] == "apt-get":
        raise _AptFailed(done.stderr)
    raise BrokerError(f"{shlex.join(command)} failed: {done.stderr.strip()}")


def _rewrite_erl(root: Path) -> None:
    """Let the unpacked ``erl`` find itself: Debian's has /usr/lib/erlang written in it."""
    erlang = root / "usr/lib/erlang"
    runtime = _newest(erlang.glob("erts-*/bin"))
    if runtime is None:
        raise BrokerError(f"the packages hold no Erlang runtime; {REMEDIES}")
    erl = erlang / "bin/erl"
    erl.write_text(
        "#!/bin/sh\n"
        'ROOTDIR=$(dirname "$(dirname "$(readlink -f "$0")")")\n'
        f'BINDIR="$ROOTDIR/{runtime.relative_to(erlang)}"\n'
        "EMU=beam PROGNAME=erl\n"
        "export ROOTDIR BINDIR EMU PROGNAME\n"
        'exec "$BINDIR/erlexec" "$@"\n'
    )
    # RabbitMQ calls the other copy, when it starts epmd.
    (runtime / "erl").unlink()
    (runtime / "erl").symlink_to("../../bin/erl")


def _cache_folder() -> Path:
    # Packages of one release may not run on the next one, and a home may be shared by machines.
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    system = "-".join((release.get("ID", "unknown"), release.get("VERSION_ID", "0")))
    return cache_folder().absolute() / "fluffle" / "rabbitmq" / f"{system}-{platform.machine()}"


def _newest(paths: Iterable[Path]) -> Path | None:
    """Choose the path with the highest version number in it."""
    return max(
        paths, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], default=None
    )
