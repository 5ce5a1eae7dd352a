# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The description of a processor says everything that decides which numbers reach the model."""

import pytest

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
    ("setting", "value", "with_setting"),
    [
        ("global_crop_extent", 300.0, {"global_fit": "crop"}),
        ("view_overlap", 0.5, {"view_sampling": "overlapping"}),
        ("view_jitter", 0.2, {"view_sampling": "aligned"}),
    ],
)
def test_settings_of_one_mode_show_in_it(setting, value, with_setting):
    changed, default = T3DImageProcessor(**with_setting, **{setting: value}), T3DImageProcessor(**with_setting)
    assert changed.describe() != default.describe()
    assert f"{value:g}" in changed.describe()


@pytest.mark.parametrize("intensity", INTENSITIES)
def test_one_line_per_subject(intensity):
    text = T3DImageProcessor(intensity=intensity).describe()
    lines = text.split("\n")
    subjects = [line[:14].strip() for line in lines]
    assert len(set(subjects)) == len(subjects)
    assert set(SUBJECTS) <= set(subjects)
    assert ("HU" in text) == (intensity == "hu")
    assert "{" not in text
