"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aicsd_deploy.errors import InputError, VerificationError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a file cannot grow: no room on the disk, none left to the user, or too large for its file system."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on an error it is removed and `path` stays as it was.

    Where `path` is a link, the file that it leads to is replaced; the new file has the mode of the old one.
    The temporary name keeps the suffix, since several libraries choose the file format by it. Folders that had to be made
    for it and are empty in the end are removed too.

    Raises:
        InputError: `path` is a folder, a device or a pipe, or its folder cannot be made or written to.
        VerificationError: the one that was raised inside, with a word about an older file that is still there.
    """
    path = _replaceable(path)
    made = [folder for folder in path.parents if not os.path.exists(folder)]
    try:
        with _temporary_beside(path) as temporary:
            yield temporary
            if path.exists():
                shutil.copymode(path, temporary)
            else:
                make_readable(temporary)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
    except VerificationError as error:
        if not path.exists():
            raise
        raise VerificationError(f"{error} {path} is still the file that was there before.") from error
    except OSError as error:
        if error.errno in DISK_FULL and not error.filename:  # the system does not say for which file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _replaceable(path: Path | str) -> Path:
    """Return where a file would be written: what `path` leads to, if it is a link. Raise InputError where a file cannot stand there."""
    found = Path(os.path.realpath(path) if os.path.islink(path) else path)
    if found.is_dir():
        raise InputError(f"{path} is a folder, but a file is to be written there. Give a file name.")
    if found.exists() and not found.is_file():
        raise InputError(f"{path} is a device or a pipe, which a file would take the place of. Give a file name.")
    return found


@contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.lstat()  # refuses a name that is too long; the temporary one, which has more to it, is kept short
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}.", suffix=f".tmp{path.suffix}")
    except OSError as error:
        why = f"{path.parent} is a file" if isinstance(error, FileExistsError) else error.strerror
        raise InputError(f"Cannot write {path}: {why}. Choose another place with -o or --out.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def make_readable(temporary: Path) -> None:
    """Give a temporary file, which is private to the user, the mode of an ordinary new file."""
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)


def check_writable(path: Path | str) -> None:
    """Try whether `atomic_path` could write `path`, leaving nothing behind.

    Raises:
        InputError: it could not.
    """
    path = _replaceable(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}. Choose another place.") from error
    os.close(handle)
    Path(name).unlink()


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` atomically, in UTF-8; names of files that are no UTF-8 keep their bytes."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_png(path: Path | str, image: npt.NDArray[np.uint8]) -> None:
    """Write a picture to `path` atomically.

    Args:
        path: where to write it.
        image: uint8 (H, W), or (H, W, 3) in BGR.

    Raises:
        InputError: it is too large for a PNG, or its folder cannot be written to.
        OSError: the disk is full; cv2.imwrite would say so by nothing but its return value.
    """
    import cv2  # here, since most commands that write files have no pictures

    good, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])  # half as large as its default
    if not good:
        raise InputError(f"Cannot write {path}: no PNG can be made of {image.shape[1]}x{image.shape[0]} pixels.")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.tobytes())


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` to `path` atomically as indented JSON; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def existing_file(path: Path | str, what: str) -> Path:
    """Return `path` if it is a file that is not empty; `what` names it in the message.

    Raises:
        InputError: there is no such file, it is a folder, it is empty, or Git LFS has not fetched it.
    """
    path = Path(path)
    if path.is_dir():
        inside = f" Give {path / 'best.pt'}." if (path / "best.pt").is_file() else ""
        raise InputError(f"{what} {path} is a folder, not a file.{inside or ' Name the file in it.'}")
    if not path.exists():
        neighbours = [entry.name for entry in path.parent.glob("*")]  # none where that is no folder, or may not be read
        meant = "".join(f" Did you mean {path.with_name(n)}?" for n in get_close_matches(path.name, neighbours, 1, 0.8))
        raise InputError(f"{what} {path} does not exist.{meant} Check the path (working folder: {Path.cwd()}).")
    if not path.is_file():
        raise InputError(f"{what} {path} is a device or a pipe, not a file. Write it to a file first.")
    if path.stat().st_size == 0:
        raise InputError(
            f"{what} {path} is empty (0 bytes). It was probably cut off when it was written; make it again."
        )
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise InputError(
                f"{what} {path} is a pointer of Git LFS, which has not fetched the file itself. Run: git lfs pull"
            )
    return path


def sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
