# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Measures reading, resampling and the whole path from a file to `pixel_values` against other libraries.

    python benchmarks/volumes.py --output benchmarks/volumes.md

The input is made here: 512 x 512 x 300 voxels of int16 as `.nii.gz` and as a DICOM series. Libraries take turns in
one process, files are in the page cache, and each time is the median over the rounds. What a library gives is compared
with ours before anything is timed; a row whose values differ says so and counts for nothing. Beside the package this
needs SimpleITK, monai and, for the DICOM row, itk.
"""

import argparse
import gc
import gzip
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from measuring import add_output_argument, publish
from monai.utils import optional_import

from modeling_t3d.data.phantoms import generate_phantom
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.resample_affine_t3d import affine_sampling, resample_affine
from modeling_t3d.resample_t3d import resample, spacing_sampling
from modeling_t3d.volume_io_t3d import read_volume

SPACING = (1.0, 0.703125, 0.703125)  # mm, z y x: 480 and 200 whole voxels of the model's grid
MODEL_SPACING = (1.5, 0.75, 0.75)
WINDOW = (-1000.0, 1000.0)
TURN = np.radians(10)  # about the axis of the body
MAKERS = {"modeling_t3d", "modeling_t3d, averaged", "inflating alone"}


# ---------------------------------------------------------------------------------------------- input


def make_scan(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """A phantom enlarged to `shape` (z, y, x) with noise and a round field of view; int16 HU."""
    small = torch.from_numpy(generate_phantom(seed).volume.to_canonical().array.astype(np.float32))
    smooth = torch.nn.functional.interpolate(small[None, None], size=shape, mode="trilinear")[0, 0].numpy()
    generator = np.random.default_rng(seed)
    y, x = (np.linspace(-1, 1, size) for size in shape[1:])
    beyond = y[:, None] ** 2 + x**2 > 1
    scan = np.empty(shape, dtype=np.int16)
    for z, plane in enumerate(smooth):
        noisy = plane + generator.normal(0, 4, plane.shape)
        noisy[plane < -900] -= 24  # scanners clip the noise of air
        scan[z] = np.where(beyond, -1024, np.clip(np.rint(noisy), -1024, 3071))
    return scan


def file_affine(shape: tuple[int, int, int]) -> np.ndarray:
    """Of the array (x, y, z) as scanners store it: towards left, posterior, superior."""
    affine = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])
    affine[:3, 3] = [-affine[0, 0] * shape[2] / 2, -affine[1, 1] * shape[1] / 2, -shape[0] * SPACING[0] / 2]
    return affine


def write_inputs(folder: Path, shape: tuple[int, int, int]) -> tuple[Path, Path, float]:
    """The `.nii.gz`, the DICOM folder, and how many times the first is smaller than its voxels."""
    scan = make_scan(shape)
    affine = file_affine(shape)
    path = folder / "scan.nii.gz"
    image = nibabel.Nifti1Image(scan.transpose(2, 1, 0), affine)
    with gzip.open(path, "wb", compresslevel=6) as file:
        file.write(image.to_bytes())
    series = folder / "series"
    series.mkdir()
    write_series(series, scan, affine)
    return path, series, scan.nbytes / path.stat().st_size


def write_series(folder: Path, scan: np.ndarray, affine: np.ndarray) -> None:
    """One uncompressed CT slice per file."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for z, plane in enumerate(scan):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        slice_ = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID, slice_.FrameOfReferenceUID = study, series, frame
        slice_.Modality, slice_.InstanceNumber, slice_.ImageType = "CT", z + 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
        slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        # DICOM's world is left, posterior, superior.
        slice_.ImagePositionPatient = [-affine[0, 3], -affine[1, 3], affine[2, 3] + z * SPACING[0]]
        slice_.PixelSpacing, slice_.SliceThickness = [SPACING[1], SPACING[2]], SPACING[0]
        slice_.Rows, slice_.Columns, slice_.SamplesPerPixel = *plane.shape, 1
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 1
        slice_.PhotometricInterpretation, slice_.RescaleSlope, slice_.RescaleIntercept = "MONOCHROME2", 1, 0
        slice_.PixelData = plane.tobytes()
        slice_.save_as(folder / f"{z:04d}.dcm", enforce_file_format=True)


# ---------------------------------------------------------------------------------------------- ways


def processor(shape: tuple[int, int, int], antialias: bool) -> T3DImageProcessor:
    """The model's grid as one global view: what the other libraries' steps give."""
    return T3DImageProcessor(
        spacing=MODEL_SPACING,
        global_size=grid_shape(shape),
        global_fit="resize",
        windows=(WINDOW,),
        antialias=antialias,
    )


def grid_shape(shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Voxels (z, y, x) of the model's grid."""
    return tuple(spacing_sampling(*axis).count for axis in zip(shape, SPACING, MODEL_SPACING, strict=True))


def inflate(path: Path) -> None:
    """Decompresses a file and throws the bytes away; the least that any reader has to do."""
    from isal import igzip

    buffer = memoryview(bytearray(1 << 20))
    with igzip.open(path) as file:
        while file.readinto(buffer):
            pass


def without_isal(path: Path) -> Any:
    """Our reader where the extra "fast" is not installed."""
    known = sys.modules.get("isal")
    sys.modules["isal"] = None  # type: ignore[assignment]
    try:
        return read_volume(path)
    finally:
        sys.modules["isal"] = known  # type: ignore[assignment]


def monai_steps(reader: Any) -> Callable[[Any], torch.Tensor]:
    """MONAI's Compose of the same steps; the result is (x, y, z) with a channel."""
    from monai import transforms

    x, y, z = reversed(MODEL_SPACING)
    return transforms.Compose(
        [
            transforms.LoadImage(reader=reader, image_only=True, ensure_channel_first=True),
            transforms.Orientation("RAS", labels=None),
            transforms.Spacing((x, y, z), mode="bilinear", padding_mode="border", scale_extent=True),
            transforms.ScaleIntensityRange(*WINDOW, -1.0, 1.0, clip=True),
        ]
    )


def simple_itk_resampled(image: Any, shape: tuple[int, int, int]) -> Any:
    """Trilinear, float32, on the model's grid, edges of the grid where those of the image are."""
    import SimpleITK

    sizes = [int(size) for size in reversed(grid_shape(shape))]
    spacing = [float(step) for step in reversed(MODEL_SPACING)]
    shift = [(new - old) / 2 for new, old in zip(spacing, image.GetSpacing(), strict=True)]
    direction = np.reshape(image.GetDirection(), (3, 3))
    resampler = SimpleITK.ResampleImageFilter()
    resampler.SetSize(sizes)
    resampler.SetOutputSpacing(spacing)
    resampler.SetOutputOrigin((np.asarray(image.GetOrigin()) + direction @ shift).tolist())
    resampler.SetOutputDirection(image.GetDirection())
    resampler.SetInterpolator(SimpleITK.sitkLinear)
    resampler.SetOutputPixelType(SimpleITK.sitkFloat32)
    resampler.UseNearestNeighborExtrapolatorOn()
    return resampler.Execute(image)


def grid_sampled(
    array: torch.Tensor, matrix: np.ndarray, start: Sequence[float], shape: Sequence[int]
) -> torch.Tensor:
    """torch, all samples at once: sample i lies at source index `start + matrix @ i`."""
    scale, counts = 2.0 / np.asarray(array.shape), np.asarray(shape)
    # Both grids run from -1 to 1 between their outer faces, and the last axis comes first.
    middle = np.asarray(start) + matrix @ ((counts - 1) / 2)
    theta = np.column_stack([scale[:, None] * matrix * (counts / 2), scale * (middle + 0.5) - 1])
    theta = np.column_stack([theta[::-1, 2::-1], theta[::-1, 3]])
    grid = torch.nn.functional.affine_grid(torch.from_numpy(theta)[None].float(), [1, 1, *shape], align_corners=False)
    values = array.float()[None, None]
    return torch.nn.functional.grid_sample(values, grid, padding_mode="border", align_corners=False)[0, 0]


def scipy_sampled(
    array: torch.Tensor, matrix: np.ndarray, start: Sequence[float], shape: Sequence[int]
) -> torch.Tensor:
    """SciPy's affine transform; of a diagonal matrix it takes a quicker way of its own."""
    from scipy import ndimage

    matrix = np.diagonal(matrix) if np.count_nonzero(matrix) == 3 else matrix
    values = ndimage.affine_transform(
        array.numpy(), matrix, start, tuple(shape), output=np.float32, order=1, mode="nearest"
    )
    return torch.from_numpy(values)


def simple_itk_sampled(
    array: torch.Tensor, matrix: np.ndarray, start: Sequence[float], shape: Sequence[int]
) -> torch.Tensor:
    """SimpleITK, whose points are indices here, (x, y, z)."""
    import SimpleITK

    transform = SimpleITK.AffineTransform(3)
    transform.SetMatrix(matrix[::-1, ::-1].flatten().tolist())
    transform.SetTranslation([float(value) for value in reversed(start)])
    resampler = SimpleITK.ResampleImageFilter()
    resampler.SetSize([int(size) for size in reversed(shape)])
    resampler.SetTransform(transform)
    resampler.SetInterpolator(SimpleITK.sitkLinear)
    resampler.SetOutputPixelType(SimpleITK.sitkFloat32)
    resampler.UseNearestNeighborExtrapolatorOn()
    image = SimpleITK.GetImageFromArray(array.numpy())
    return torch.from_numpy(SimpleITK.GetArrayFromImage(resampler.Execute(image)))


def simple_itk_path(path: Path, shape: tuple[int, int, int]) -> torch.Tensor:
    """SimpleITK up to the resampled image, torch for the window."""
    import SimpleITK

    image = simple_itk_resampled(SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(path)), "RAS"), shape)
    values = torch.from_numpy(SimpleITK.GetArrayFromImage(image)).clamp_(*WINDOW)
    return values.sub_(sum(WINDOW) / 2).mul_(2 / (WINDOW[1] - WINDOW[0]))


# ---------------------------------------------------------------------------------------------- measuring


def compare(ways: dict[str, Callable[[], Any]], difference: Callable[[Any, Any], float]) -> dict[str, float]:
    """Largest difference of each way's result from that of the first."""
    first, *others = ways
    expected = ways[first]()
    found = {name: difference(ways[name](), expected) for name in others if name not in MAKERS}
    return found


def take_turns(ways: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Median seconds of each way; one uncounted round first."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(repetitions + 1):
        for name, way in ways.items():
            gc.collect()
            start = time.perf_counter()
            result = way()
            elapsed = time.perf_counter() - start
            del result
            if round_:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def inner_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference away from the border, where libraries extend an image in ways of their own."""
    inner = (slice(2, -2),) * 3
    return float((found[inner] - expected[inner]).abs().max())


def rows_of(
    title: str,
    ways: dict[str, Callable[[], Any]],
    difference: Callable[[Any, Any], float],
    tolerance: float,
    unit: str,
    targets: dict[str, str],
    repetitions: int,
) -> list[str]:
    """Lines of the table: the first way is ours, ratios are of the others' time to it."""
    differences = compare(ways, difference)
    seconds = take_turns(ways, repetitions)
    first = next(iter(ways))
    lines = []
    for name, median in seconds.items():
        ratio = f"{median / seconds[first]:.2f}" if name != first else ""
        if name == "inflating alone":
            ratio = f"ours takes {seconds[first] / median:.2f}"
        agreement = "" if name not in differences else f"within {differences[name]:.2g} {unit}"
        if differences.get(name, 0.0) > tolerance:
            ratio, agreement = "void", f"differs by {differences[name]:.2g} {unit}"
        lines.append(f"| {title} | {name} | {median:.3f} | {ratio} | {targets.get(name, '')} | {agreement} |")
        print(lines[-1], flush=True)
    return lines


def read_rows(path: Path, repetitions: int) -> list[str]:
    """Row 1: a compressed file to int16 and affine."""
    import SimpleITK

    def difference(found: Any, expected: Any) -> float:
        array = found if isinstance(found, np.ndarray) else SimpleITK.GetArrayViewFromImage(found).T
        return float(np.abs(array.astype(np.int32) - expected.array).max())

    ways = {
        "modeling_t3d": lambda: read_volume(path),
        "nibabel": lambda: np.asanyarray(nibabel.load(path).dataobj),
        "SimpleITK": lambda: SimpleITK.ReadImage(str(path)),
        "inflating alone": lambda: inflate(path),
    }
    targets = {"nibabel": ">= 2.5", "SimpleITK": ">= 3.5", "inflating alone": "<= 1.2"}
    lines = rows_of("read .nii.gz", ways, difference, 0, "HU", targets, repetitions)
    plain = {
        "modeling_t3d": lambda: without_isal(path),
        "nibabel": ways["nibabel"],
    }
    return lines + rows_of(
        "read .nii.gz, without isal", plain, difference, 0, "HU", {"nibabel": ">= 1.0"}, repetitions
    )


def resample_rows(path: Path, shape: tuple[int, int, int], repetitions: int) -> list[str]:
    """Row 2: int16 in memory to float32 on the model's grid."""
    import SimpleITK
    from monai import transforms

    size = grid_shape(shape)
    samplings = [spacing_sampling(*axis) for axis in zip(shape, SPACING, MODEL_SPACING, strict=True)]
    steps, starts = np.array([sampling.step for sampling in samplings]), [sampling.start for sampling in samplings]
    # MONAI gets what its own steps hand to this one: float32, (x, y, z).
    load = transforms.LoadImage(reader="NibabelReader", image_only=True, ensure_channel_first=True)
    meta = transforms.Orientation("RAS", labels=None)(load(path))
    x, y, z = reversed(MODEL_SPACING)
    spacing = transforms.Spacing((x, y, z), mode="bilinear", padding_mode="border", scale_extent=True)
    canonical = torch.from_numpy(read_volume(path).to_canonical().array)
    image = SimpleITK.GetImageFromArray(canonical.numpy())
    image.SetSpacing([float(step) for step in reversed(SPACING)])
    ways = {
        "modeling_t3d": lambda: resample(canonical, samplings, antialias=False),
        "modeling_t3d, averaged": lambda: resample(canonical, samplings),
        "MONAI Spacing": lambda: spacing(meta)[0].as_tensor().permute(2, 1, 0),
        "SimpleITK": lambda: torch.from_numpy(SimpleITK.GetArrayFromImage(simple_itk_resampled(image, shape))),
        "F.interpolate": lambda: torch.nn.functional.interpolate(
            canonical.float()[None, None], size=size, mode="trilinear", align_corners=False
        )[0, 0],
        "F.grid_sample": lambda: grid_sampled(canonical, np.diag(steps), starts, size),
        "SciPy": lambda: scipy_sampled(canonical, np.diag(steps), starts, size),
    }
    targets = {"MONAI Spacing": ">= 10", "SimpleITK": ">= 1.6", "F.interpolate": ">= 1.8"}
    lines = rows_of("trilinear resample", ways, inner_difference, 0.1, "HU", targets, repetitions)
    if not optional_import("monai._C")[1]:
        lines.append("| trilinear resample | MONAI, compiled | not measured: its wheels hold no compiled code | | | |")
    return lines


def tilted_rows(path: Path, shape: tuple[int, int, int], repetitions: int) -> list[str]:
    """Row 2 for a patient who lies askew: every sample of the upright grid lies between voxels on all axes."""
    canonical = read_volume(path).to_canonical()
    turned = canonical.affine.copy()
    cosine, sine = np.cos(TURN), np.sin(TURN)
    turned[:3, :3] = np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]]) @ turned[:3, :3]
    sampling = affine_sampling(shape, turned, MODEL_SPACING, upright=True)
    array = torch.from_numpy(canonical.array)
    places = [
        sum(
            sampling.matrix[axis, other] * np.arange(count).reshape([-1 if other == at else 1 for at in range(3)])
            for other, count in enumerate(sampling.shape)
        )
        + sampling.start[axis]
        for axis in range(3)
    ]
    # Libraries extend an image beyond its border in ways of their own.
    inside = torch.from_numpy(
        np.all([(place >= 2) & (place <= size - 3) for place, size in zip(places, shape, strict=True)], axis=0)
    )

    def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found - expected).abs()[inside].max())

    def ours() -> torch.Tensor:
        values = torch.empty(sampling.shape)
        resample_affine(canonical.array, sampling, 0.0, values.__setitem__, antialias=False)
        return values

    geometry = (sampling.matrix, sampling.start, sampling.shape)
    ways = {
        "modeling_t3d": ours,
        "SimpleITK": lambda: simple_itk_sampled(array, *geometry),
        "F.grid_sample": lambda: grid_sampled(array, *geometry),
        "SciPy": lambda: scipy_sampled(array, *geometry),
    }
    return rows_of("trilinear resample of a turned scan", ways, difference, 0.1, "HU", {}, repetitions)


def path_rows(path: Path, shape: tuple[int, int, int], repetitions: int) -> list[str]:
    """Row 3: a compressed file to the windowed model grid."""
    from monai.data import NibabelReader

    plain, averaged, standard = processor(shape, False), processor(shape, True), T3DImageProcessor()
    steps = monai_steps(NibabelReader())
    ways = {
        "modeling_t3d": lambda: plain(path)["pixel_values"][0, 0],
        "modeling_t3d, averaged": lambda: averaged(path)["pixel_values"][0, 0],
        "MONAI Compose": lambda: steps(path)[0].as_tensor().permute(2, 1, 0),
        "SimpleITK + torch": lambda: simple_itk_path(path, shape),
        "inflating alone": lambda: inflate(path),
    }
    targets = {"MONAI Compose": ">= 10", "SimpleITK + torch": ">= 1.7", "inflating alone": "<= 1.3"}
    # Ours are whole HU, as they are cached: half a HU is 0.0005 of the scaled range.
    lines = rows_of("path -> pixel_values", ways, inner_difference, 6e-4, "of -1..1", targets, repetitions)
    defaults = {"modeling_t3d": lambda: standard(path)["pixel_values"], "inflating alone": lambda: inflate(path)}
    title = "path -> pixel_values, default settings"
    return lines + rows_of(title, defaults, inner_difference, 0, "", {}, repetitions)


def series_rows(series: Path, shape: tuple[int, int, int], repetitions: int) -> list[str]:
    """Row 5: a folder of DICOM slices to the windowed model grid."""
    from monai.data import ITKReader

    plain, steps = processor(shape, False), monai_steps(ITKReader())
    ways = {
        "modeling_t3d": lambda: plain(series)["pixel_values"][0, 0],
        "MONAI Compose, ITK": lambda: steps(series)[0].as_tensor().permute(2, 1, 0),
    }
    targets = {"MONAI Compose, ITK": ">= 2"}
    return rows_of("DICOM series -> pixel_values", ways, inner_difference, 6e-4, "of -1..1", targets, repetitions)


# ---------------------------------------------------------------------------------------------- memory


def resident(field: str) -> int:
    """Bytes of memory that this process holds now (`"VmRSS"`) or held at most since the last reset (`"VmHWM"`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def memory_of(way: str, small: Path, path: Path, shape: tuple[int, int, int]) -> None:
    """Prints the bytes that one run needs above a warm process (a small file has been through everything)."""
    from monai.data import NibabelReader

    if way == "MONAI Compose":
        run: Callable[[Path], Any] = monai_steps(NibabelReader())
    elif way == "SimpleITK + torch":
        run = lambda path: simple_itk_path(path, shape)  # noqa: E731
    else:
        run = processor(shape, False)
    if way != "SimpleITK + torch":
        run(small)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    before = resident("VmRSS")
    result = run(path)
    print(resident("VmHWM") - before)
    del result


def memory_rows(folder: Path, path: Path, shape: tuple[int, int, int]) -> list[str]:
    """Row 4: peak memory of path -> pixel_values in a process of its own."""
    small = folder / "small.nii.gz"
    nibabel.save(nibabel.Nifti1Image(make_scan((30, 64, 64)).transpose(2, 1, 0), file_affine((30, 64, 64))), small)
    needed = 2 * int(np.prod(shape)) + 4 * int(np.prod(grid_shape(shape)))
    lines = []
    for way in ("modeling_t3d", "MONAI Compose", "SimpleITK + torch"):
        command = [sys.executable, __file__, "--memory-of", way, str(small), str(path), *map(str, shape)]
        extra = int(subprocess.check_output(command, text=True).split()[-1])
        target = "<= 1.25" if way == "modeling_t3d" else ""
        lines.append(
            f"| extra peak memory of that path | {way} | {extra / 1e6:.0f} MB | "
            f"{extra / needed:.2f} of input + output | {target} | |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Make the input, measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_argument(parser)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512), help="z y x")
    parser.add_argument("--memory-of", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        way, small, path, *sizes = arguments.memory_of
        depth, height, width = map(int, sizes)
        memory_of(way, Path(small), Path(path), (depth, height, width))
        return
    shape = tuple(arguments.shape)
    with tempfile.TemporaryDirectory() as name:
        path, series, ratio = write_inputs(Path(name), shape)
        lines = read_rows(path, arguments.repetitions)
        lines += resample_rows(path, shape, arguments.repetitions)
        lines += tilted_rows(path, shape, arguments.repetitions)
        lines += path_rows(path, shape, arguments.repetitions)
        lines += memory_rows(Path(name), path, shape)
        try:
            lines += series_rows(series, shape, arguments.repetitions)
        except ImportError as error:
            lines.append(f"| DICOM series -> pixel_values | MONAI Compose, ITK | not measured: {error} | | >= 2 | |")
        lines.append(
            "| int16 upload + resample on a GPU | pinned copy alone | a row of [gpu.md](gpu.md) | | <= 1.3 | |"
        )
    packages = ("torch", "isal", "nibabel", "SimpleITK", "monai", "itk-io", "pydicom", "numpy")
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    publish(
        [
            "# Reading and resampling",
            "",
            f"`python benchmarks/volumes.py --repetitions {arguments.repetitions}`; {shape[2]} x {shape[1]} x "
            f"{shape[0]} int16, {ratio:.2f} times smaller as .nii.gz, seed 0; {platform.machine()}, "
            f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads; Python {platform.python_version()}, "
            + ", ".join(versions)
            + ".",
            "",
            "Seconds are medians of rounds in which the libraries take turns; a ratio is the other library's time "
            "over ours. Values are compared two voxels away from the border.",
            "",
            "| work | by | seconds | ratio | target | values |",
            "| --- | --- | --- | --- | --- | --- |",
            *lines,
        ],
        arguments.output,
    )


if __name__ == "__main__":
    main()
