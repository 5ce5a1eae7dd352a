# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Memory for voxels is a plain float32 tensor, whatever its size."""

import doctest
import gc

import pytest
import torch

from modeling_t3d import volume_memory_t3d
from modeling_t3d.volume_memory_t3d import ALIGNMENT, LARGE, empty_voxels


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 3, 5), (LARGE // 4 - 1,), (LARGE // 4,), (2, 129, 101, 67)])
def test_it_is_a_contiguous_tensor_of_the_shape(shape):
    tensor = empty_voxels(*shape)
    assert tensor.shape == shape
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % ALIGNMENT == 0


def test_a_view_keeps_the_memory():
    tensor = empty_voxels(3, 128, 128, 128)
    expected = torch.randn(3, 128, 128, 128, generator=torch.Generator().manual_seed(0))
    tensor.copy_(expected)
    view = tensor[1:, 5]
    del tensor
    gc.collect()
    others = [empty_voxels(3, 128, 128, 128).fill_(7.0) for _ in range(3)]
    assert torch.equal(view, expected[1:, 5])
    assert all(bool((other == 7.0).all()) for other in others)


def test_it_goes_to_other_processes_and_files(tmp_path):
    tensor = empty_voxels(2, 128, 128, 64).fill_(3.0)
    torch.save(tensor, tmp_path / "tensor.pt")
    assert torch.equal(torch.load(tmp_path / "tensor.pt", weights_only=True), tensor)
    assert torch.equal(tensor.share_memory_(), torch.full((2, 128, 128, 64), 3.0))


def test_examples_in_the_docstrings():
    results = doctest.testmod(volume_memory_t3d)
    assert results.attempted > 0
    assert results.failed == 0
