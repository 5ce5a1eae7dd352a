# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A store in object storage that speaks S3: written, cropped, killed, finished and damaged over real requests."""

import multiprocessing
import pickle
import signal

import fsspec
import numpy as np
import pytest
from object_storage import CREDENTIALS, WAIT
from test_data_store import KEY, PROCESSOR, TILE, noise
from torch.utils.data import DataLoader

from modeling_t3d.data.datasets import PretrainingDataset
from modeling_t3d.data.manifest import ManifestRow
from modeling_t3d.data.store import StoreCorruptionError, StoreError, VolumeStore
from modeling_t3d.data.streaming import StreamingDataset, StreamingLoader


def test_volumes_come_back_bit_for_bit(bucket):
    store = VolumeStore.create(f"{bucket}/store", PROCESSOR, tile=TILE)
    assert len(store) == 0
    volumes = {f"{number:040x}": noise(seed=number) for number in range(3)}
    for key, prepared in volumes.items():
        store.add(key, prepared)
        store.add(key, noise(seed=99))  # there already: kept
    again = VolumeStore(f"{bucket}/store")
    assert list(again.keys()) == sorted(volumes)
    assert "f" * 40 not in again
    for key, prepared in volumes.items():
        assert key in again
        assert np.array_equal(again.read(key).array, prepared.array)
        stored = pickle.loads(pickle.dumps(again)).open(key)
        assert np.array_equal(stored.array[2:7, :3, 1:], prepared.array[2:7, :3, 1:])
        assert np.array_equal(stored.affine, prepared.affine)
    again.remove(KEY)  # not there: nothing happens
    again.remove("0" * 40)
    assert list(again.keys()) == sorted(volumes)[1:]


@pytest.mark.parametrize("where", ["with the address", "in fsspec's configuration"])
def test_the_endpoint_may_be_given(bucket, storage, monkeypatch, where):
    for name in (*CREDENTIALS, "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    options = {
        "key": "test",
        "secret": "test",
        "client_kwargs": {"endpoint_url": storage.url, "region_name": "us-east-1"},
    }
    if where == "in fsspec's configuration":
        monkeypatch.setitem(fsspec.config.conf, "s3", options)
        options = {}
    store = VolumeStore.create(f"{bucket}/store", PROCESSOR, tile=TILE, storage_options=options)
    store.add(KEY, noise())
    assert np.array_equal(pickle.loads(pickle.dumps(store)).read(KEY).array, noise().array)


def test_a_crop_reads_its_tiles_alone(bucket, storage):
    prepared = noise((64, 256, 256))
    VolumeStore.create(f"{bucket}/store", PROCESSOR).add(KEY, prepared)
    store = VolumeStore(f"{bucket}/store")
    store.describe(KEY)
    header = [count for path, count in storage.ask("served") if path.endswith(".t3d")]
    assert sum(header) <= 1 << 16
    crop = store.crop(KEY, (20, 60, 70), (40, 60, 60))
    assert np.array_equal(crop, prepared.array[20:60, 60:120, 70:130])
    served = storage.ask("served")
    assert {path.rpartition("/")[2] for path, _ in served} == {f"{KEY}.t3d"}
    tile = 32 * 64 * 128 * 2
    assert sum(count for _, count in served) == 2 * 2 * 2 * tile, "two tiles along each axis, and nothing else"
    store.crop(KEY, (0, 0, 0), (8, 8, 8))
    assert sum(count for _, count in storage.ask("served")) == tile


def write_volumes(url: str, count: int) -> None:
    store = VolumeStore.create(url, PROCESSOR, tile=TILE)
    for number in range(count):
        store.add(f"{number:040x}", noise(seed=number))


def start_writer(url: str, count: int) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=write_volumes, args=(url, count))
    process.start()
    return process


def test_a_writer_killed_in_an_upload_is_finished_by_the_next(bucket, storage):
    url = f"{bucket}/store"
    storage.ask("hold?after=2")
    writer = start_writer(url, 5)
    try:
        assert storage.ask("held"), "the third volume is on its way"
    finally:
        writer.kill()
        writer.join(WAIT)
    assert writer.exitcode == -signal.SIGKILL
    store = VolumeStore(url)
    assert list(store.keys()) == [f"{number:040x}" for number in range(2)]
    storage.ask("release")
    writer = start_writer(url, 5)
    writer.join(WAIT)
    assert writer.exitcode == 0
    assert list(store.keys()) == [f"{number:040x}" for number in range(5)]
    objects = store._file_system.find(url)
    assert len(objects) == len(set(objects)) == 1 + 5, "the settings and the volumes"
    for number, key in enumerate(list(store.keys())):
        store.verify(key)
        assert np.array_equal(store.read(key).array, noise(seed=number).array)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_damage_is_found_and_repaired(bucket, codec):
    url = f"{bucket}/store"
    store = VolumeStore.create(url, PROCESSOR, codec=codec, tile=TILE)
    store.add(KEY, noise())
    file_system, path = store._file_system, store._volume_path(KEY)
    whole = file_system.cat_file(path)
    for place in (10, 700, len(whole) // 2, len(whole) - 9):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        file_system.pipe_file(path, bytes(damaged))
        with pytest.raises(StoreCorruptionError, match=KEY):
            VolumeStore(url).read(KEY)
    for length in (0, 100, len(whole) // 2):
        file_system.pipe_file(path, whole[:length])
        with pytest.raises(StoreCorruptionError, match=KEY):
            VolumeStore(url).read(KEY)
    assert np.array_equal(VolumeStore(url).load(KEY, noise).array[:], noise().array)
    assert file_system.cat_file(path) == whole
    with pytest.raises(StoreError, match="no volume store"):
        VolumeStore(f"{bucket}/elsewhere")


def crop_in_child(store: VolumeStore) -> np.ndarray:
    return store.crop(KEY, (1, 2, 3), (5, 6, 7))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_by_themselves(bucket, method):
    """Of a parent that has used its connection before."""
    store = VolumeStore.create(f"{bucket}/store", PROCESSOR, tile=TILE)
    store.add(KEY, noise())
    expected = crop_in_child(store)
    context = multiprocessing.get_context(method)
    loader = DataLoader(Crops(store), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=WAIT)
    crops = list(loader)
    assert len(crops) == 4
    assert all(np.array_equal(crop, expected) for crop in crops)


class Crops:
    def __init__(self, store: VolumeStore):
        self.store = store

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> np.ndarray:
        return crop_in_child(self.store)


def test_a_stream_resumes_in_the_middle_of_an_epoch(bucket):
    store = VolumeStore.create(f"{bucket}/store", PROCESSOR, tile=TILE)
    rows = []
    for number in range(6):
        key = f"{number:040x}"
        store.add(key, noise(seed=number))
        rows.append(ManifestRow(number + 1, f"{number}.nii.gz", f"Report {number}.", "p", "s", key=key))
    dataset = PretrainingDataset(rows, PROCESSOR, store=f"{bucket}/store")

    def stream() -> StreamingDataset:
        return StreamingDataset(dataset, 1, first_voxels, seed=3)

    whole = list(StreamingLoader(stream()))
    assert sorted(int(voxels[0, 0, 0]) for voxels in whole) == sorted(
        int(noise(seed=number).array[0, 0, 0]) for number in range(6)
    )
    loader = StreamingLoader(stream(), 2, timeout=WAIT)
    batches = iter(loader)
    before = [next(batches), next(batches)]
    state = loader.state_dict()
    batches.close()
    loader = StreamingLoader(stream(), 1, timeout=WAIT)
    loader.load_state_dict(state)
    for ours, theirs in zip([*before, *loader], whole, strict=True):
        assert np.array_equal(ours, theirs)


def first_voxels(samples) -> np.ndarray:
    return np.asarray(samples[0].prepared.array[:4, :4, :4])
