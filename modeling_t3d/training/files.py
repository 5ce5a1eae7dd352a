# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Files and folders that are whole or absent on a disk: written aside, flushed, renamed. What they hold is the
caller's affair."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL_PREFIX = ".partial-"
_FORMER_PREFIX = f"{PARTIAL_PREFIX}former-"
# What systems and file systems say that open no folder (Windows) or flush none (some network disks).
_NOT_FOR_FOLDERS = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP)
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


def write_text(path: Path, text: str) -> None:
    """Write a small file, as [`write_with`] does."""
    write_with(path, lambda file: file.write(text.encode()))


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small file that is never half there."""
    temporary = path.with_name(f"{PARTIAL_PREFIX}{path.name}")
    write_text(temporary, text)
    os.replace(temporary, path)
    flush(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and the missing ones above it, which last: each is flushed into the one that holds it."""
    if not folder.parent.exists():
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush(folder.parent)


def replace_folder(source: Path, target: Path) -> None:
    """Rename a finished folder to its name; a former one is moved aside first and then removed."""
    former = target.with_name(f"{_FORMER_PREFIX}{target.name}")
    if target.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.replace(target, former)
    os.replace(source, target)
    flush(target.parent)
    shutil.rmtree(former, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Rename back what [`replace_folder`] had moved aside when it was killed before it renamed the new one."""
    for former in folder.glob(f"{_FORMER_PREFIX}*"):
        target = former.with_name(former.name.removeprefix(_FORMER_PREFIX))
        if not target.exists():
            os.replace(former, target)


def flush_folder(folder: Path) -> None:
    """Force a folder and all below it to the disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Force a file or a folder's entries to the disk; a folder, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS or not path.is_dir():
            raise


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_with(path: Path, write: Callable[[Any], Any]) -> None:
    """
    Let a library write a file, force it to the disk, and say what the system said if it cannot.

    torch reports a full disk as a stream that failed; the errors of the file itself name the cause.

    Args:
        path (`Path`): the file.
        write (callable): called with a binary file to write into.
    """
    errors: list[OSError] = []
    try:
        with path.open("wb") as file:
            write(_ErrorRecorder(file, errors))
        flush(path)
    except Exception as error:
        cause = error if isinstance(error, OSError) else next(iter(errors), None)
        if cause is None:
            raise
        # What is still in a buffer fails without the file's name.
        raise OSError(cause.errno, cause.strerror, str(path)) from None


def as_system_error(error: Exception, path: Path) -> OSError | None:
    """The operating system's error behind one that only quotes it, as safetensors does; `None` if there is none."""
    match = _SYSTEM_ERROR.search(str(error))
    return OSError(int(match[1]), os.strerror(int(match[1])), str(path)) if match else None


class _ErrorRecorder:
    """A binary file that notes what went wrong."""

    def __init__(self, file: BinaryIO, errors: list[OSError]) -> None:
        self.file = file
        self.errors = errors

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.errors.append(error)
            raise

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.errors.append(error)
            raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room, on the disk, in the quota or in the limit of a file's size."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


__all__ = [
    "PARTIAL_PREFIX",
    "as_system_error",
    "flush",
    "flush_folder",
    "hash_file",
    "is_disk_full",
    "make_folder",
    "replace_folder",
    "restore_replaced",
    "write_text",
    "write_text_atomically",
    "write_with",
]
