# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The description of a processor says everything that decides which numbers reach the model; settings are checked."""

import doctest
import math

import numpy as np
import pytest

from modeling_t3d import image_settings_t3d
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.intensity_t3d import INTENSITIES

SUBJECTS = ("reads", "axes", "obliques", "tilt, shear", "intensity", "outside", "model grid", "global view")


@pytest.mark.parametrize(
    "changed",
    [
        {"spacing": None},
        {"spacing": (2.0, 1.0, 1.0)},
        {"global_size": (64, 64, 64)},
        {"local_size": (32, 32, 32)},
        {"global_fit": "crop"},
        {"global_fit": "resize"},
        {"intensity": "zscore"},
        {"check_intensity": False},
        {"windows": ((-1000.0, 1000.0), (-160.0, 240.0))},
        {"num_local_views": 9},
        {"view_sampling": "overlapping"},
        {"view_sampling": "aligned"},
        {"grid_overlap": 0.5},
        {"deoblique": True},
        {"do_rescale": False},
        {"rescale_factor": 0.5},
        {"do_normalize": True, "image_mean": 0.1, "image_std": 0.9},
    ],
    ids=str,
)
def test_every_setting_shows_in_the_description(changed):
    assert T3DImageProcessor(**changed).describe() != T3DImageProcessor().describe()


@pytest.mark.parametrize(
    ("setting", "value", "with_setting", "shown"),
    [
        ("global_crop_extent", 300.0, {"global_fit": "crop"}, "300"),
        ("view_overlap", 0.5, {"view_sampling": "overlapping"}, "0.5"),
        ("view_jitter", 0.2, {"view_sampling": "aligned"}, "at most 0.1 of its box"),  # which is 2 units wide
    ],
)
def test_settings_of_one_mode_show_in_it(setting, value, with_setting, shown):
    changed, default = T3DImageProcessor(**with_setting, **{setting: value}), T3DImageProcessor(**with_setting)
    assert changed.describe() != default.describe()
    assert shown in changed.describe()


@pytest.mark.parametrize("intensity", INTENSITIES)
def test_one_line_per_subject(intensity):
    text = T3DImageProcessor(intensity=intensity).describe()
    lines = text.split("\n")
    subjects = [line[:14].strip() for line in lines]
    assert len(set(subjects)) == len(subjects)
    assert set(SUBJECTS) <= set(subjects)
    assert ("HU" in text) == (intensity == "hu")
    assert "{" not in text


@pytest.mark.parametrize(
    ("setting", "wrong"),
    [
        ("global_crop_extent", (0.0, -5.0, math.inf, math.nan, "384", True)),
        ("windows", (((-1000.0, math.inf),), ((-math.inf, 0.0),), ((math.nan, 1.0),), ((1.0, math.nan),), ((1, 1),))),
        ("spacing", ((math.nan, 1, 1), (1, math.inf, 1), (1, 1, -1))),
        ("global_size", ((16.5, 16, 16), (16, math.nan, 16), (16, 16, math.inf), (16, 16, "16"), (16, 16, True))),
        ("local_size", ((16.5, 16, 16), (16, -16.0, 16))),
        ("grid_overlap", (-0.1, 1.0, 1.5, math.nan)),
        ("view_overlap", (-0.1, 1.1, math.nan)),
        ("view_jitter", (-1.0, math.inf, math.nan)),
        ("num_local_views", (-3, 2.5, math.nan, math.inf)),
    ],
)
def test_impossible_settings_are_refused(setting, wrong):
    processor = T3DImageProcessor()
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{setting} must be"):
            T3DImageProcessor(**{setting: value})
        with pytest.raises((ValueError, TypeError), match=setting):  # some have a wrong type, too
            processor(np.zeros((4, 4, 4)), affine=np.eye(4), **{setting: value})


def test_what_refuses_a_tilted_scan_is_named():
    with pytest.raises(ValueError, match=r"read_volume\(path, resample=False\) refuses tilted"):
        T3DImageProcessor()(np.zeros((4, 4, 4)), affine=np.eye(4), resample=False)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("view_overlap", share) for share in (0, 1)),
        ("grid_overlap", 0),
        ("view_jitter", 0),
        ("num_local_views", 0),
        ("global_crop_extent", np.float32(0.5)),
    ],
)
def test_the_outermost_settings_are_taken(setting, value):
    assert getattr(T3DImageProcessor(**{setting: value}), setting) == value


def test_whole_numbers_may_be_written_as_floats():
    processor = T3DImageProcessor(global_size=(16.0, np.int64(16), 16), local_size=[8, 8.0, 8], num_local_views=3.0)
    assert (processor.global_size, processor.local_size) == ((16, 16, 16), (8, 8, 8))
    numbers = (*processor.global_size, *processor.local_size, processor.num_local_views)
    assert {type(number) for number in numbers} == {int}


def test_examples_in_the_docstrings():
    results = doctest.testmod(image_settings_t3d)
    assert results.attempted > 0
    assert results.failed == 0
