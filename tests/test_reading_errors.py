# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Headers that promise too much, archives and closed folders: refused at once, and nothing is allocated for them."""

import gzip
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_writer import multi_frame_elements, write_encoded, write_series, write_slice
from process_memory import peak, reset_peak

from modeling_t3d.geometry_t3d import VolumeIntensityError
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.volume_io_t3d import VolumeReadError, read_volume

SimpleITK = pytest.importorskip("SimpleITK")
pydicom = pytest.importorskip("pydicom")
SHAPE = (3, 32, 40)

# Reads every path under a limit on the memory that may be allocated beyond what the libraries themselves take; a first
# read of a small file of each kind has loaded those.
CHILD = """
import json, resource, sys, time
from process_memory import peak, reset_peak
from modeling_t3d.volume_io_t3d import VolumeReadError, read_volume

paths, warm, allowance = json.loads(sys.argv[1])
for path in warm:
    read_volume(path)
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + allowance,) * 2)
result = {}
for path in paths:
    before, start = reset_peak(), time.process_time()
    try:
        read_volume(path)
        message = "was read"
    except VolumeReadError as error:
        message = str(error)
    result[path] = [message, time.process_time() - start, peak() - before]
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def stored():
    return np.random.default_rng(0).integers(0, 3000, SHAPE).astype(np.uint16)


def write_promises(folder: Path) -> tuple[list[str], list[str]]:
    """Files of a few kilobytes whose headers promise terabytes, and the right files that they were made from."""
    stored = np.random.default_rng(0).integers(0, 3000, SHAPE).astype(np.uint16)
    good, bad = folder / "good", folder / "bad"
    good.mkdir()
    bad.mkdir()
    nibabel.save(nibabel.Nifti1Image(stored.astype(np.int16), np.eye(4)), good / "one.nii")
    nibabel.save(nibabel.Nifti2Image(stored.astype(np.int16), np.eye(4)), good / "two.nii")
    for name, offset, form, sizes in (("one", 42, "<3h", [32767] * 3), ("two", 24, "<3q", [1 << 20] * 3)):
        content = bytearray((good / f"{name}.nii").read_bytes())
        struct.pack_into(form, content, offset, *sizes)
        (bad / f"{name}.nii").write_bytes(content)
        (bad / f"{name}.nii.gz").write_bytes(gzip.compress(content))
    for suffix, old, new in (
        ("mha", b"DimSize = 40 32 3", b"DimSize = 60000 60000 60000"),
        ("nrrd", b"sizes: 40 32 3", b"sizes: 60000 60000 60000"),
    ):
        for packed in (False, True):
            path = good / f"itk{int(packed)}.{suffix}"
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(stored), str(path), useCompression=packed)
            content = path.read_bytes()
            assert old in content
            (bad / path.name).write_bytes(content.replace(old, new))
    write_slice(good / "slice.dcm", stored[0], (0, 0, 0))
    write_slice(bad / "slice.dcm", stored[0], (0, 0, 0), Rows=65535, Columns=65535)
    elements = multi_frame_elements(3, [(0, 0, float(index)) for index in range(3)], [1] * 3)
    write_slice(good / "frames.dcm", stored, (0, 0, 0), **elements)
    for syntax in ("deflated", "jpeg_lossless", "jpeg_ls", "jpeg_2000", "rle"):
        try:
            write_encoded(good / "frames.dcm", good / f"{syntax}.dcm", syntax)
        except ImportError:
            continue
        dataset = pydicom.dcmread(good / f"{syntax}.dcm")
        dataset.Rows, dataset.Columns = 65535, 65535
        dataset.save_as(bad / f"{syntax}.dcm")
        if syntax == "jpeg_2000":  # the codestream itself promises as much: its SIZ marker
            content = (good / f"{syntax}.dcm").read_bytes()
            frame = struct.pack(">2I", 40, 32)
            assert frame in content
            (bad / "jpeg_2000_stream.dcm").write_bytes(content.replace(frame, struct.pack(">2I", 1 << 30, 1 << 30)))
    write_slice(bad / "many_frames.dcm", stored, (0, 0, 0), **{**elements, "NumberOfFrames": 2_000_000_000})
    return ([str(path) for path in sorted(folder.iterdir())] for folder in (bad, good))


def write_moderate_promises(folder: Path) -> tuple[list[str], list[str]]:
    """Files of a megabyte whose headers promise 700 times as much: few enough for the best compression there is."""
    values = np.random.default_rng(0).integers(0, 3000, (8, 256, 256)).astype(np.int16)
    good = [folder / name for name in ("scan.nrrd", "scan.mha", "scan.nii.gz", "scan.dcm")]
    bad = [folder / "bad" / path.name for path in good]
    bad[0].parent.mkdir()
    for path in good[:2]:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values), str(path), useCompression=True)
    nibabel.save(nibabel.Nifti1Image(values.T, np.eye(4)), good[2])
    write_slice(folder / "plain.dcm", values[0], (0, 0, 0))
    write_encoded(folder / "plain.dcm", good[3], "rle")
    content = good[0].read_bytes()
    bad[0].write_bytes(content.replace(b"sizes: 256 256 8", b"sizes: 256 256 6000"))
    content = good[1].read_bytes()
    bad[1].write_bytes(content.replace(b"DimSize = 256 256 8", b"DimSize = 256 256 6000"))
    content = bytearray(gzip.decompress(good[2].read_bytes()))
    struct.pack_into("<3h", content, 42, 256, 256, 6000)
    bad[2].write_bytes(gzip.compress(content))
    dataset = pydicom.dcmread(good[3])
    dataset.Rows, dataset.Columns = 20_000, 20_000
    dataset.save_as(bad[3])
    for right, wrong in zip(good, bad, strict=True):
        assert right.read_bytes() != wrong.read_bytes()
    return [str(path) for path in bad], [str(path) for path in good]


@pytest.mark.parametrize("write", [write_promises, write_moderate_promises])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_promises_are_refused_without_allocating_them(tmp_path, write):
    bad, good = write(tmp_path)
    allowance = 256 << 20
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", CHILD, json.dumps([bad, good, allowance])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result) == len(bad) >= 4
    for path, (message, seconds, grown) in result.items():
        assert message.startswith(f"{path}: "), message
        assert seconds < 1, path
        assert grown < 64 << 20, path


def test_a_deflated_stream_that_never_ends_is_cut_off(tmp_path):
    """A kilobyte per megabyte of zeros: what the header does not promise is not inflated."""
    image = nibabel.Nifti1Image(np.zeros((4, 4, 4), dtype=np.int16), np.eye(4))
    bomb = gzip.compress(image.to_bytes() + bytes(64 << 20))
    (tmp_path / "bomb.nii.gz").write_bytes(bomb)
    before = reset_peak()
    start = time.process_time()
    read_volume(tmp_path / "bomb.nii.gz")
    assert time.process_time() - start < 1
    assert peak() - before < 32 << 20


def deflated_with_more(path: Path, source: Path, more: int) -> None:
    """A deflated DICOM file that holds another's data set and so many zeros behind its pixels."""
    content = source.read_bytes()
    (length,) = struct.unpack_from("<I", content, 132 + 8)  # of the file's meta information
    start = 132 + 12 + length
    plain = zlib.decompress(content[start:], -zlib.MAX_WBITS)
    padding = struct.pack("<HH2sHI", 0xFFFC, 0xFFFC, b"OB", 0, more)
    deflate = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    packed = deflate.compress(plain + padding)
    for _ in range(more >> 20):
        packed += deflate.compress(bytes(1 << 20))
    path.write_bytes(content[:start] + packed + deflate.flush())


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_deflated_dicom_file_that_never_ends_is_refused(tmp_path, where):
    """A kilobyte per megabyte of zeros: inflated by the piece until it is too much, never whole."""
    stored = np.random.default_rng(0).integers(0, 3000, SHAPE).astype(np.uint16)
    write_series(tmp_path / "plain", stored)
    for file in (tmp_path / "plain").iterdir():
        write_encoded(file, tmp_path / "scan" / file.name, "deflated")
    last = tmp_path / "scan" / "001"
    deflated_with_more(last, last, 1 << 20)
    np.testing.assert_array_equal(read_volume(tmp_path / "scan").array, stored.astype(int) - 1024)
    deflated_with_more(last, last, 200 << 20)
    path = last if where == "file" else tmp_path / "scan"
    assert last.stat().st_size < 1 << 18
    before = reset_peak()
    with pytest.raises(VolumeReadError, match="its deflated data grows beyond 67108864 bytes") as error:
        read_volume(path)
    assert str(error.value).startswith(str(path))
    assert peak() - before < 32 << 20


def write_archives(folder: Path, content: bytes) -> dict[str, str]:
    """Archives around a file, by name, and what each is called."""
    with zipfile.ZipFile(folder / "plain.zip", "w") as archive:
        archive.writestr("scan.nii", content)
    encrypted = bytearray((folder / "plain.zip").read_bytes())
    encrypted[6] |= 1  # the flag that says the entry is encrypted; the standard library cannot write one
    (folder / "secret.zip").write_bytes(encrypted)
    (folder / "secret.nii.gz").write_bytes(encrypted)
    (folder / "secret").write_bytes(encrypted)
    (folder / "seven.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(64))
    (folder / "old.rar").write_bytes(b"Rar!\x1a\x07\x01\x00" + bytes(64))
    (folder / "scan.nii").write_bytes(content)
    with tarfile.open(folder / "plain.tar", "w") as archive:
        archive.add(folder / "scan.nii", "scan.nii")
    (folder / "scan.nii").unlink()
    zips = {"plain.zip": "a zip", **dict.fromkeys(("secret.zip", "secret.nii.gz", "secret"), "an encrypted zip")}
    return {**zips, "seven.7z": "a 7z", "old.rar": "a RAR", "plain.tar": "a tar"}


def test_archives_are_named(tmp_path, stored):
    image = nibabel.Nifti1Image(stored.astype(np.int16), np.eye(4))
    archives = write_archives(tmp_path, image.to_bytes())
    for name, kind in archives.items():
        with pytest.raises(VolumeReadError) as caught:
            read_volume(tmp_path / name)
        assert (
            str(caught.value) == f"{tmp_path / name}: is {kind} archive; unpack it and pass the file or folder inside"
        )
    with pytest.raises(VolumeReadError, match=r"no image .* an encrypted zip archive; unpack it first"):
        read_volume(tmp_path)
    write_series(tmp_path / "series", stored)  # an archive beside the scan is left out
    assert read_volume(tmp_path).shape == SHAPE


def test_closed_files_and_folders_inside_a_folder_are_refused(tmp_path, stored):
    """A slice that cannot be opened must not become a gap in silence."""
    write_series(tmp_path, stored)
    write_series(tmp_path / "more", stored, origin=(-10, -20, 36))
    closed = [tmp_path / "more", tmp_path / "002"]
    user = os.geteuid()
    for path in closed:
        mode = path.stat().st_mode
        path.chmod(0)
        try:
            if user == 0:
                os.chmod(tmp_path, 0o755)
                for parent in [tmp_path, *tmp_path.parents]:
                    if parent.owner() == "root" and parent != Path("/") and parent != Path("/tmp"):
                        os.chmod(parent, 0o755)
                os.seteuid(65534)  # the superuser may read every file
            with pytest.raises(VolumeReadError, match=r"cannot be opened \(.*Permission denied") as caught:
                read_volume(tmp_path)
            assert str(caught.value).startswith(f"{tmp_path}")
        finally:
            os.seteuid(user)
            path.chmod(mode)
    assert read_volume(tmp_path).shape == (6, *SHAPE[1:])


def test_other_scanners_are_refused_where_ct_is_expected(tmp_path, stored):
    write_series(tmp_path, stored, Modality="MR")
    assert read_volume(tmp_path).modality == "MR"
    settings = {"spacing": None, "global_size": (8, 8, 8), "local_size": (8, 8, 8)}
    with pytest.raises(VolumeIntensityError) as caught:
        T3DImageProcessor(**settings)(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: its header says MR")
    for accepted in ({"intensity": "percentile"}, {"intensity": "zscore"}):
        T3DImageProcessor(**settings, **accepted)(tmp_path)


@pytest.mark.parametrize("stored_type", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_every_number_type_of_nifti(tmp_path, stored_type, order, kind):
    dtype = np.dtype(stored_type)
    array = np.arange(-60, 60).reshape(4, 5, 6).clip(0 if dtype.kind == "u" else -60, None).astype(dtype)
    header = kind.header_class(endianness=order)
    header.set_data_dtype(dtype)
    nibabel.save(kind(array, np.eye(4), header), tmp_path / "scan.nii.gz")
    assert nibabel.load(tmp_path / "scan.nii.gz").header.endianness == order
    volume = read_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(volume.array, array.astype(np.float64))
    assert volume.array.dtype == (np.float32 if dtype.kind == "f" else np.int16)


def test_sform_stands_before_qform_as_nibabel_has_it(tmp_path, stored):
    """The four combinations of codes, with affines that differ."""
    scanner, aligned = np.diag([-1.0, -1.0, 2.0, 1.0]), np.diag([1.5, 1.5, 1.5, 1.0])
    for sform_code, qform_code in ((0, 0), (0, 1), (1, 0), (2, 1), (4, 2)):
        image = nibabel.Nifti1Image(stored.astype(np.int16), None)
        image.set_sform(aligned if sform_code else None, sform_code)
        image.set_qform(scanner if qform_code else None, qform_code)
        nibabel.save(image, tmp_path / "scan.nii")
        affine = read_volume(tmp_path / "scan.nii").affine
        np.testing.assert_array_equal(affine, nibabel.load(tmp_path / "scan.nii").affine)
        if sform_code or qform_code:
            np.testing.assert_array_equal(affine, aligned if sform_code else scanner)


def text_header(suffix: str, sizes: str, first: str) -> bytes:
    """The header of an NRRD or MetaImage of 16-bit numbers, `first` its first direction."""
    if suffix == "nrrd":
        lines = ["NRRD0004", "type: unsigned short", "dimension: 3", "space: left-posterior-superior"]
        lines += [f"sizes: {sizes}", f"space directions: ({first.replace(' ', ',')}) (0,1,0) (0,0,1)"]
        lines += ["space origin: (0,0,0)", "encoding: raw", "endian: little", ""]
    else:
        lines = ["ObjectType = Image", "NDims = 3", "BinaryData = True", f"TransformMatrix = {first} 0 1 0 0 0 1"]
        lines += [
            "ElementSpacing = 1 1 1",
            f"DimSize = {sizes}",
            "ElementType = MET_USHORT",
            "ElementDataFile = LOCAL",
        ]
    return "\n".join([*lines, ""]).encode()


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
@pytest.mark.parametrize(
    ("sizes", "first", "reason"),
    [
        ("0 32 3", "1 0 0", r"no axis may be empty|damaged"),
        ("-40 32 3", "1 0 0", r"no axis may be empty|damaged"),
        ("40 32 3", "nan 0 0", r"damaged|NaN"),
        ("40 32 3", "inf 0 0", r"damaged|NaN"),
        ("40 32 3", "0 0 0", r"damaged|not believable|singular"),
        ("40 32 3", "0 1 0", r"damaged|singular"),
        ("40 32 3", "1e9 0 0", r"damaged|not believable"),
    ],
)
def test_impossible_sizes_and_directions_in_text_headers(tmp_path, stored, suffix, sizes, first, reason):
    path = tmp_path / f"scan.{suffix}"
    path.write_bytes(text_header(suffix, sizes, first) + stored.tobytes())
    with pytest.raises(VolumeReadError, match=reason) as caught:
        pytest.fail(f"was read: {read_volume(path).affine}")
    assert str(caught.value).startswith(f"{path}: ")
    path.write_bytes(text_header(suffix, "40 32 3", "1 0 0") + stored.tobytes())
    np.testing.assert_array_equal(read_volume(path).array, stored)
