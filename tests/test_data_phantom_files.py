# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Phantoms on disk: what is written reads back, an interrupted call is finished, another version is refused."""

import csv
import json
import time

import numpy as np
import pytest

from modeling_t3d.data.manifest import read_manifest
from modeling_t3d.data.phantoms import (
    FINDINGS,
    PHANTOM_VERSION,
    PhantomFolderError,
    generate_phantom,
    phantom_seeds,
    write_phantoms,
)
from modeling_t3d.volume_io_t3d import read_volume


def test_written_files_read_back_as_the_phantom(tmp_path):
    seeds = [*phantom_seeds("train", 8), *phantom_seeds("test", 2)]
    shape = (26, 18, 24)
    manifest = write_phantoms(tmp_path / "set", seeds, masks=True, shape=shape, compress=False)
    rows = list(csv.DictReader(manifest.open(encoding="utf-8")))
    assert [row["split"] for row in rows] == ["train"] * 8 + ["test"] * 2
    orders = set()
    for seed, row in zip(seeds, rows, strict=True):
        phantom = generate_phantom(seed, shape=shape)
        stored = read_volume(manifest.parent / row["volume"])
        canonical = stored.to_canonical()
        assert np.array_equal(canonical.array, phantom.volume.array)
        np.testing.assert_allclose(canonical.affine, phantom.volume.affine, atol=1e-3)
        orders.add(stored.array.shape + tuple(np.sign(stored.affine[:3, :3].sum(axis=0))))
        masks = json.loads(row["masks"])
        for kind, array in (("lesions", phantom.lesions), ("organs", phantom.organs)):
            assert np.array_equal(read_volume(manifest.parent / masks[kind]).to_canonical().array, array)
        assert row["findings"] == phantom.findings_text
        assert row["impression"] == phantom.impression_text
        assert {name: int(row[f"label:{name}"]) for name in FINDINGS} == phantom.labels
    assert len(orders) >= 6


def test_manifest_is_one_that_training_reads(tmp_path):
    path = write_phantoms(tmp_path, phantom_seeds("train", 3), shape=(14, 14, 14), masks=True)
    rows = read_manifest(path).rows
    assert len(rows) == 3
    assert all(row.volume.exists() and row.masks["lesions"].exists() for row in rows)
    assert set(rows[0].labels) == set(FINDINGS)
    assert rows[0].patient_id == "phantom-patient-00000000"


def test_interrupted_writing_is_finished_and_finished_files_are_kept(tmp_path):
    first = write_phantoms(tmp_path, range(3), shape=(14, 14, 14))
    kept = tmp_path / "volumes" / "phantom-00000000.nii.gz"
    lost = tmp_path / "volumes" / "phantom-00000001.nii.gz"
    before, content, text = kept.stat().st_mtime_ns, lost.read_bytes(), first.read_text(encoding="utf-8")
    lost.unlink()
    time.sleep(0.01)
    again = write_phantoms(tmp_path, range(3), shape=(14, 14, 14))
    assert again.read_text(encoding="utf-8") == text
    assert kept.stat().st_mtime_ns == before
    assert read_volume(lost).array.shape
    assert len(lost.read_bytes()) == len(content)
    assert not list(tmp_path.rglob(".*"))


def test_a_folder_of_another_version_is_refused(tmp_path):
    write_phantoms(tmp_path, range(1), shape=(14, 14, 14))
    note = tmp_path / "phantoms.json"
    note.write_text(note.read_text().replace(f'"version": "{PHANTOM_VERSION}"', '"version": "0"'))
    with pytest.raises(PhantomFolderError, match="another folder"):
        write_phantoms(tmp_path, range(1), shape=(14, 14, 14))


def test_a_manifest_of_ones_own_is_not_replaced(tmp_path):
    (tmp_path / "manifest.csv").write_text("volume,report\na.nii.gz,mine\n")
    with pytest.raises(PhantomFolderError, match=r"holds a manifest\.csv that is not of phantoms; choose another"):
        write_phantoms(tmp_path, range(1), shape=(14, 14, 14))
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.csv"]


def test_workers_write_the_same_files(tmp_path):
    one = write_phantoms(tmp_path / "one", range(4), shape=(14, 14, 14), compress=False)
    two = write_phantoms(tmp_path / "two", range(4), num_workers=2, shape=(14, 14, 14), compress=False)
    assert one.read_bytes() == two.read_bytes()
    for path in sorted((tmp_path / "one" / "volumes").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / "volumes" / path.name).read_bytes()


def test_masks_of_some_splits(tmp_path):
    seeds = [*phantom_seeds("train", 1), *phantom_seeds("test", 1)]
    rows = read_manifest(write_phantoms(tmp_path, seeds, shape=(14, 14, 14), masks=("test",))).rows
    assert [sorted(row.masks) for row in rows] == [[], ["lesions", "organs"]]
    assert len(list((tmp_path / "masks").iterdir())) == 2
