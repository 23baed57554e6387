"""Finding an installed RabbitMQ, or unpacking Debian's packages without root.

Packages are unpacked into ``$XDG_CACHE_HOME/fluffle/rabbitmq/<distribution>-<version>-<machine>/``.
This installs nothing and starts no service; deleting the folder undoes it.
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
    "install rabbitmq-server, start Docker, or give the coordinator and the workers the --url of "
    "another RabbitMQ"
)

Report = Callable[[str], None]


@dataclass(frozen=True)
class Installation:
    """A RabbitMQ that can be launched."""

    server: Path  # the script
    origin: Literal["installed", "unpacked"]
    path: tuple[Path, ...] = ()  # folders that come before those of PATH
    libraries: tuple[Path, ...] = ()  # folders with shared libraries that the system may lack


def find_installed(system_lib: Path = _SYSTEM_LIB) -> Installation | None:
    """Find the system's RabbitMQ.

    On Debian and Fedora, the server script is in a folder with the version in its name, and PATH
    has a wrapper that insists on root. With Homebrew and the generic archive, PATH has the script.
    """
    server = _newest(system_lib.glob(f"rabbitmq_server-*/sbin/{_SERVER}"))
    if server is None:
        on_path = shutil.which(_SERVER)
        server = Path(on_path) if on_path else None
    return Installation(server, "installed") if server else None


def find_unpacked(cache: Path | None = None) -> Installation | None:
    """Find the packages of an earlier ``unpack``."""
    root = cache or _cache_folder()
    try:
        server = _newest(root.glob(f"usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/{_SERVER}"))
    except PermissionError:  # `unpack` reports it
        return None
    if server is None:
        return None
    libraries = (*root.glob("usr/lib/*-linux-*"), *root.glob("lib/*-linux-*"))
    return Installation(
        server, "unpacked", (root / "usr/lib/erlang/bin", root / "usr/bin"), libraries
    )


def unpack(report: Report, cache: Path | None = None) -> Installation:
    """Download and unpack RabbitMQ and Erlang; raise ``BrokerError`` if apt or the disk fails."""
    root = cache or _cache_folder()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        # On the same file system, so that a rename puts it in place atomically.
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=root.parent) as scratch:
            whole = _unpack_into(Path(scratch), report)
            try:
                whole.rename(root)
            except OSError as exists:
                # Another process was faster; use its result.
                if exists.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
    except OSError as failed:
        raise BrokerError(
            f"cannot unpack RabbitMQ into {root.parent} ({failed.strerror or failed}); free some "
            "space, or set XDG_CACHE_HOME to another folder"
        ) from failed
    installation = find_unpacked(root)
    if installation is None:
        raise BrokerError(
            f"the packages in {root} contain no {_SERVER}; delete this folder, and run the "
            "command again"
        )
    return installation


def _unpack_into(scratch: Path, report: Report) -> Path:
    debs = scratch / "debs"
    debs.mkdir()
    apt = _Apt(scratch)
    try:
        apt.download(debs, report)
    except _AptFailed:  # the lists lack the packages, or name versions that the mirror has not
        apt.update(report)
        apt.download(debs, report)
    whole = scratch / "whole"
    packages = sorted(debs.glob("*.deb"))
    for position, deb in enumerate(packages, start=1):
        report(f"unpacking {deb.name.partition('_')[0]} ({position} of {len(packages)})")
        _run(["dpkg-deb", "--extract", str(deb), str(whole)], cwd=scratch)
    _rewrite_erl(whole)
    return whole


class _AptFailed(BrokerError):
    """apt-get failed."""

    def __init__(self, output: str) -> None:
        lines = [line for line in output.splitlines() if line.startswith("E:")]
        reason = lines[0].removeprefix("E:").strip() if lines else "it gave no reason"
        super().__init__(f"apt-get cannot fetch RabbitMQ ({reason}); {REMEDIES}")


class _Apt:
    """apt-get for an ordinary user, with private package lists once it had to update them."""

    def __init__(self, scratch: Path) -> None:
        self._private = scratch / "apt"
        # If we are root, apt would download as another user, who cannot write into our folder.
        self._options: tuple[str, ...] = ("-o", "APT::Sandbox::User=root")

    def download(self, folder: Path, report: Report) -> None:
        """Download the packages that an installation of RabbitMQ would add."""
        names = self._simulate()
        if "erlang-base" not in names:
            # Parts of Erlang are installed. An unpacked RabbitMQ needs all applications in one
            # place, so download all of Erlang, as if nothing were installed.
            bare = self._simulate("-o", "Dir::State::status=/dev/null")
            names = sorted({*names, *(each for each in bare if each.startswith("erlang-"))})
        report(f"downloading {len(names)} packages of RabbitMQ and Erlang (about 35 MB)")
        self.run("download", *names, cwd=folder)

    def _simulate(self, *options: str) -> list[str]:
        output = self.run(*options, "install", "-s", "--no-install-recommends", _SERVER)
        return sorted(re.findall(r"^Inst (\S+)", output, flags=re.MULTILINE))

    def update(self, report: Report) -> None:
        """Update the package lists: the system's if we are root, else private ones."""
        report("updating the package lists")
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
        """Run apt-get and return its output."""
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
    """Make the unpacked ``erl`` relocatable: Debian's refers to /usr/lib/erlang."""
    erlang = root / "usr/lib/erlang"
    runtime = _newest(erlang.glob("erts-*/bin"))
    if runtime is None:
        raise BrokerError(f"the packages contain no Erlang runtime; {REMEDIES}")
    erl = erlang / "bin/erl"
    erl.write_text(
        "#!/bin/sh\n"
        'ROOTDIR=$(dirname "$(dirname "$(readlink -f "$0")")")\n'
        f'BINDIR="$ROOTDIR/{runtime.relative_to(erlang)}"\n'
        "EMU=beam PROGNAME=erl\n"
        "export ROOTDIR BINDIR EMU PROGNAME\n"
        'exec "$BINDIR/erlexec" "$@"\n'
    )
    # RabbitMQ calls this copy to start epmd.
    (runtime / "erl").unlink()
    (runtime / "erl").symlink_to("../../bin/erl")


def _cache_folder() -> Path:
    # Packages depend on the release, and several machines may share a home folder.
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    # Debian testing has no VERSION_ID, and the next testing may lack the libraries of this one.
    version = release.get("VERSION_ID") or release.get("VERSION_CODENAME", "0")
    system = f"{release.get('ID', 'unknown')}-{version}"
    return cache_folder().absolute() / "fluffle" / "rabbitmq" / f"{system}-{platform.machine()}"


def _newest(paths: Iterable[Path]) -> Path | None:
    """Return the path with the highest version number."""
    return max(
        paths, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], default=None
    )
