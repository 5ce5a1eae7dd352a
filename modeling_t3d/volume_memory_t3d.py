# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Memory for voxels that are written next."""

from math import prod

import numpy as np
import torch

LARGE = 1 << 22  # bytes; from here on numpy asks the system for large pages
ALIGNMENT = 64  # bytes, as torch aligns its own


def empty_voxels(*shape: int) -> torch.Tensor:
    """`torch.empty` in float32 on the CPU, whose large arrays are filled several times faster.

    The first write to each page of new memory stops the program, which for the view of a whole CT takes about as
    long as computing it. numpy asks for large pages where torch does not, so large tensors are made of its arrays.

    Example:

    ```python
    >>> from modeling_t3d.volume_memory_t3d import empty_voxels

    >>> empty_voxels(2, 128, 128, 128).shape
    torch.Size([2, 128, 128, 128])

    ```
    """
    num_bytes = 4 * prod(shape)
    if num_bytes < LARGE:
        return torch.empty(shape)
    block = np.empty(num_bytes + ALIGNMENT, dtype=np.uint8)
    first = -block.ctypes.data % ALIGNMENT
    return torch.from_numpy(block[first : first + num_bytes]).view(torch.float32).view(shape)


__all__ = ["empty_voxels"]
