# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Prepared volumes are cached by content, views and texts depend on their key alone, failures name the file."""

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from modeling_t3d.data import datasets
from modeling_t3d.data.datasets import PretrainingCollator, PretrainingDataset
from modeling_t3d.data.manifest import ManifestRow
from modeling_t3d.data.phantom_reports import train_phantom_tokenizer
from modeling_t3d.data.store import StoreError, VolumeStore
from modeling_t3d.data.texts import split_sentences, stable_id
from modeling_t3d.geometry_t3d import VolumeError
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.processing_t3d import T3DProcessor

REPORTS = [
    "The heart is of normal size. No effusion. A nodule of 8 mm in the left lung.",
    "No focal lesion in the liver. The spleen is normal. The aorta is calcified.",
    "The HEART is of normal size.  No effusion. A nodule of 8 mm in the left lung.",
]
SIZES = {"spacing": (6, 6, 6), "global_size": (12, 12, 12), "local_size": (6, 6, 6), "num_local_views": 2}


def write_scan(path: Path, seed: int) -> None:
    """A noisy block of soft tissue in air."""
    generator = np.random.default_rng(seed)
    scan = np.full((50, 44, 40), -1000, dtype=np.int16)
    scan[8:42, 8:36] = 40 + generator.integers(-30, 30, (34, 28, 40))
    nibabel.save(nibabel.Nifti1Image(scan, np.diag([6.0, 6.0, 6.0, 1.0])), path)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for number in range(3):
        write_scan(folder / f"{number}.nii.gz", number)
    return folder


def rows_of(folder: Path) -> list[ManifestRow]:
    paths = sorted(folder.glob("*.nii.gz"))
    return [
        ManifestRow(number, path, report, f"p{number}", f"s{min(number, 2)}")
        for number, (path, report) in enumerate(zip(paths, REPORTS, strict=False), start=1)
    ]


def build(folder: Path, cache_dir=None, **settings) -> PretrainingDataset:
    processor_settings = {key: settings.pop(key) for key in list(settings) if key in ("view_sampling", "spacing")}
    return PretrainingDataset(
        rows_of(folder), T3DImageProcessor(**{**SIZES, **processor_settings}), cache_dir, **settings
    )


def collator_of(dataset: PretrainingDataset, max_report_tokens: int = 512, **settings) -> PretrainingCollator:
    tokenizer = train_phantom_tokenizer(REPORTS, 120)
    processor = T3DProcessor(dataset.image_processor, tokenizer, max_report_tokens=max_report_tokens)
    return PretrainingCollator(processor, **settings)


# ---------------------------------------------------------------------------------------------- cache


def entries(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in cache_dir.rglob("*.t3d"))


def test_cached_volumes_are_the_prepared_ones(scans, tmp_path, monkeypatch):
    dataset = build(scans, tmp_path)
    direct = build(scans)
    for index in range(3):
        assert np.array_equal(dataset.prepared(index).array, direct.prepared(index).array)
    again = build(scans, tmp_path)
    monkeypatch.setattr(again.image_processor, "prepare", None)
    for index in range(3):
        cached = again.prepared(index)
        assert np.array_equal(cached.array, direct.prepared(index).array)
        assert np.array_equal(cached.affine, direct.prepared(index).affine)
        assert cached.source == str(again.rows[index].volume)


def test_the_key_is_the_content_and_the_preparation(scans, tmp_path):
    folder, cache_dir = tmp_path / "scans", tmp_path / "cache"
    shutil.copytree(scans, folder)
    first = build(folder, cache_dir).prepared(0).array[:, :, :]
    assert len(entries(cache_dir)) == 1
    build(folder, cache_dir, view_sampling="aligned").prepared(0)
    assert len(entries(cache_dir)) == 1, "how views are cut does not change what is prepared"
    (folder / "0.nii.gz").rename(folder / "a.nii.gz")
    assert np.array_equal(build(folder, cache_dir).prepared(2).array, first)
    assert len(entries(cache_dir)) == 1, "the same scan under another name"
    write_scan(folder / "a.nii.gz", 7)
    assert not np.array_equal(build(folder, cache_dir).prepared(2).array, first), "another scan under the same name"
    build(folder, cache_dir, spacing=(9, 9, 9)).prepared(2)
    assert len(entries(cache_dir)) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "foreign"])
def test_a_damaged_or_foreign_entry_is_prepared_again(scans, tmp_path, caplog, damage):
    dataset = build(scans, tmp_path)
    expected = dataset.prepared(0).array[:, :, :]
    dataset.prepared(1)
    paths = {path.stem: path for path in tmp_path.rglob("*.t3d")}
    path, other = (paths[dataset.store.key_of(dataset.rows[index].volume)] for index in (0, 1))
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "foreign":
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(content[:-3] if damage == "cut" else content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    again = build(scans, tmp_path)
    assert np.array_equal(again.prepared(0).array, expected)
    assert ("is not what was written; it is prepared again now" in caplog.text) == (damage != "remove")
    assert path.read_bytes() == content, "the entry is whole again"


def test_one_store_may_take_the_place_of_a_cache(scans, tmp_path):
    store = VolumeStore.create("memory://data-sets", T3DImageProcessor(**SIZES))
    build(scans, store=store).prepare_all(0)
    assert len(store) == 3
    gone = tmp_path / "gone"
    rows = [replace(row, volume=gone / row.volume.name, key=store.key_of(row.volume)) for row in rows_of(scans)]
    elsewhere = PretrainingDataset(rows, T3DImageProcessor(**SIZES), store="memory://data-sets")
    expected, ours = build(scans)[1], elsewhere[1]
    assert np.array_equal(ours.prepared.array, expected.prepared.array), "without the source files"
    assert (ours.text, ours.view_seed) == (expected.text, expected.view_seed)
    with pytest.raises(StoreError, match="its volumes were prepared with spacing"):
        build(scans, store=store, spacing=(9, 9, 9))
    with pytest.raises(ValueError, match="cache_dir and store are two places"):
        build(scans, tmp_path, store=store)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_store_that_lacks_a_key_is_named_with_its_row(scans, tmp_path, num_workers):
    store = VolumeStore.create(tmp_path / "store", T3DImageProcessor(**SIZES))
    rows = [replace(row, key="0" * 40) for row in rows_of(scans)]
    dataset = PretrainingDataset(rows, T3DImageProcessor(**SIZES), store=store)
    dataset[0]  # prepared from its file
    rows[1] = replace(rows[1], volume=tmp_path / rows[1].key)
    elsewhere = PretrainingDataset(rows, T3DImageProcessor(**SIZES), store=store)
    message = f"store: no volume {'0' * 40}, which row 2 of the manifest names, .* give the store that was built"
    with pytest.raises(StoreError, match=message):
        elsewhere[1]
    with pytest.raises(StoreError, match=message):
        elsewhere.prepare_all(num_workers)


def test_a_rescaled_row_is_another_volume(scans, tmp_path):
    rows = [replace(row, rescale=(1.0, -100.0)) for row in rows_of(scans)]
    plain = build(scans, tmp_path).prepared(0)
    rescaled = PretrainingDataset(rows, T3DImageProcessor(**SIZES), tmp_path).prepared(0)
    assert len(entries(tmp_path)) == 2
    assert np.array_equal(np.asarray(rescaled.array), np.asarray(plain.array) - 100)


def test_kept_global_views_differ_by_rounding_alone(scans, tmp_path):
    plain, kept = build(scans, tmp_path), build(scans, tmp_path, keep_global_views=True)
    expected = collator_of(plain)([plain[0], plain[1]])
    for _ in range(2):
        batch = collator_of(kept)([kept[0], kept[1]])
        assert (batch["pixel_values"] - expected["pixel_values"]).abs().max() <= 0.5 / 1000 + 1e-6
        assert torch.equal(batch["local_pixel_values"], expected["local_pixel_values"])
    kept.image_processor.global_values = None
    assert torch.equal(collator_of(kept)([kept[0], kept[1]])["pixel_values"], batch["pixel_values"])
    with pytest.raises(ValueError, match="keep_global_views keeps them in a store"):
        build(scans, keep_global_views=True)


def test_what_is_looked_up_once_gives_the_same_batches(scans, tmp_path, monkeypatch):
    dataset = build(scans, tmp_path, keep_global_views=True, num_sentence_texts=2)
    dataset.prepare_all(0)
    collator, keys = collator_of(dataset), [(epoch, 0, index) for epoch in range(2) for index in (2, 0, 1)]
    first, again = (collator([dataset[key] for key in keys]) for _ in range(2))
    assert dataset._global_views.keys() == {0, 1, 2}
    monkeypatch.setattr(datasets, "_KEPT_IN_MEMORY", 0)
    fresh = []
    for key in keys:
        other = build(scans, tmp_path, keep_global_views=True, num_sentence_texts=2)
        fresh.append(other[key])
        assert not other._global_views
    expected = collator_of(dataset)(fresh)
    assert first.keys() == again.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(first[name], values), name
        assert torch.equal(again[name], values), name


def test_a_source_that_changes_is_looked_up_again(scans, tmp_path):
    folder = tmp_path / "scans"
    shutil.copytree(scans, folder)
    dataset = build(folder, tmp_path / "cache")
    before = np.asarray(dataset.prepared(0).array)
    write_scan(folder / "0.nii.gz", 9)
    assert not np.array_equal(np.asarray(dataset.prepared(0).array), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prepare_all_fills_the_cache(scans, tmp_path, num_workers):
    state = torch.get_rng_state()
    dataset = build(scans, tmp_path)
    dataset.prepare_all(num_workers, rank=0, num_processes=2)
    assert len(entries(tmp_path)) == 2
    dataset.prepare_all(num_workers, rank=1, num_processes=2)
    assert len(entries(tmp_path)) == 3
    assert torch.equal(torch.get_rng_state(), state), "preparation draws nothing from the global generator"
    with pytest.raises(ValueError, match="give the data set a cache_dir or a store"):
        build(scans).prepare_all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_volume_that_cannot_be_read_is_named(scans, tmp_path, num_workers):
    shutil.copytree(scans, tmp_path / "scans")
    broken = tmp_path / "scans" / "1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:500])
    dataset = build(tmp_path / "scans", tmp_path / "cache")
    with pytest.raises(VolumeError, match=r"1\.nii\.gz"):
        dataset.prepare_all(num_workers)
    with pytest.raises(VolumeError, match=r"1\.nii\.gz"):
        dataset[1]
    broken.unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.nii\.gz: the volume of row 2 has vanished"):
        dataset[1]


def test_rows_without_report_are_refused(scans):
    row = ManifestRow(4, scans / "0.nii.gz", "", "p", "s")
    with pytest.raises(ValueError, match="row 4 of the manifest has no report"):
        PretrainingDataset([row], T3DImageProcessor(**SIZES))


# ---------------------------------------------------------------------------------------------- samples and batches


@pytest.mark.parametrize("view_sampling", ["independent", "overlapping", "aligned"])
def test_views_depend_on_their_key_alone(scans, tmp_path, view_sampling):
    dataset = build(scans, tmp_path, view_sampling=view_sampling)
    collate = collator_of(dataset)

    def batch(epoch, number, *indices):
        return collate([dataset[(epoch, number, index)] for index in indices])

    state = torch.get_rng_state()
    first = batch(1, 0, 0, 1)
    np.random.rand(5)
    batch(2, 1, 2, 0)
    again = batch(1, 0, 0, 1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    assert not torch.equal(batch(2, 0, 0, 1)["local_positions"], first["local_positions"])
    swapped = batch(1, 0, 1, 0)
    assert torch.equal(swapped["local_pixel_values"].flip(0), first["local_pixel_values"])
    other_seed = collate([build(scans, tmp_path, view_sampling=view_sampling, seed=1)[(1, 0, 0)]])
    assert not torch.equal(other_seed["local_positions"][0], first["local_positions"][0])


def test_aligned_batches_share_their_places(scans, tmp_path):
    dataset = build(scans, tmp_path, view_sampling="aligned")
    collate = collator_of(dataset)

    def positions(*keys):
        return collate([dataset[key] for key in keys])["local_positions"][..., :3]

    shared = positions((0, 3, 0), (0, 3, 1))
    # Jitter of each view and the rounding to voxels remain.
    assert (shared[0] - shared[1]).abs().max() < 0.2
    assert torch.equal(positions((0, 3, 1))[0], shared[1]), "another process's share of the batch has the same places"
    assert (positions((0, 4, 1))[0] - shared[1]).abs().max() > 0.2


def test_a_batch_is_what_the_model_takes(scans):
    dataset = build(scans)
    batch = collator_of(dataset)([dataset[index] for index in range(3)])
    assert batch["pixel_values"].shape == (3, 1, 12, 12, 12)
    assert batch["local_pixel_values"].shape == (3, 2, 1, 6, 6, 6)
    assert batch["local_mask"].tolist() == [[True, True]] * 3
    assert batch["local_positions"].shape == (3, 2, 6)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["study_ids"].dtype == batch["report_ids"].dtype == torch.int64
    assert batch["study_ids"].tolist()[1] == batch["study_ids"].tolist()[2] != batch["study_ids"].tolist()[0]
    assert batch["report_ids"].tolist()[0] == batch["report_ids"].tolist()[2], "case and white space aside"
    assert min(batch["study_ids"].tolist() + batch["report_ids"].tolist()) >= 0
    without = collator_of(dataset, num_local_views=0)([dataset[0]])
    assert not any(name.startswith("local") for name in without)


def test_a_batch_holds_what_an_objective_reads_and_no_more(scans):
    dataset = build(scans)
    samples = [dataset[(epoch, 0, index)] for epoch in range(2) for index in range(3)]
    plain = collator_of(dataset)(samples)
    batch = collator_of(dataset, global_views=False, corruption_seeds=True)(samples)
    assert batch.keys() == (plain.keys() - {"pixel_values"}) | {"corruption_seeds"}
    seeds = batch["corruption_seeds"]
    assert len(set(seeds.tolist())) == 6, "others for every volume and epoch"
    assert torch.equal(collator_of(dataset, corruption_seeds=True)(samples[4:5])["corruption_seeds"], seeds[4:5])


def test_long_reports_are_cut_and_counted(scans):
    dataset = build(scans)
    collate = collator_of(dataset, max_report_tokens=9)
    assert collate([dataset[0]])["input_ids"].shape == (1, 9)
    assert collate.count_truncated([*REPORTS, "No effusion."]) == 3
    assert collator_of(dataset).count_truncated(REPORTS) == 0


def test_further_texts_are_sentences_of_the_report_and_change_with_the_epoch(scans, tmp_path):
    dataset = build(scans, tmp_path, num_sentence_texts=2)
    sentences = split_sentences(REPORTS[0])
    texts = [text for epoch in range(30) for text in dataset[(epoch, 0, 0)].sentences]
    assert texts == [text for epoch in range(30) for text in dataset[(epoch, 5, 0)].sentences]
    assert {sentence for text in texts for sentence in split_sentences(text)} == set(sentences)
    assert len(set(texts)) > 5
    assert dataset[0].text == REPORTS[0]
    batch = collator_of(dataset)([dataset[index] for index in range(3)])
    assert batch["sentence_ids"][0].tolist() == batch["sentence_ids"][2].tolist(), "identical reports stay identical"
    assert batch["sentence_input_ids"].shape[:2] == batch["sentence_ids"].shape == (3, 2)
    assert batch["sentence_ids"][0].tolist() == [stable_id(text) for text in dataset[0].sentences]
    decoded = collator_of(dataset).tokenizer.decode(batch["sentence_input_ids"][1, 1], skip_special_tokens=True)
    assert decoded.split()[0].lower() == dataset[1].sentences[1].split()[0].lower().strip(".,")
    assert dataset.fingerprint != build(scans).fingerprint
    with pytest.raises(ValueError, match="num_sentence_texts must be 0 or more, got -1"):
        build(scans, num_sentence_texts=-1)


def test_fingerprint_changes_with_the_data_and_its_views(scans, tmp_path):
    dataset, other = build(scans), build(scans)
    assert dataset.fingerprint == other.fingerprint
    dataset.image_processor.save_pretrained(tmp_path)  # which names its class and code
    assert dataset.fingerprint == other.fingerprint
    assert dataset.fingerprint != build(scans, view_sampling="overlapping").fingerprint
    other.rows = other.rows[:2]
    assert dataset.fingerprint != other.fingerprint
