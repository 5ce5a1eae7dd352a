# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Stored volumes come back bit for bit, by the tile, from any address; damage and interruption are found."""

import json
import multiprocessing
import os
import pickle
import re
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import SimpleITK
from counting_file_system import CountingFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from modeling_t3d.data import store as store_module
from modeling_t3d.data.source_hashes import content_hash
from modeling_t3d.data.store import StoreCorruptionError, StoredArray, StoreError, VolumeStore
from modeling_t3d.data.store_format import VolumeHeader
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.prepared_volume_t3d import PreparedVolume
from modeling_t3d.volume_transforms_t3d import whole_volume_mask

KEY = "0123456789abcdef0123456789abcdef01234567"
PROCESSOR = T3DImageProcessor(spacing=(3, 3, 3), global_size=(8, 16, 16), local_size=(8, 16, 16))
TILE = (4, 8, 8)


def noise(shape=(17, 30, 37), seed=0, dtype=np.int16) -> PreparedVolume:
    values = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(dtype)
    affine = np.array([[0.0, 0, 2, -9], [0, 2, 0, 5], [3, 0, 0, 1], [0, 0, 0, 1]])
    return PreparedVolume(
        values, affine, whole_volume_mask(shape), source="/data/Jane Doe/scan.nii.gz", warnings=("w",)
    )


def reference_crop(array: np.ndarray, start, size, outside) -> np.ndarray:
    """Voxel by voxel, the plain way."""
    result = np.full(size, outside, dtype=array.dtype)
    for voxel in np.ndindex(*size):
        index = tuple(first + step for first, step in zip(start, voxel, strict=True))
        if all(0 <= place < count for place, count in zip(index, array.shape, strict=True)):
            result[voxel] = array[index]
    return result


@pytest.fixture(params=["folder", "memory"])
def url(request, tmp_path):
    if request.param == "folder":
        yield str(tmp_path / "store")
        return
    yield f"memory://{tmp_path.name}"
    file_system = fsspec.filesystem("memory")
    for path in [path for path in file_system.store if path.startswith(f"/{tmp_path.name}")]:
        file_system.rm_file(path)


# ---------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_volume_comes_back_bit_for_bit(url, codec, dtype):
    prepared = noise(dtype=dtype)
    prepared.array[:4, :8, :8] = -1000
    store = VolumeStore.create(url, PROCESSOR, codec=codec, tile=TILE)
    store.add(KEY, prepared)
    for again in (VolumeStore(url).read(KEY), VolumeStore(url).open(KEY), pickle.loads(pickle.dumps(store)).open(KEY)):
        voxels = np.asarray(again.array)
        assert voxels.dtype == dtype
        assert np.array_equal(voxels, prepared.array)
        assert np.array_equal(again.affine, prepared.affine)
        assert np.array_equal(np.asarray(again.body), np.asarray(prepared.body))
        assert (again.body_box, again.warnings, again.source) == (prepared.body_box, ("w",), None)
    assert list(store.keys()) == [KEY]
    assert KEY in store
    assert "0" * 40 not in store


def test_views_of_a_stored_volume_are_those_of_the_volume(url):
    scan = np.full((30, 60, 60), -1000, dtype=np.int16)
    scan[:, 10:50, 12:48] = 40 + np.random.default_rng(0).integers(-30, 30, (30, 40, 36))
    prepared = PROCESSOR.prepare(scan, volume_spacing=(3, 3, 3), volume_axes="SAR")
    store = VolumeStore.create(url, PROCESSOR, tile=TILE)
    store.add(KEY, prepared)
    stored = store.open(KEY)
    assert isinstance(stored.array, StoredArray)
    assert np.array_equal(PROCESSOR.global_view(stored), PROCESSOR.global_view(prepared))
    for views in (5, "grid"):
        ours, theirs = PROCESSOR.make_views(stored, views, 0), PROCESSOR.make_views(prepared, views, 0)
        assert np.array_equal(ours.pixel_values, theirs.pixel_values)
        assert np.array_equal(ours.positions, theirs.positions)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_crop_is_the_slice(data):
    """Any shape, tile, codec and box, inside, across or beyond the volume."""
    shape = data.draw(st.tuples(*[st.integers(1, 11)] * 3))
    tile = data.draw(st.tuples(*[st.integers(1, 6)] * 3))
    codec = data.draw(st.sampled_from(["none", "zstd"]))
    prepared = noise(shape)
    store = VolumeStore.create(f"counting://crops/{shape}-{tile}-{codec}", PROCESSOR, codec=codec, tile=tile)
    store.add(KEY, prepared)
    start = data.draw(st.tuples(*[st.integers(-5, 14)] * 3))
    size = data.draw(st.tuples(*[st.integers(0, 12)] * 3))
    assert np.array_equal(store.crop(KEY, start, size), reference_crop(prepared.array, start, size, -1024))
    assert np.array_equal(store.open(KEY).array[2:7, :3, 1:], prepared.array[2:7, :3, 1:])
    assert np.array_equal(store.open(KEY).array[0], prepared.array[0])


# ---------------------------------------------------------------------------------------------- bytes


def test_a_crop_asks_object_storage_for_its_tiles_alone():
    prepared = noise((64, 256, 256))
    store = VolumeStore.create("counting://bytes", PROCESSOR)
    store.add(KEY, prepared)
    store = VolumeStore("counting://bytes")
    CountingFileSystem.reads.clear()
    store.describe(KEY)
    (head,) = CountingFileSystem.reads
    assert head[2] <= 1 << 16, "the header is one small request"
    CountingFileSystem.reads.clear()
    tile = 32 * 64 * 128 * 2
    store.crop(KEY, (0, 64, 128), (32, 64, 128))
    assert [length for _, _, length in CountingFileSystem.reads] == [tile]
    CountingFileSystem.reads.clear()
    crop = store.crop(KEY, (20, 60, 70), (40, 60, 60))
    assert sum(length for _, _, length in CountingFileSystem.reads) == 2 * 2 * 2 * tile
    assert len(CountingFileSystem.reads) == 2, "neighbours are one request"
    assert np.array_equal(crop, prepared.array[20:60, 60:120, 70:130])
    CountingFileSystem.reads.clear()
    store.read(KEY)
    assert len(CountingFileSystem.reads) == 1, "a whole volume is one request"


def test_a_crop_touches_its_tiles_alone_on_a_disk(tmp_path):
    prepared = noise()
    store = VolumeStore.create(tmp_path, PROCESSOR, tile=TILE)
    store.add(KEY, prepared)
    header = store.describe(KEY)
    wanted = {part.tile for part in header.parts((5, 9, 3), (12, 20, 20))}
    path = next(tmp_path.rglob("*.t3d"))
    content = bytearray(path.read_bytes())
    for tile in set(range(len(header.index))) - wanted:
        content[int(header.index["offset"][tile])] ^= 1
    path.write_bytes(content)
    store = VolumeStore(tmp_path)
    assert np.array_equal(store.crop(KEY, (5, 9, 3), (7, 11, 17)), prepared.array[5:12, 9:20, 3:20])
    with pytest.raises(StoreCorruptionError):
        store.crop(KEY, (5, 9, 3), (8, 11, 17))


def test_tiles_of_one_value_take_no_space(url):
    prepared = noise()
    prepared.array[:] = -1000
    prepared.array[5, 9, 9] = 7
    store = VolumeStore.create(url, PROCESSOR, tile=TILE)
    store.add(KEY, prepared)
    assert store.describe(KEY).num_bytes == 2 * np.prod(TILE)
    assert np.array_equal(store.read(KEY).array, prepared.array)


def test_the_small_codec_is_smaller(tmp_path):
    smooth = noise((32, 64, 64))
    smooth.array[:] = np.cumsum(np.random.default_rng(0).integers(-2, 3, smooth.array.shape), axis=2)
    sizes = {}
    for codec in ("none", "zstd"):
        store = VolumeStore.create(tmp_path / codec, PROCESSOR, codec=codec)
        store.add(KEY, smooth)
        sizes[codec] = store.describe(KEY).num_bytes
    assert sizes["zstd"] < 0.7 * sizes["none"]


# ---------------------------------------------------------------------------------------------- damage


def read_everything(url) -> np.ndarray:
    store = VolumeStore(url)
    store.verify(KEY)
    return store.read(KEY).array


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), codec=st.sampled_from(["none", "zstd"]))
def test_a_flipped_bit_is_found(place, bit, codec):
    """Wherever it is: either the voxels do not depend on it, or an error names the volume and the remedy."""
    prepared, url = noise((9, 17, 17)), f"counting://flip-{codec}"
    VolumeStore.create(url, PROCESSOR, codec=codec, tile=TILE).add(KEY, prepared)
    path = next(path for path in CountingFileSystem.store if f"flip-{codec}/volumes" in path)
    whole = CountingFileSystem.store[path].getvalue()
    content = bytearray(whole)
    content[int(place * len(content))] ^= 1 << bit
    try:
        CountingFileSystem().pipe_file(path, bytes(content))
        with pytest.raises(
            StoreCorruptionError, match=f"volume {KEY} .* remove the volume from the store and prepare"
        ):
            read_everything(url)
    except pytest.fail.Exception:
        assert np.array_equal(read_everything(url), prepared.array)
        index = VolumeStore(url).describe(KEY).index
        flipped = int(place * len(content))
        in_tile = (index["offset"] <= flipped) & (flipped < index["offset"] + index["length"])
        assert not in_tile.any(), "only the filling before and between tiles is free"
        assert whole[flipped] == 0
    finally:
        CountingFileSystem().pipe_file(path, whole)


@pytest.mark.parametrize("keep", [0, 3, 30, 300, 5000, -1])
def test_a_truncated_volume_is_found(url, keep):
    store = VolumeStore.create(url, PROCESSOR, tile=TILE)
    store.add(KEY, noise())
    file_system, root = fsspec.core.url_to_fs(str(url))
    (path,) = [path for path in file_system.find(root) if path.endswith(".t3d")]
    file_system.pipe_file(path, file_system.cat_file(path)[:keep])
    with pytest.raises(StoreCorruptionError, match=KEY):
        read_everything(url)


def flip_last_byte(url: str) -> None:
    file_system, root = fsspec.core.url_to_fs(str(url))
    (path,) = [path for path in file_system.find(root) if KEY in path]
    content = bytearray(file_system.cat_file(path))
    content[-1] ^= 1
    file_system.pipe_file(path, bytes(content))


def test_damage_since_the_last_check_is_found(url, monkeypatch):
    store = VolumeStore.create(url, PROCESSOR, tile=TILE)
    store.add(KEY, noise())
    store.verify(KEY)
    flip_last_byte(url)
    with pytest.raises(StoreCorruptionError, match=KEY):
        store.verify(KEY)
    # Nor is it taken for sound where it is opened again.
    monkeypatch.setattr(store_module, "_MAX_OPEN", 1)
    store.add("f" * 40, noise())
    store.describe("f" * 40)
    with pytest.raises(StoreCorruptionError, match=KEY):
        store.read(KEY)


def test_a_loaded_volume_on_a_disk_is_compared_once_a_process(tmp_path, monkeypatch):
    """However many others are opened between: what is open at a time is limited."""
    monkeypatch.setattr(store_module, "_MAX_OPEN", 1)
    store = VolumeStore.create(tmp_path, PROCESSOR, tile=TILE)
    keys = [f"{number:040x}" for number in range(3)]
    for number, key in enumerate(keys):
        store.add(key, noise(seed=number))
    compared = []
    is_whole = VolumeHeader.is_whole
    monkeypatch.setattr(VolumeHeader, "is_whole", lambda *call: compared.append(call[1]) or is_whole(*call))
    for turn in range(3):
        compared.clear()
        for number, key in enumerate(keys):
            assert np.array_equal(store.load(key, pytest.fail).array[:], noise(seed=number).array)
        assert len(compared) == (0 if turn else sum(len(store.describe(key).index) for key in keys))


def test_a_damaged_volume_is_removed_and_added_again(url):
    store = VolumeStore.create(url, PROCESSOR, tile=TILE)
    store.add(KEY, noise())
    store.read(KEY)
    store.remove(KEY)
    assert KEY not in store
    with pytest.raises(StoreError, match=f"no volume {KEY}; prepare its source"):
        store.read(KEY)
    store.add(KEY, noise(seed=1))
    assert np.array_equal(store.read(KEY).array, noise(seed=1).array)


# ---------------------------------------------------------------------------------------------- interruption


def write_volumes(folder: Path, count: int, stored: Any = None) -> None:
    """Says after each volume that it is stored."""
    store = VolumeStore.create(folder, PROCESSOR, tile=TILE)
    prepared = noise((32, 128, 128))
    for number in range(count):
        store.add(f"{number:040x}", prepared)
        if stored is not None:
            stored.send(number)


def start_writer(folder: Path, count: int, stored: Any = None) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=write_volumes, args=(folder, count, stored))
    process.start()
    return process


def test_a_killed_writer_is_finished_by_the_next(tmp_path):
    survivors = []
    for written in (0, 1, 3, 4):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = start_writer(tmp_path, 10_000, sender)
        sender.close()
        # It is somewhere behind the volume of which it spoke last.
        while receiver.recv() < written:
            pass
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        survivors.append(len(VolumeStore(tmp_path)))
        assert survivors[-1] > written
        for key in list(VolumeStore(tmp_path).keys()):
            VolumeStore(tmp_path).verify(key)
    assert survivors == sorted(survivors), "what was finished stays"
    # A file that a killed writer left, wherever the others were killed.
    orphan = tmp_path / "volumes" / "00" / f"{survivors[-1]:040x}.t3d.{'0' * 32}.partial"
    orphan.write_bytes(b"half")
    process = start_writer(tmp_path, survivors[-1] + 2)
    process.join()
    assert process.exitcode == 0
    expected = [f"{number:040x}" for number in range(survivors[-1] + 2)]
    store = VolumeStore(tmp_path)
    assert list(store.keys()) == expected
    assert not list(tmp_path.rglob("*.partial")), "nothing is left beside the volumes"
    for key in expected:
        store.verify(key)


def test_a_living_writer_keeps_its_partial_file(tmp_path):
    import fcntl

    store = VolumeStore.create(tmp_path, PROCESSOR, tile=TILE)
    partial = tmp_path / "volumes" / KEY[:2] / f"{KEY}.t3d.{'0' * 32}.partial"
    partial.parent.mkdir(parents=True)
    with partial.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        store.add(KEY, noise())
        assert partial.exists()
    assert np.array_equal(store.read(KEY).array, noise().array)


def test_several_processes_may_write_the_same_volumes(tmp_path):
    writers = [start_writer(tmp_path, 15) for _ in range(3)]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    store = VolumeStore(tmp_path)
    assert len(store) == 15
    assert len([path for path in (tmp_path / "volumes").rglob("*") if path.is_file()]) == 15
    for key in list(store.keys()):
        store.verify(key)


def read_in_child(store: VolumeStore) -> np.ndarray:
    return store.crop(KEY, (1, 2, 3), (5, 6, 7))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_goes_to_other_processes(tmp_path, method):
    store = VolumeStore.create(tmp_path, PROCESSOR, tile=TILE)
    store.add(KEY, noise())
    expected = read_in_child(store)
    # Unlike a pool of multiprocessing, it raises when a worker dies.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        assert np.array_equal(pool.submit(read_in_child, store).result(), expected)


class RangeHandler(SimpleHTTPRequestHandler):
    """Files with byte ranges, as object storage serves them."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or last), last)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        # Counted first: who has read the answer goes on before this thread does.
        self.server.served.append((path.name, last + 1 - first))
        self.wfile.write(content[first : last + 1])
        return None

    def log_message(self, *args):
        pass


def test_a_store_is_read_over_a_network(tmp_path):
    prepared = noise((64, 256, 256))
    VolumeStore.create(tmp_path / "store", PROCESSOR).add(KEY, prepared)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=str(tmp_path)))
    server.served = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        store = VolumeStore(f"http://127.0.0.1:{server.server_port}/store")
        assert KEY in store
        assert "0" * 40 not in store
        store.describe(KEY)
        server.served.clear()
        assert np.array_equal(store.crop(KEY, (20, 60, 70), (40, 60, 60)), prepared.array[20:60, 60:120, 70:130])
        assert sum(count for _, count in server.served) == 2 * 2 * 2 * 32 * 64 * 128 * 2, "two tiles along each axis"
        # A loader's worker: the connection of its parent is of no use to it.
        loader = DataLoader([0], batch_size=None, num_workers=1, collate_fn=lambda _: read_in_child(store))
        (crop,) = loader
        assert np.array_equal(crop, prepared.array[1:6, 2:8, 3:10])
    finally:
        server.shutdown()


# ---------------------------------------------------------------------------------------------- keys and privacy


def write_source(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_key_is_the_content_and_the_preparation(url, tmp_path):
    store = VolumeStore.create(url, PROCESSOR)
    one, two = write_source(tmp_path / "a" / "one", "1"), write_source(tmp_path / "b" / "two", "2")
    key = store.key_of(one)
    assert re.fullmatch("[0-9a-f]{40}", key)
    assert key == VolumeStore(url).key_of(one)
    assert key != store.key_of(two)
    two.write_text("1")
    assert key == store.key_of(two), "the same content under another name"
    other = VolumeStore.create(f"{url}-other", T3DImageProcessor(spacing=(2, 2, 2)))
    assert key != other.key_of(one)


def test_the_content_is_not_read_again_while_the_file_stays(url, tmp_path):
    store = VolumeStore.create(url, PROCESSOR)
    source = write_source(tmp_path / "one", "1")
    key, status = store.key_of(source), source.stat()
    source.write_text("2")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.key_of(source) == key
    os.utime(source, ns=(0, 0))
    assert store.key_of(source) != key


def test_a_damaged_memory_of_the_content_is_no_other_volume(url, tmp_path):
    store = VolumeStore.create(url, PROCESSOR)
    source = write_source(tmp_path / "one", "1")
    key = store.key_of(source)
    file_system, root = fsspec.core.url_to_fs(str(url))
    (path,) = file_system.find(f"{root}/sources")
    whole = file_system.cat_file(path)
    known = json.loads(whole)
    digit = "0" if known["content"][7] != "0" else "1"
    wrong = {**known, "content": known["content"][:7] + digit + known["content"][8:]}
    without_checksum = {name: value for name, value in wrong.items() if name in ("stamp", "content")}
    for damage in (wrong, without_checksum, {**known, "content": None}, [known], "known"):
        file_system.pipe_file(path, json.dumps(damage).encode())
        assert store.key_of(source) == key
        assert file_system.cat_file(path) == whole, "what was damaged is mended"


def test_content_of_a_folder(tmp_path):
    for name, content in (("a", "1"), ("b", "2")):
        write_source(tmp_path / name / "slice", content)
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")
    (tmp_path / "b" / "slice").write_text("1")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    (tmp_path / "b" / "slice").rename(tmp_path / "b" / "other")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")


@pytest.mark.parametrize("suffix", ["mhd", "nhdr"])
def test_volumes_whose_headers_alone_are_equal_have_their_own_keys(tmp_path, suffix):
    store, keys = VolumeStore.create(str(tmp_path / "store"), PROCESSOR), []
    for patient, value in (("a", 40), ("b", 300)):
        (tmp_path / patient).mkdir()
        image = SimpleITK.GetImageFromArray(np.full((4, 5, 6), value, np.int16))
        SimpleITK.WriteImage(image, str(tmp_path / patient / f"scan.{suffix}"))
        keys.append(store.key_of(tmp_path / patient / f"scan.{suffix}"))
    assert (tmp_path / "a" / f"scan.{suffix}").read_bytes() == (tmp_path / "b" / f"scan.{suffix}").read_bytes()
    assert keys[0] != keys[1]
    # New voxels behind an unchanged header are seen, which the header's own time does not tell.
    voxels = tmp_path / "a" / "scan.raw"
    voxels.write_bytes((tmp_path / "b" / "scan.raw").read_bytes())
    os.utime(voxels, (0, 0))
    assert store.key_of(tmp_path / "a" / f"scan.{suffix}") == keys[1]


def test_nothing_in_a_store_names_the_source(tmp_path):
    source = write_source(tmp_path / "Jane Doe 1970" / "accession-42.nii.gz", "content")
    store = VolumeStore.create(tmp_path / "store", PROCESSOR)
    store.load(store.key_of(source), noise)
    for path in (tmp_path / "store").rglob("*"):
        text = str(path.relative_to(tmp_path)).encode() + (path.read_bytes() if path.is_file() else b"")
        for secret in (b"Jane", b"Doe", b"1970", b"accession", b"nii"):
            assert secret not in text, path


# ---------------------------------------------------------------------------------------------- on demand, and errors


def test_volumes_are_prepared_once(url, tmp_path):
    calls = []

    def prepare() -> PreparedVolume:
        calls.append(1)
        return noise()

    store = VolumeStore.create(url, PROCESSOR)
    key = store.key_of(write_source(tmp_path / "one", "1"))
    for _ in range(2):
        assert np.array_equal(np.asarray(store.load(key, prepare).array), noise().array)
    VolumeStore(url).load(VolumeStore(url).key_of(write_source(tmp_path / "two", "1")), prepare)
    assert calls == [1]


def test_views_are_kept_beside_the_volumes(url):
    calls = []

    def make() -> PreparedVolume:
        calls.append(1)
        return noise((4, 5, 6))

    store = VolumeStore.create(url, PROCESSOR)
    for _ in range(2):
        assert np.array_equal(store.keep(KEY, {"size": (4, 5, 6)}, make).array, noise((4, 5, 6)).array)
    assert calls == [1]
    assert list(store.keys()) == [], "a view is no volume"
    store.keep(KEY, {"size": (8, 5, 6)}, make)
    assert calls == [1, 1]
    file_system, root = fsspec.core.url_to_fs(str(url))
    for path in file_system.find(f"{root}/views"):
        file_system.pipe_file(path, file_system.cat_file(path)[:-1])
    assert np.array_equal(store.keep(KEY, {"size": (4, 5, 6)}, make).array, noise((4, 5, 6)).array)
    assert calls == [1, 1, 1], "a damaged one is made again"


def test_a_store_of_another_preparation_is_refused(url):
    VolumeStore.create(url, PROCESSOR)
    with pytest.raises(StoreError, match=r"prepared with spacing=\[3.*the image processor has \[2"):
        VolumeStore.create(url, T3DImageProcessor(spacing=(2, 2, 2)))
    VolumeStore(url).require(T3DImageProcessor(spacing=(3, 3, 3), local_size=(4, 4, 4)))
    assert VolumeStore.create(url, PROCESSOR, codec="none").tile == VolumeStore.create(url, PROCESSOR).tile
    with pytest.raises(StoreError, match="the store has codec 'none'"):
        VolumeStore.create(url, PROCESSOR, codec="zstd")
    with pytest.raises(StoreError, match="there is a store already"):
        VolumeStore.create(url, PROCESSOR, exist_ok=False)


def test_errors_name_the_remedy(url):
    with pytest.raises(StoreError, match=r"no volume store; make one with VolumeStore\.create"):
        VolumeStore(url)
    for damaged in ("", "{", "null", "[]", '{"format": 1}'):
        file_system, root = fsspec.core.url_to_fs(str(url))
        file_system.makedirs(f"{root}/damaged", exist_ok=True)
        file_system.pipe_file(f"{root}/damaged/store.json", damaged.encode())
        with pytest.raises(StoreError, match=r"its store\.json is damaged; write it anew"):
            VolumeStore(f"{url}/damaged")
    with pytest.raises(StoreError, match="codec must be one of 'none', 'zstd', got 'gzip'"):
        VolumeStore.create(url, PROCESSOR, codec="gzip")
    store = VolumeStore.create(url, PROCESSOR)
    with pytest.raises(StoreError, match=r"40 hexadecimal digits, got '\.\./\.\./escape'"):
        store.add("../../escape", noise())
    assert list(store.keys()) == []
