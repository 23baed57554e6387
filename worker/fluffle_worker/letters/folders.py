"""Search of a data folder for class folders and their image files."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path

from fluffle_common.errors import TaskError
from fluffle_common.plural import plural

SUFFIXES = frozenset(
    ".bmp .gif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
"""Suffixes of image files, in lower case; matching ignores case."""

_NAMED = 5  # names listed before the rest is only counted
_JUNK = frozenset(
    {
        "#recycle",
        "$recycle.bin",
        "@eadir",
        "desktop.ini",
        "ehthumbs.db",
        "icon\r",
        "lost+found",
        "system volume information",
        "thumbs.db",
    }
)


def find_classes(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """List the image files of each class of a folder, and lines to show to the user.

    Classes without images are left out; the others are sorted by ``class_order``. Names are
    normalised to Unicode's composed form (NFC), so that a folder from macOS and one from Linux are
    the same class. Files and folders that are junk (``is_junk``) are skipped.

    Raises:
        TaskError: if there is no such folder, it cannot be read, or a class has an unusable name.
    """
    if not folder.is_dir():
        raise TaskError(
            f"there is no folder {folder}; set --data to a folder that contains <class>/<image>"
        )
    spellings: dict[str, list[Path]] = defaultdict(list)
    ignored: Counter[str] = Counter()
    nested: list[Path] = []
    for path in _entries(folder):
        if path.is_dir():
            spellings[class_name(path.name)].append(path)
        else:
            ignored[f"{_kind(path)} outside a class folder"] += 1
    files = {}
    for name in sorted(spellings, key=class_order):
        entries = [file for path in spellings[name] for file in _entries(path)]
        nested += [file for file in entries if file.is_dir()]
        images = []
        for file in entries:
            if file.suffix.lower() in SUFFIXES and not file.is_dir():
                images.append(file)
            elif not file.is_dir():
                ignored[_kind(file)] += 1
        files[name] = images
    classes = {name: images for name, images in files.items() if images}
    notes = []
    if ignored:
        listed = some([f"{kind} {count}" for kind, count in ignored.most_common()])
        notes.append(f"ignored {plural(ignored.total(), 'file')}: {listed}")
    if nested:
        notes.append(_nested_note(nested, classes))
    empty = files.keys() - classes.keys()
    if empty and classes:
        notes.append(f"folders without images: {some(sorted(empty, key=class_order))}")
    return classes, notes


def class_name(name: str) -> str:
    """Return the name of a class in Unicode's composed form.

    Raises:
        TaskError: if it is not valid UTF-8, and so cannot be sent.

    Example:
        >>> len("e\u0301"), len(class_name("e\u0301"))
        (2, 1)
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise TaskError(f"the folder name {name!r} is not valid UTF-8; rename the folder") from None
    return unicodedata.normalize("NFC", name)


def class_order(name: str) -> tuple[bool, int, str]:
    """Return the sort key of a class: whole numbers by value, then the others by code point.

    Example:
        >>> sorted(["b", "10", "9", "B", "a"], key=class_order)
        ['9', '10', 'B', 'a', 'b']
    """
    number = re.fullmatch(r"[0-9]{1,18}", name)
    return not number, int(name) if number else 0, name


def is_junk(name: str) -> bool:
    """Return whether a file or folder was left behind by an operating system or a tool.

    Example:
        >>> [is_junk(name) for name in (".ipynb_checkpoints", "__MACOSX", "Thumbs.db", "a")]
        [True, True, True, False]
    """
    return name.startswith((".", "__", "~$")) or name.lower() in _JUNK


def some(names: Collection[str]) -> str:
    """List the first few names, and count the rest.

    Example:
        >>> some("abcdefg")
        'a, b, c, d, e and 2 more'
    """
    listed = ", ".join(list(names)[:_NAMED])
    return f"{listed} and {len(names) - _NAMED} more" if len(names) > _NAMED else listed


def _entries(folder: Path) -> list[Path]:
    """Return the entries of a folder, without junk, sorted by name."""
    try:
        return sorted(path for path in folder.iterdir() if not is_junk(path.name))
    except OSError as why:
        raise TaskError(f"the folder {folder} cannot be read ({why.strerror})") from None


def _kind(path: Path) -> str:
    return path.suffix.lower() or "no suffix"


def _nested_note(folders: list[Path], classes: Collection[str]) -> str:
    if classes:
        return f"ignored {plural(len(folders), 'folder')} inside class folders"
    return f"if {folders[0]} is a class, set --data to {folders[0].parent} instead"
