# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Prepared volumes come back from disk and pickle as they were; the global frame loses what it says it loses."""

import pickle

import numpy as np
import pytest
import torch
from body_phantom import body_array, upright_affine

from modeling_t3d.geometry_t3d import VolumeGeometryError
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.prepared_volume_t3d import PreparedVolume, cut_frame, frame_loss, global_frame

PROCESSOR = T3DImageProcessor(spacing=(4, 4, 4), global_size=(16, 16, 16), local_size=(8, 8, 8))


def prepare(shape=(40, 30, 36), spacing=(4.0, 4.0, 4.0)) -> PreparedVolume:
    return PROCESSOR.prepare(body_array(shape), upright_affine(spacing, (1.5, -2.0, 700.0)))


def assert_same(first: PreparedVolume, second: PreparedVolume) -> None:
    assert first.array.dtype == second.array.dtype
    np.testing.assert_array_equal(first.array, second.array)
    np.testing.assert_array_equal(first.affine, second.affine)
    np.testing.assert_array_equal(first.body.cells, second.body.cells)
    assert first.body_box == second.body_box
    assert first.body.cell == second.body.cell
    for name in ("value_range", "outside", "source", "warnings", "spacing"):
        assert getattr(first, name) == getattr(second, name)
    assert torch.equal(PROCESSOR.global_view(first), PROCESSOR.global_view(second))
    views = [PROCESSOR.make_views(prepared, 3, 7) for prepared in (first, second)]
    assert torch.equal(views[0].pixel_values, views[1].pixel_values)
    assert torch.equal(views[0].positions, views[1].positions)


@pytest.mark.parametrize("mmap", [True, False])
def test_saved_volume_loads_as_it_was(tmp_path, mmap):
    prepared = prepare()
    prepared.source, prepared.warnings = "scans/a.nii.gz", ("a slice was odd",)
    prepared.save(tmp_path / "volume")
    loaded = PreparedVolume.load(tmp_path / "volume", mmap=mmap)
    assert isinstance(loaded.array, np.memmap) == mmap
    assert_same(prepared, loaded)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["volume.json", "volume.npy"]


def test_declared_intensity_survives_the_cache(tmp_path):
    processor = T3DImageProcessor(spacing=(4, 4, 4), global_size=(8, 8, 8), local_size=(8, 8, 8), intensity="zscore")
    prepared = processor.prepare(body_array() + 2000, upright_affine((4.0, 4.0, 4.0)))
    prepared.save(tmp_path / "volume")
    loaded = PreparedVolume.load(tmp_path / "volume")
    assert loaded.value_range == prepared.value_range
    assert torch.equal(processor.global_view(prepared), processor.global_view(loaded))


def test_pickled_volume_is_the_same():
    prepared = prepare()
    assert_same(prepared, pickle.loads(pickle.dumps(prepared)))


def test_interrupted_save_leaves_nothing_that_loads(tmp_path, monkeypatch):
    def die(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("json.dumps", die)
        with pytest.raises(KeyboardInterrupt):
            prepare().save(tmp_path / "volume")
    with pytest.raises(FileNotFoundError):
        PreparedVolume.load(tmp_path / "volume")


def test_array_of_another_volume_is_refused(tmp_path):
    prepare().save(tmp_path / "a")
    prepare((20, 30, 36)).save(tmp_path / "b")
    (tmp_path / "b.npy").replace(tmp_path / "a.npy")
    with pytest.raises(VolumeGeometryError, match="does not belong"):
        PreparedVolume.load(tmp_path / "a")


def test_body_frame_keeps_all_of_the_body_and_its_proportions():
    prepared = prepare()
    samplings, allowed = global_frame(prepared, "body", (16, 16, 16), (4.0, 4.0, 4.0), 384.0)
    assert allowed == prepared.body_box
    steps = {round(sampling.step, 9) for sampling in samplings}
    assert steps == {max(prepared.body_box.size) / 16}
    discarded, lost = frame_loss(prepared, samplings, allowed)
    assert lost == 0
    box = prepared.body_box
    for axis in range(3):
        assert discarded[axis] == pytest.approx(
            (4 * box.start[axis], 4 * (prepared.array.shape[axis] - box.stop[axis]))
        )


def test_crop_frame_counts_the_body_that_it_leaves_out():
    prepared = prepare()
    samplings, allowed = global_frame(prepared, "crop", (16, 16, 16), (4.0, 4.0, 4.0), 80.0)
    discarded, lost = frame_loss(prepared, samplings, allowed)
    assert discarded[0] == pytest.approx((40.0, 40.0))  # 160 mm, of which the middle 80 stay
    mask = np.asarray(prepared.body)
    box, half = prepared.body_box, 10
    kept = mask[tuple(slice(int(c) - half, int(c) + half) for c in box.center)].sum()
    assert lost == pytest.approx(mask.sum() - kept, rel=0.1)


def test_resize_frame_takes_the_whole_volume():
    prepared = prepare()
    samplings, allowed = global_frame(prepared, "resize", (16, 8, 12), (4.0, 4.0, 4.0), 384.0)
    assert frame_loss(prepared, samplings, allowed) == (((0.0, 0.0),) * 3, 0)
    values = cut_frame(prepared, samplings, allowed, 1, lambda values, out: out[0].copy_(values))[0]
    assert values.mean().item() == pytest.approx(prepared.array.mean(), abs=15)
