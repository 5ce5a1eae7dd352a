# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Mutates valid files of every format and reads them, in a process of its own: a parser that crashes ends it.

    python tests/fuzz_reader.py FOLDER FIRST COUNT

mutates the files that `write_seeds(FOLDER)` made, cases FIRST to FIRST + COUNT, and prints one JSON object of counts.
The case at work stands in FOLDER/case-FIRST.txt. A case that takes over a minute ends the process with a traceback.
"""

import faulthandler
import gzip
import json
import logging
import resource
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import process_memory

SHAPE = (3, 32, 40)  # JPEG 2000 needs 32 pixels
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
DETACHED = (".raw", ".zraw", ".raw.gz")
HANG = 60  # seconds
MEMORY = 6 << 30  # bytes of address space; torch and the parsers themselves take about half


def write_seeds(folder: Path) -> list[str]:
    """One small valid file (or folder of DICOM slices) per format and encoding; their names in order."""
    import nibabel
    import SimpleITK
    from dicom_writer import SYNTAXES, multi_frame_elements, write_encoded, write_series, write_slice

    stored = np.random.default_rng(0).integers(0, 3000, SHAPE).astype(np.uint16)
    scan = stored.astype(np.int16) - 1024
    affine = np.diag([-0.7, -0.8, 2.0, 1.0])
    seeds = folder / "seeds"
    seeds.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(scan, affine), seeds / "one.nii")
    nibabel.save(nibabel.Nifti1Image(scan, affine), seeds / "packed.nii.gz")
    nibabel.save(nibabel.Nifti2Image(scan.astype(np.float32), affine), seeds / "two.nii")
    for suffix in ("mha", "nrrd", "mhd", "nhdr"):
        for packed in (False, True):
            path = seeds / f"itk{int(packed)}.{suffix}"
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(scan), str(path), useCompression=packed)
    elements = multi_frame_elements(3, [(-10, -20, 30 + 2.0 * index) for index in range(3)], [1] * 3)
    write_slice(seeds / "slice-explicit.dcm", stored[0], (0, 0, 0))
    write_slice(seeds / "frames-explicit.dcm", stored, (0, 0, 0), SOPClassUID=ENHANCED_CT, **elements)
    for syntax in SYNTAXES:
        for kind in ("slice", "frames"):
            try:
                write_encoded(seeds / f"{kind}-explicit.dcm", seeds / f"{kind}-{syntax}.dcm", syntax)
            except ImportError:  # no encoder for it here
                continue
    write_series(seeds / "series", stored)
    # What a detached header points at is not mutated itself.
    return sorted(path.name for path in seeds.iterdir() if not path.name.endswith(DETACHED))


def mutated(content: bytes, generator: np.random.Generator) -> bytes:
    """The same bytes with a few of them changed, removed, repeated or cut off, mostly near the header."""
    data = bytearray(content)
    for _ in range(int(generator.integers(1, 6))):
        reach = len(data) if generator.random() < 0.4 else min(len(data), 1200)
        place, length = int(generator.integers(max(1, reach))), int(generator.integers(1, 9))
        action = generator.integers(6)
        if action == 0:
            data[place : place + length] = generator.bytes(length)
        elif action == 1:
            del data[place : place + length]
        elif action == 2:
            data[place:place] = data[place : place + length]
        elif action == 3:
            data[place : place + length] = bytes([int(generator.choice([0, 255, 127, 48, 57, 45]))]) * length
        elif action == 4 and place < len(data):
            data[place] ^= 1 << int(generator.integers(8))
        elif len(data) > 10:
            del data[max(place, 10) :]
    return bytes(data)


def run(folder: Path, first: int, count: int) -> dict:
    """Read the cases; anything but a Volume or a VolumeError propagates."""
    from modeling_t3d.geometry_t3d import VolumeError
    from modeling_t3d.image_processing_t3d import T3DImageProcessor
    from modeling_t3d.volume_io_t3d import read_volume

    # Its way through a NIfTI file is another one: voxels are resampled by one thread while another inflates.
    sizes = {"spacing": (4, 2, 2), "global_size": (8, 8, 8), "local_size": (8, 8, 8)}
    processor = T3DImageProcessor(intensity="percentile", **sizes)

    seeds = sorted(
        path for path in (folder / "seeds").iterdir() if not path.name.endswith((".raw", ".zraw", ".raw.gz"))
    )
    work = folder / f"work-{first}"
    work.mkdir()
    for path in (folder / "seeds").iterdir():
        if path.name.endswith(DETACHED):
            shutil.copy(path, work)
    counts = {seed.name: [0, 0] for seed in seeds}
    slowest = (0.0, -1)
    note = folder / f"case-{first}.txt"
    for case in range(first, first + count):
        seed = seeds[case % len(seeds)]
        generator = np.random.default_rng((20, case))
        path = work / seed.name
        if seed.is_dir():
            shutil.copytree(seed, path, dirs_exist_ok=True)
            target = sorted(path.iterdir())[case % 3]
            target.write_bytes(mutated((seed / target.name).read_bytes(), generator))
        else:
            content = seed.read_bytes()
            if seed.suffix == ".gz" and generator.random() < 0.7:  # the checksum would reveal every other mutation
                path.write_bytes(gzip.compress(mutated(gzip.decompress(content), generator)))
            else:
                path.write_bytes(mutated(content, generator))
        note.write_text(f"{case} {seed.name}")
        faulthandler.dump_traceback_later(HANG, exit=True)
        start = time.process_time()
        try:
            if ".nii" in seed.suffixes and case // len(seeds) % 2:
                counts[seed.name][0] += processor.prepare(path).array.ndim == 3
            else:
                counts[seed.name][0] += read_volume(path).array.ndim == 3
        except VolumeError as error:
            message = str(error)
            assert message.startswith(str(path)), message
            assert "\n" not in message, message
            counts[seed.name][1] += 1
        slowest = max(slowest, (time.process_time() - start, case))
        faulthandler.cancel_dump_traceback_later()
    return {
        "read": sum(read for read, _ in counts.values()),
        "refused": sum(refused for _, refused in counts.values()),
        "slowest_seconds": slowest[0],
        "slowest_case": slowest[1],
        "peak_bytes": process_memory.peak(),
        "seeds": counts,
    }


class _Refuse(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """A parser that logs may repeat header text."""
        raise AssertionError(f"{record.name} logged: {record.getMessage()}")


if __name__ == "__main__":
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.getLogger().addHandler(_Refuse())
    warnings.simplefilter("error", UserWarning)
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
