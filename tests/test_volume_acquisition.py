# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What is told of a scan's acquisition: numbers and words of fixed lists, never what a person typed."""

import numpy as np
import pytest
from dicom_writer import SECRETS, write_series
from testing_utils import shared_data

from modeling_t3d.geometry_t3d import VolumeReadError
from modeling_t3d.volume_io_t3d import read_acquisition, to_volume, write_nifti

pytest.importorskip("pydicom")
ARRAY = np.zeros((3, 4, 5), dtype=np.int16)


def test_known_facts_are_told(tmp_path):
    elements = {"BodyPartExamined": "CHEST", "ContrastBolusAgent": SECRETS[3], "KVP": 120, "SliceThickness": 1.25}
    write_series(tmp_path / "scan", ARRAY, **elements)
    facts = {"modality": "CT", "body_part": "chest", "contrast": True, "slice_thickness": 1.25, "tube_voltage": 120.0}
    assert read_acquisition(tmp_path / "scan") == facts
    assert read_acquisition(next((tmp_path / "scan").iterdir())) == facts


def test_free_text_is_never_told(tmp_path):
    elements = {"BodyPartExamined": "DOE JANE", "SliceThickness": None, "Modality": "DOE"}
    write_series(tmp_path / "scan", ARRAY, **elements)
    assert read_acquisition(tmp_path / "scan") == {}


def test_formats_without_such_facts_say_nothing(tmp_path):
    write_nifti(to_volume(ARRAY, spacing=(2, 1, 1), axes="SAR"), tmp_path / "a.nii.gz")
    assert read_acquisition(tmp_path / "a.nii.gz") == {}
    with pytest.raises(VolumeReadError, match=r"missing\.dcm: no such file"):
        read_acquisition(tmp_path / "missing.dcm")


def test_a_real_series():
    facts = read_acquisition(shared_data("totalsegmentator_dicom_j2k/series"))
    assert facts == {"modality": "CT", "contrast": True, "slice_thickness": 3.0, "tube_voltage": 120.0}
