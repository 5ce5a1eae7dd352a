# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Object storage in memory, at `counting://`, that keeps account of what is read."""

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class CountingFileSystem(MemoryFileSystem):
    """Object storage in memory that keeps account of what is read."""

    protocol = "counting"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    reads: list = []  # noqa: RUF012

    def cat_file(self, path, start=None, end=None, **kwargs):
        content = super().cat_file(path, start=start, end=end, **kwargs)
        self.reads.append((path, start, len(content)))
        return content


fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
