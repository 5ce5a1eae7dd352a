# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Mutated files of every format and encoding are read or refused: no crash, no hang, no other exception."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_reader import write_seeds

pytest.importorskip("SimpleITK")
pytest.importorskip("pydicom")
READER = Path(__file__).with_name("fuzz_reader.py")
MANY, PIECES = 10_000, 4


def fuzz(folder: Path, first: int, count: int, timeout: float) -> dict:
    """What a process of its own makes of the cases; its death is reported with the case at work."""
    seeds = write_seeds(folder)
    command = [sys.executable, str(READER), str(folder), str(first), str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    case = (folder / f"case-{first}.txt").read_text()
    assert done.returncode == 0, f"case {case} ended the process with {done.returncode}: {done.stderr[-2000:]}"
    result = json.loads(done.stdout)  # nothing else was printed
    assert result["read"] + result["refused"] == count
    assert set(result["seeds"]) == set(seeds)
    return result


def test_fuzzed_files_are_read_or_refused(tmp_path):
    result = fuzz(tmp_path, 0, 300, timeout=300)
    assert result["read"] > 20
    assert result["refused"] > 150
    assert result["slowest_seconds"] < 1
    assert result["peak_bytes"] < 1 << 30


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(PIECES))
def test_many_fuzzed_files_are_read_or_refused(tmp_path, piece):
    count = MANY // PIECES
    result = fuzz(tmp_path, piece * count, count, timeout=1800)
    assert result["slowest_seconds"] < 1
    assert result["peak_bytes"] < 1 << 30
    for name, (read, refused) in result["seeds"].items():  # no seed is broken or ignored
        assert read or name == "itk1.nrrd", name  # a checksum gives away nearly every mutation
        assert refused, name
