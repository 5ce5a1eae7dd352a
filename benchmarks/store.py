# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Measures random crops from the store against other layouts, their bytes on disk, and how the loader scales.

    python benchmarks/store.py --output benchmarks/store.md

All layouts hold the same volume and give the same crops, which is checked before anything is timed; they then take
turns in one process, on one thread, with files in the page cache. Needs blosc2, zarr and numcodecs.
"""

import argparse
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from measuring import add_output_argument, publish
from torch.utils.data import DataLoader, Dataset

from modeling_t3d.data.shared_batches import SharedBatchCollator
from modeling_t3d.data.store import VolumeStore
from modeling_t3d.evaluation.protocol import processor_name
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.prepared_volume_t3d import PreparedVolume
from modeling_t3d.volume_transforms_t3d import whole_volume_mask

KEYS = tuple(f"{number:040x}" for number in range(4))
Crop = Callable[[tuple[int, ...]], np.ndarray]


def synthetic_scan(shape: Sequence[int], seed: int) -> PreparedVolume:
    """A noisy ellipse of soft tissue with smooth structure in a circle of air: compresses about as much as CT."""
    generator = np.random.default_rng(seed)
    coarse = torch.from_numpy(generator.normal(0, 120, [max(2, size // 16) for size in shape]).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse[None, None], size=tuple(shape), mode="trilinear")[0, 0].numpy()
    y, x = (np.linspace(-1, 1, size)[:, None] for size in shape[1:])
    radius = (y / 0.75) ** 2 + (x.T / 0.95) ** 2
    scan = np.empty(shape, dtype=np.int16)
    for z in range(shape[0]):
        noise = generator.normal(0, 20, shape[1:])
        scan[z] = np.where(radius < 1, 30 + smooth[z] + noise, -1000 + noise / 2)
        scan[z][y**2 + x.T**2 > 1] = -1024
    affine = np.array([[0, 0, 0.75, 0], [0, 0.75, 0, 0], [1.5, 0, 0, 0], [0, 0, 0, 1.0]])
    return PreparedVolume(scan, affine, whole_volume_mask(scan.shape))


# ---------------------------------------------------------------------------------------------- layouts


def nnunet_layout(shape: Sequence[int], patch: Sequence[int], item_size: int) -> tuple[list[int], list[int]]:
    """Chunks and blocks that nnU-Net v2 (2.5 and later) computes for blosc2: blocks for L1, chunks for L3, 80 % full.

    Args:
        shape, patch (three ints): of the volume and of what training draws.
        item_size (`int`): bytes per voxel.
    """
    block = [2 ** math.ceil(math.log2(size)) for size in patch]
    while math.prod(block) * item_size > 0.8 * 32768:
        axis = max((a for a in range(3) if block[a] > 1), key=lambda a: (block[a] / patch[a], a))
        block[axis] = min(2 ** math.floor(math.log2(block[axis] - 1)), shape[axis])
    chunk = list(block)
    while math.prod(chunk) * item_size < 0.8 * 1441792:
        axis = min((a for a in range(3) if chunk[a] < shape[a] and patch[a] > 1), key=lambda a: chunk[a] / block[a])
        grown = min(chunk[axis] + block[axis], shape[axis])
        if (
            statistics.mean(c / p for c, p in zip([*chunk[:axis], grown, *chunk[axis + 1 :]], patch, strict=True))
            > 1.5
        ):
            break
        chunk[axis] = grown
    return [min(size, limit) for size, limit in zip(chunk, shape, strict=True)], block


def blosc2_crop(folder: Path, array: np.ndarray, patch: Sequence[int]) -> Crop:
    """nnU-Net's way: a channel axis, zstd level 8, one thread, a memory map, one open file per item."""
    import blosc2

    blosc2.set_nthreads(1)
    chunks, blocks = nnunet_layout(array.shape, patch, array.dtype.itemsize)
    path = folder / "volume.b2nd"
    folder.mkdir()
    blosc2.asarray(
        np.ascontiguousarray(array[None]),
        urlpath=str(path),
        chunks=(1, *chunks),
        blocks=(1, *blocks),
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": 8},
    )

    def crop(start: tuple[int, ...]) -> np.ndarray:
        stored = blosc2.open(str(path), mode="r", dparams={"nthreads": 1}, mmap_mode="r")
        return stored[(slice(0, 1), *_slices(start, patch))][0]

    return crop


def zarr_crop(folder: Path, array: np.ndarray, patch: Sequence[int], shards: tuple[int, ...] | None) -> Crop:
    """Zarr 3 with its default codec (zstd) and chunks of 64^3, in one file each or together in shards."""
    import zarr

    zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1})
    stored = zarr.create_array(
        str(folder), shape=array.shape, chunks=(64, 64, 64), shards=shards, dtype=array.dtype, fill_value=0
    )
    stored[:] = array
    stored = zarr.open_array(str(folder), mode="r")
    return lambda start: stored[_slices(start, patch)]


def store_crop(folder: Path, prepared: PreparedVolume, patch: Sequence[int], codec: str, fresh: bool) -> Crop:
    """This package's store: opened once as in training, or anew for each crop, so that all its tiles are checked."""
    processor = T3DImageProcessor()
    store = VolumeStore.create(folder, processor, codec=codec)
    store.add(KEYS[0], prepared)

    def crop(start: tuple[int, ...]) -> np.ndarray:
        return (VolumeStore(folder) if fresh else store).crop(KEYS[0], start, patch)

    return crop


def map_crop(folder: Path, array: np.ndarray, patch: Sequence[int]) -> Crop:
    """A plain .npy file, memory-mapped."""
    folder.mkdir()
    np.save(folder / "volume.npy", array)
    mapped = np.load(folder / "volume.npy", mmap_mode="r")
    return lambda start: np.array(mapped[_slices(start, patch)])


def _slices(start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))


def folder_bytes(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------- crops


def measure_crops(shape: Sequence[int], patch: Sequence[int], count: int, seed: int) -> list[str]:
    """Rows of the table of crops."""
    prepared = synthetic_scan(shape, seed)
    array = prepared.array
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sharded = tuple(-(-size // 64) * 64 for size in shape)
        layouts: dict[str, tuple[Crop, Path | None]] = {
            "slice of RAM": (lambda start: np.array(array[_slices(start, patch)]), None),
            "store": (store_crop(root / "raw", prepared, patch, "none", False), root / "raw" / "volumes"),
            "store, opened and checked for each crop": (
                store_crop(root / "raw", prepared, patch, "none", True),
                root / "raw" / "volumes",
            ),
            'store, codec="zstd"': (
                store_crop(root / "zstd", prepared, patch, "zstd", False),
                root / "zstd" / "volumes",
            ),
            "blosc2 in nnU-Net's layout": (blosc2_crop(root / "blosc2", array, patch), root / "blosc2"),
            "Zarr 3, chunks of 64^3": (zarr_crop(root / "zarr", array, patch, None), root / "zarr"),
            "Zarr 3, chunks of 64^3 in one shard": (
                zarr_crop(root / "shards", array, patch, sharded),
                root / "shards",
            ),
            "memory-mapped .npy": (map_crop(root / "npy", array, patch), root / "npy"),
        }
        generator = np.random.default_rng(seed)
        seconds: dict[str, list[float]] = {layout: [] for layout in layouts}
        processor_seconds: dict[str, list[float]] = {layout: [] for layout in layouts}
        for turn in range(count + 3):
            start = tuple(int(generator.integers(0, size - edge + 1)) for size, edge in zip(shape, patch, strict=True))
            expected = array[_slices(start, patch)]
            for layout, (crop, _) in layouts.items():
                begun, busy = time.perf_counter(), time.process_time()
                result = crop(start)
                elapsed, busy = time.perf_counter() - begun, time.process_time() - busy
                if turn < 3:  # outputs first
                    assert result.dtype == np.int16, layout
                    assert np.array_equal(result, expected), layout
                else:
                    seconds[layout].append(elapsed)
                    processor_seconds[layout].append(busy)
        medians = {layout: statistics.median(values) for layout, values in seconds.items()}
        busy_medians = {layout: statistics.median(values) for layout, values in processor_seconds.items()}
        sizes = {layout: folder_bytes(folder) if folder else array.nbytes for layout, (_, folder) in layouts.items()}
    own = medians["store"]
    rows = [
        "| layout | ms per crop, median | CPU ms per crop, median | time over the store's | MB | of the raw size |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows += [
        f"| {layout} | {1e3 * medians[layout]:.2f} | {1e3 * busy_medians[layout]:.2f} | {medians[layout] / own:.2f} "
        f"| {sizes[layout] / 1e6:.0f} | {sizes[layout] / array.nbytes:.2f} |"
        for layout in layouts
    ]
    ratios = (
        ("blosc2 in nnU-Net's layout", 6.0),
        ("Zarr 3, chunks of 64^3", 15.0),
        ("slice of RAM", 0.7),
    )
    rows += ["", "| against | speed of the store, times | by CPU time | target |", "| --- | --- | --- | --- |"]
    rows += [
        f"| {layout} | {medians[layout] / own:.2f} | {busy_medians[layout] / busy_medians['store']:.2f} "
        f"| >= {target:g} |"
        for layout, target in ratios
    ]
    return rows


# ---------------------------------------------------------------------------------------------- loader


class Views(Dataset):
    """What a pre-training item costs: a kept global view and four local views, from one of several volumes."""

    def __init__(self, folder: Path, processor: T3DImageProcessor, length: int) -> None:
        self.store = VolumeStore(folder)
        self.processor = processor
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        prepared = self.store.open(KEYS[index % len(KEYS)])
        kept = self.store.keep(KEYS[index % len(KEYS)], self.processor.global_key(), lambda: self._global(prepared))
        values = torch.from_numpy(np.asarray(kept.array, dtype=np.float32))
        views = self.processor.make_views(prepared, 4, index)
        return {
            "pixel_values": self.processor.global_view(prepared, values),
            "local_pixel_values": views.pixel_values,
        }

    def _global(self, prepared: PreparedVolume) -> PreparedVolume:
        values = np.rint(self.processor.global_values(prepared).numpy()).astype(np.int16)
        return PreparedVolume(values, np.eye(4), whole_volume_mask(values.shape))


def only_item(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of one."""
    (item,) = items
    return item


def rate_of_processes(dataset: Dataset, count: int, items: int) -> float:
    """Items per second of processes that hand nothing over: what this machine's cores and memory allow a loader."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count + 1)

    def work(first: int) -> None:
        for index in range(4):
            dataset[first + index]
        barrier.wait()
        for index in range(items):
            dataset[first + index]
        barrier.wait()

    processes = [context.Process(target=work, args=(number * items,)) for number in range(count)]
    for process in processes:
        process.start()
    barrier.wait()
    begun = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - begun
    for process in processes:
        process.join()
    return count * items / seconds


def measure_loader(shape: Sequence[int], workers: Sequence[int], items: int, repetitions: int, seed: int) -> list[str]:
    """Rows of the table of loader processes; numbers of workers and ways out of a worker take turns."""
    processor = T3DImageProcessor(global_size=(64, 128, 128), local_size=(64, 128, 128))
    ways = {"blocks used again": SharedBatchCollator(only_item), "new memory for every batch": only_item}
    alone = "nothing: dropped where they are made"
    rates: dict[tuple[str, int], list[float]] = {(way, count): [] for way in (*ways, alone) for count in workers}
    with tempfile.TemporaryDirectory() as name:
        store = VolumeStore.create(name, processor)
        for number, key in enumerate(KEYS):
            store.add(key, synthetic_scan(shape, seed + number))
        for index in range(len(KEYS)):
            Views(Path(name), processor, len(KEYS))[index]
        for _ in range(repetitions):
            for way, count in rates:
                views = Views(Path(name), processor, (items + 4) * count)
                if way == alone:
                    rates[way, count].append(rate_of_processes(views, count, items))
                    continue
                loader = DataLoader(
                    views,
                    batch_size=1,
                    collate_fn=ways[way],
                    num_workers=count,
                )
                batches = iter(loader)
                for _ in range(4 * count):  # processes are up, files are in the page cache
                    next(batches)
                begun = time.perf_counter()
                for _ in batches:
                    pass
                rates[way, count].append(items * count / (time.perf_counter() - begun))
    medians = {case: statistics.median(values) for case, values in rates.items()}
    first = min(workers)
    rows = [
        "| batches leave a process in | processes | items per second, median | of linear |",
        "| --- | --- | --- | --- |",
    ]
    rows += [
        f"| {way} | {count} | {rate:.1f} | {rate / medians[way, first] * first / count:.2f} |"
        for (way, count), rate in medians.items()
    ]
    return rows


def main() -> None:
    """Measure and publish."""
    import blosc2
    import numcodecs
    import zarr

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[300, 512, 512], help="voxels (z, y, x)")
    parser.add_argument("--patch", type=int, nargs=3, default=[128, 128, 128], help="voxels (z, y, x)")
    parser.add_argument("--crops", type=int, default=100, help="timed crops per layout")
    parser.add_argument("--items", type=int, default=60, help="timed items per loader process; 0 skips the loader")
    parser.add_argument("--repetitions", type=int, default=5, help="of each number of loader processes")
    parser.add_argument("--seed", type=int, default=0)
    add_output_argument(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape, patch = tuple(arguments.shape), tuple(arguments.patch)
    versions = {"numpy": np, "torch": torch, "blosc2": blosc2, "zarr": zarr, "numcodecs": numcodecs}
    text = [
        "# The store of prepared volumes",
        "",
        f"`python benchmarks/store.py --crops {arguments.crops} --items {arguments.items} --repetitions "
        f"{arguments.repetitions} --seed {arguments.seed}` on {processor_name()}, {os.cpu_count()} cores; Python "
        f"{platform.python_version()}, "
        + ", ".join(f"{name} {module.__version__}" for name, module in versions.items())
        + ".",
        "",
        f"## Random {' x '.join(map(str, patch))} crops of a volume of {' x '.join(map(str, shape))} int16",
        "",
        "Equal outputs were checked first; layouts take turns, one thread, files in the page cache.",
        "",
        *measure_crops(shape, patch, arguments.crops, arguments.seed),
    ]
    if arguments.items:
        counts = sorted({1, *(2**power for power in range(1, 8) if 2**power <= (os.cpu_count() or 1))})
        text += [
            "",
            "## Loader",
            "",
            "An item is a kept global view of 64 x 128 x 128 and four local views of 64 x 128 x 128. The process that "
            "receives them needs a core too: with as many workers as cores they share it.",
            "",
            *measure_loader((160, 320, 320), counts, arguments.items, arguments.repetitions, arguments.seed),
        ]
    publish(text, arguments.output)


if __name__ == "__main__":
    main()
