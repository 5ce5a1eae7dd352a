# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Objects at an fsspec address, whole or absent: on a disk written aside and renamed, elsewhere in one request."""

import fcntl
import glob
import io
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

_PARTIAL = ".partial"


def connect(url: str, storage_options: dict[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path of an address. Listings are not kept: other processes write too."""
    return fsspec.core.url_to_fs(url, **{"use_listings_cache": False, **storage_options})


def publish(file_system: fsspec.AbstractFileSystem, path: str, write: Callable[[BinaryIO], Any]) -> None:
    """
    Write an object that no reader ever sees in part, whatever kills the writer.

    Args:
        file_system, path: where.
        write (callable): writes the content to a seekable binary file.
    """
    if not isinstance(file_system, LocalFileSystem):
        buffer = io.BytesIO()
        write(buffer)
        file_system.pipe_file(path, buffer.getvalue())
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    remove_abandoned(path)
    with _locked_partial(path) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _locked_partial(path: str) -> BinaryIO:
    """A new file beside an object, locked as long as this process lives: what is not locked was left by a dead one."""
    while True:
        file = open(f"{path}.{uuid.uuid4().hex}{_PARTIAL}", "xb")  # noqa: SIM115 - the caller closes it
        fcntl.flock(file, fcntl.LOCK_EX)
        # Another writer may have taken it for abandoned before the lock.
        if os.path.exists(file.name):
            return file
        file.close()


def remove_abandoned(path: str) -> None:
    """Remove what writers of an object left on a disk when they were killed."""
    for partial in glob.glob(f"{glob.escape(path)}.*{_PARTIAL}"):
        with suppress(FileNotFoundError, BlockingIOError), open(partial, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(partial)


__all__ = ["connect", "publish", "remove_abandoned"]
