# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Preparing a scan takes its voxels once and the prepared volume twice, and no more memory, however it is stored."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from body_phantom import body_array
from dicom_writer import multi_frame_elements, write_encoded, write_series, write_slice

SimpleITK = pytest.importorskip("SimpleITK")
pytest.importorskip("pydicom")
SHAPE = (400, 256, 256)  # (z, y, x)
NUM_SMALL = 36  # slices of a scan just large enough for threads
# Bytes of what does not grow with a scan: the sample of a million voxels that is checked, planes and slabs under way.
CONSTANT = 24 << 20
AXIAL = np.diag([0.7, 0.7, 2.0, 1.0])
KINDS = (
    *("axial.nii", "sagittal.nii", "sagittal_unsigned.nii", "scan.mha", "scan.nrrd", "series"),
    *("frames.dcm", "rle.dcm"),
)
SAGITTAL = np.array([[0, 0, 0.7, 0], [0.7, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1.0]])  # of an array (y, z, x)

# A first scan of each kind has loaded what the libraries themselves take.
CHILD = """
import json, sys
import torch
from process_memory import peak, reset_peak
from modeling_t3d.image_processing_t3d import T3DImageProcessor

torch.set_num_threads(2)
processor = T3DImageProcessor(spacing=(8, 8, 8))
result = {}
for small, path in json.loads(sys.argv[1]):
    processor.prepare(small)
    before = reset_peak()
    prepared = processor.prepare(path)
    result[path] = [peak() - before, prepared.array.nbytes]
print(json.dumps(result))
"""


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray, intercept: float = 0.0) -> None:
    image = nibabel.Nifti1Image(np.asfortranarray(array), affine)
    image.header.set_slope_inter(1.0, intercept)
    nibabel.save(image, path)


def write_kind(kind: str, path: Path, array: np.ndarray) -> None:
    stored = (array + 1024).astype(np.uint16)
    if kind == "axial.nii":
        write_nifti(path, array.transpose(2, 1, 0), AXIAL)
    elif kind == "sagittal.nii":
        write_nifti(path, array.transpose(1, 0, 2), SAGITTAL)
    elif kind == "sagittal_unsigned.nii":
        write_nifti(path, stored.transpose(1, 0, 2), SAGITTAL, -1024.0)
    elif kind in ("scan.mha", "scan.nrrd"):
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing((0.7, 0.7, 2.0))
        SimpleITK.WriteImage(image, str(path))
    elif kind == "series":
        write_series(path, stored)
    else:
        positions = [(0.0, 0.0, 2.0 * index) for index in range(len(stored))]
        write_slice(path, stored, (0, 0, 0), **multi_frame_elements(len(stored), positions, [1] * len(stored)))
        if kind == "rle.dcm":
            write_encoded(path, path, "rle")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, list[int]]:
    """Of each kind, the bytes that its preparation took at once and those of the prepared volume."""
    folder = tmp_path_factory.mktemp("memory")
    scan = body_array((25, 32, 32)).repeat(16, 0).repeat(8, 1).repeat(8, 2)
    assert scan.shape == SHAPE
    pairs = []
    for kind in KINDS:
        small, large = folder / "small" / kind, folder / "large" / kind
        small.parent.mkdir(exist_ok=True)
        large.parent.mkdir(exist_ok=True)
        write_kind(kind, small, scan[:: SHAPE[0] // NUM_SMALL].copy())
        write_kind(kind, large, scan)
        pairs.append([str(small), str(large)])
    command = [sys.executable, "-c", CHILD, json.dumps(pairs)]
    # Freed arrays go back at once, or what one scan left behind would count as the next one's or hide it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}
    process = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=True
    )
    return {Path(path).name: numbers for path, numbers in json.loads(process.stdout.splitlines()[-1]).items()}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_is_in_memory_once_beside_twice_its_prepared_volume(measured, kind):
    used, prepared = measured[kind]
    assert used <= 2 * math.prod(SHAPE) + 2 * prepared + CONSTANT
