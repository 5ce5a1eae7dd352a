# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Which series of a folder and which volume of a 4-D file, through every call that takes a path."""

import nibabel
import numpy as np
import pytest
import torch
from body_phantom import body_array
from dicom_writer import SECRETS, write_series
from tiny_checkpoint import tiny_processor, tiny_volume

from modeling_t3d.geometry_t3d import VolumeGeometryError, VolumeReadError
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.volume_io_t3d import read_volume, to_volume

SIZES = {"spacing": (4, 4, 4), "global_size": (8, 8, 8), "local_size": (8, 8, 8)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two axial CT series: reading one takes a choice."""
    path = tmp_path_factory.mktemp("study")
    for number in range(2):
        stored = (body_array((16, 20, 24), seed=number) + 1024).astype(np.uint16)
        write_series(
            path / str(number),
            stored,
            PixelSpacing=[4.0, 4.0],
            SeriesInstanceUID=f"{SECRETS[4]}.{number}",
            RescaleIntercept=-1024 + 10 * number,
        )
    return path


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    path = tmp_path_factory.mktemp("four") / "four.nii.gz"
    values = np.stack([tiny_volume(0).array, tiny_volume(1).array], axis=-1).transpose(2, 1, 0, 3)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([5.0, 5.0, 6.0, 1.0])), path)
    return path


@pytest.fixture(params=["image processor", "processor"])
def call(request):
    if request.param == "image processor":
        return T3DImageProcessor(**SIZES)
    processor = tiny_processor()
    for name, value in SIZES.items():
        setattr(processor.image_processor, name, value)
    return lambda images, **kwargs: processor(images=images, **kwargs)


def test_series_per_volume_or_one_for_all(call, folder):
    expected = [call(read_volume(folder, series=number))["pixel_values"] for number in range(2)]
    assert not torch.equal(*expected)
    assert torch.equal(call(folder, series=1)["pixel_values"], expected[1])
    both = call([folder, folder], series=[1, 0])["pixel_values"]
    assert torch.equal(both, torch.cat(expected[::-1]))
    assert torch.equal(call([folder, folder], series=1)["pixel_values"], torch.cat([expected[1]] * 2))
    mixed = call([folder, tiny_volume(0)], series=[0, None])["pixel_values"]
    assert torch.equal(mixed[:1], expected[0])


def test_time_per_volume_or_one_for_all(call, four):
    expected = [call(read_volume(four, time_index=number))["pixel_values"] for number in range(2)]
    assert not torch.equal(*expected)
    assert torch.equal(call(four, time_index=1)["pixel_values"], expected[1])
    assert torch.equal(call([four, four], time_index=[1, 0])["pixel_values"], torch.cat(expected[::-1]))
    assert torch.equal(call(nibabel.load(four), time_index=1)["pixel_values"], expected[1])
    np.testing.assert_array_equal(
        to_volume(nibabel.load(four), time_index=1).array, to_volume(four, time_index=1).array
    )


@pytest.mark.parametrize("number", [np.int64, np.uint8, np.array, torch.tensor])
def test_a_choice_may_be_a_number_of_another_library(call, folder, four, number):
    """As a data frame or an array of indices gives it."""
    for path, name in ((folder, "series"), (four, "time_index")):
        expected = call(path, **{name: 1})["pixel_values"]
        assert torch.equal(call(path, **{name: number(1)})["pixel_values"], expected)
        with pytest.raises(VolumeReadError, match=f"{name}="):
            call(path, **{name: number(2)})


@pytest.mark.parametrize("wrong", [True, False, np.True_, np.False_, 1.0, 0.0, "", "1", np.float64(1)])
def test_a_choice_is_a_whole_number(folder, four, wrong):
    for path, name in ((folder, "series"), (four, "time_index")):
        with pytest.raises(VolumeReadError, match=f"{name}="):
            read_volume(path, **{name: wrong})


def test_errors_list_what_there_is(call, folder, four):
    listing = r"series=0: CT axial 24x20x16; series=1: CT axial 24x20x16"
    for given, message in [({}, rf"choose one with series= \({listing}\)"), ({"series": 2}, rf"series=2 .*{listing}")]:
        with pytest.raises(VolumeReadError, match=message) as error:
            call(folder, **given)
        assert str(error.value).startswith(str(folder))
        assert not any(secret in str(error.value) for secret in SECRETS)
    with pytest.raises(VolumeReadError, match=r"holds 2 volumes \(4-D\); choose one with time_index=0..1"):
        call(four)
    with pytest.raises(VolumeReadError, match=r"time_index=2 is outside 0..1"):
        call(four, time_index=2)
    with pytest.raises(VolumeReadError, match="series= is for DICOM"):
        call(four, series=0)
    with pytest.raises(VolumeGeometryError, match="volume 0: series= is for files; this Volume holds one volume"):
        call(tiny_volume(0), series=0)
    with pytest.raises(ValueError, match="series has 1 entries for 2 images"):
        call([folder, folder], series=[0])


def test_choices_are_not_saved(tmp_path):
    processor = T3DImageProcessor(**SIZES)
    processor.save_pretrained(tmp_path)
    assert not {"series", "time_index"} & set((tmp_path / "preprocessor_config.json").read_text().split('"'))
    with pytest.raises(TypeError, match="has no field 'series'"):
        T3DImageProcessor(**SIZES, series=1)
