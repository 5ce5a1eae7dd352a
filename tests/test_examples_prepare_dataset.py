# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The script that prepares a data set, as a user calls it: whole, cut off and called again, refused with one line."""

import contextlib
import csv
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from object_storage import CREDENTIALS

from modeling_t3d.data.datasets import PretrainingDataset
from modeling_t3d.data.manifest import read_manifest
from modeling_t3d.data.store import VolumeStore
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.volume_io_t3d import to_volume, write_nifti

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "prepare_dataset.py"
SIZES = {"spacing": [3.0, 3.0, 3.0], "global_size": [16, 16, 16], "local_size": [8, 8, 8]}


def make_scans(folder: Path, count: int, depth: int = 20) -> Path:
    for number in range(count):
        array = np.full((depth, 24, 24), -1000, dtype=np.int16)
        array[:, 4:20, 4:20] = 40 + np.random.default_rng(number).integers(-9, 9, (depth, 16, 16))
        place = folder / f"p{number}"
        place.mkdir(parents=True)
        write_nifti(to_volume(array, spacing=(3, 3, 3), axes="SAR"), place / "scan.nii.gz")
        (place / "scan.txt").write_text(f"FINDINGS: The heart is of normal size.\nIMPRESSION: Normal scan {number}.")
    return folder


def configuration(folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(f"data: {{}}\nimage_processor: {SIZES}\nmodel: {{}}\ntraining: {{output_dir: out}}\n")
    return path


@pytest.fixture
def run(monkeypatch, caplog):
    """Runs the script in this process and gives what it logged; a refusal is the `SystemExit` that it ends with."""
    caplog.set_level("INFO")

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        caplog.clear()
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return caplog.text

    return run


def test_from_a_folder_to_training(tmp_path, run):
    scans = make_scans(tmp_path / "scans", 6)
    (scans / "p5" / "scan.nii.gz").write_bytes(b"not a scan")
    output = tmp_path / "out"
    arguments = ["--layout", "folder", "--folder", scans, "--output", output, "--store", output / "store"]
    arguments += ["--config", configuration(tmp_path), "--num-workers", "0", "--max-unreadable", "1"]
    arguments += ["--splits", "train=0.5", "test=0.5"]
    said = run(*arguments)
    assert "unreadable volumes: 1 volume that cannot be read" in said
    assert "5 volumes are in the store: 5 prepared now, 0 before" in said
    assert (output / "quality.html").read_text().startswith("<!DOCTYPE html>")
    with (output / "quarantine.csv").open(newline="") as file:
        assert [Path(line["volume"]).parent.name for line in csv.DictReader(file)] == ["p5"]
    for file in scans.rglob("*.nii.gz"):
        file.unlink()
    processor = T3DImageProcessor(**SIZES)
    rows = read_manifest(output / "stored.csv").rows
    assert {row.split for row in rows} <= {"train", "test"}
    dataset = PretrainingDataset(rows, processor, store=output / "store")
    assert [sample.text for sample in (dataset[0], dataset[4])] == [
        f"The heart is of normal size. Normal scan {number}." for number in (0, 4)
    ]


def test_studies_with_short_reports_enter_the_store(tmp_path, run):
    """They may be labelled; training leaves out what is too short for it."""
    make_scans(tmp_path / "scans", 2)
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(
        "volume,report,label:embolism\nscans/p0/scan.nii.gz,The heart is of normal size.,0\n"
        "scans/p1/scan.nii.gz,No PE.,0\n"
    )
    output = tmp_path / "out"
    said = run(
        "--manifest", manifest, "--output", output, "--store", output / "store",
        "--config", configuration(tmp_path), "--num-workers", "0",
    )  # fmt: skip
    assert "2 volumes are in the store" in said
    assert len(read_manifest(output / "stored.csv", min_report_words=0).rows) == 2
    assert read_manifest(output / "stored.csv").dropped_short == [2]


# Python imports it before anything else, in the worker too: halfway through the fifth volume all processes die.
KILL = """
import os, signal
from modeling_t3d.data import store

publish, volumes = store.publish, []

def publish_four(file_system, path, write):
    def half(file):
        file.write(b"half a volume")
        os.killpg(os.getpgrp(), signal.SIGKILL)

    if path.endswith(".t3d"):
        volumes.append(path)
    publish(file_system, path, half if len(volumes) == 5 else write)

store.publish = publish_four
"""


def test_a_run_that_is_killed_whole_is_finished_by_the_next(tmp_path, run):
    """The script, its scheduler and its worker die at once; the second run does what is left."""
    pytest.importorskip("distributed")
    scans = make_scans(tmp_path / "scans", 12)
    output = tmp_path / "out"
    arguments = ["--layout", "folder", "--folder", scans, "--output", output, "--store", output / "store"]
    arguments += ["--config", configuration(tmp_path), "--quality-volumes", "1", "--num-workers"]
    (tmp_path / "kill").mkdir()
    (tmp_path / "kill" / "sitecustomize.py").write_text(KILL)
    paths = os.pathsep.join([str(tmp_path / "kill"), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments), "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    volumes = output / "store" / "volumes"
    try:
        error = process.communicate(timeout=900)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, error
    before = len(list(volumes.rglob("*.t3d")))
    assert before == 4, error
    assert len(list(volumes.rglob("*.partial"))) == 1
    assert "12 volumes are in the store: 8 prepared now, 4 before" in run(*arguments, "0")
    files = [file for file in (output / "store").rglob("*") if file.is_file() and "volumes" in file.parts]
    assert len(files) == 12, "nothing twice and nothing in part"
    store = VolumeStore(output / "store")
    for key in list(store.keys()):
        store.verify(key)
    assert len(read_manifest(output / "stored.csv").rows) == 12


def test_what_is_wrong_ends_in_one_line(tmp_path, run):
    with pytest.raises(
        SystemExit, match=r"impressions_\*\.tsv \(the reports\) is missing; download it from"
    ) as caught:
        run("--layout", "inspect", "--folder", tmp_path, "--output", tmp_path / "out", "--quality-only")
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit, match="write NAME=VALUE"):
        run("--layout", "folder", "--folder", tmp_path, "--output", tmp_path, "--quality-only", "--option", "version")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--manifest", "m.csv", "--splits", "train=1"], "--folder, --option and --splits go with --layout"),
        (["--manifest", "m.csv", "--folder", "scans"], "--folder, --option and --splits go with --layout"),
        (["--manifest", "m.csv", "--max-unreadable", "foo"], "argument --max-unreadable: invalid"),
        (["--manifest", "m.csv", "--max-unreadable", "1.5"], "argument --max-unreadable: invalid"),
    ],
)
def test_options_that_would_not_count_are_refused(tmp_path, run, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(*arguments, "--output", tmp_path, "--quality-only")
    assert message in capsys.readouterr().err


def test_a_manifest_of_ones_own_is_not_replaced(tmp_path, run):
    scans = make_scans(tmp_path / "scans", 2)
    arguments = ("--layout", "folder", "--folder", scans, "--output", tmp_path, "--quality-only", "--num-workers", "0")
    (tmp_path / "manifest.csv").write_text("volume,report\nmine.nii.gz,mine\n")
    with pytest.raises(SystemExit, match=r"manifest\.csv: was not written by this script; choose another --output"):
        run(*arguments)
    assert "mine" in (tmp_path / "manifest.csv").read_text()
    (tmp_path / "manifest.csv").unlink()
    run(*arguments)
    written = (tmp_path / "manifest.csv").read_text()
    (tmp_path / "quality.html").unlink()  # as a call that was cut off leaves it
    run(*arguments)
    assert (tmp_path / "manifest.csv").read_text() == written
    with pytest.raises(SystemExit, match="--splits: train='a' is no share"):
        run(*arguments, "--splits", "train=a")


def test_what_object_storage_needs_reaches_store_and_sources_and_no_log(tmp_path, run, bucket, storage, monkeypatch):
    make_scans(tmp_path, 2)
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(
        "volume,report,patient_id\n"
        + "".join(f"p{n}/scan.nii.gz,The lungs are clear on this scan.,p{n}\n" for n in (0, 1))
    )
    far = fsspec.filesystem("s3")
    for number in range(2):
        far.put(str(tmp_path / f"p{number}" / "scan.nii.gz"), f"{bucket}/scans/p{number}/scan.nii.gz")
    for name in (*CREDENTIALS, "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    place = f"client_kwargs={{endpoint_url: '{storage.url}', region_name: us-east-1}}"
    arguments = ["--manifest", manifest, "--output", tmp_path / "out", "--config", configuration(tmp_path)]
    arguments += ["--num-workers", "0", "--store", f"{bucket}/store", "--sources", f"{bucket}/scans"]
    said = run(*arguments, "--storage-option", "key=test", "secret=hunter2", place)
    assert "2 volumes are in the store: 2 prepared now" in said
    assert "hunter2" not in said
    with pytest.raises(SystemExit, match="NAME=VALUE") as refused:
        run(*arguments, "--storage-option", "hunter2")
    assert "hunter2" not in str(refused.value)
