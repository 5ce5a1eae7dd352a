# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A store is filled by several processes whatever dies on the way, each volume once; nothing is left out silently."""

import csv
import itertools
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_t3d.data import build
from modeling_t3d.data.build import BuildError, addresses_below, build_store, write_stored_manifest
from modeling_t3d.data.build_tasks import PreparationTask, bundled, rescaled_key
from modeling_t3d.data.datasets import PretrainingDataset
from modeling_t3d.data.manifest import read_manifest
from modeling_t3d.data.manifest_files import write_records
from modeling_t3d.data.store import VolumeStore
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.volume_io_t3d import to_volume, write_nifti

PROCESSOR = T3DImageProcessor(spacing=(3, 3, 3), global_size=(16, 16, 16), local_size=(8, 8, 8))
REPORT = "The lungs are clear and the heart is of normal size."


def scan(depth: int, seed: int) -> np.ndarray:
    array = np.full((depth, 24, 24), -1000, dtype=np.int16)
    array[:, 4:20, 4:20] = 40 + np.random.default_rng(seed).integers(-9, 9, (depth, 16, 16))
    return array


def write_volume(path: Path, array: np.ndarray) -> Path:
    write_nifti(to_volume(array, spacing=(3, 3, 3), axes="SAR"), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve volumes, larger ones later, with the manifest that names them."""
    folder = tmp_path_factory.mktemp("volumes")
    records = [
        {
            "volume": write_volume(folder / f"{number}.nii", scan(12 + 2 * number, number)),
            "report": f"{REPORT} Scan {number}.",
            "patient_id": f"p{number}",
        }
        for number in range(12)
    ]
    write_records(records, folder / "manifest.csv")
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return read_manifest(folder / "manifest.csv").rows


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two workers of their own processes, as a running cluster has them."""
    distributed = pytest.importorskip("distributed")
    # One death of a worker may be chance, a second one with the same volume is not; by default three are forgiven.
    with (
        dask_setting("distributed.scheduler.allowed-failures", 1),
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            silence_logs=50,
            local_directory=tmp_path_factory.mktemp("dask"),
        ) as cluster,
    ):
        yield cluster


def dask_setting(name: str, value):
    import dask

    return dask.config.set({name: value})


def files_of(store: Path) -> list[str]:
    return sorted(file.name for file in (store / "volumes").rglob("*") if file.is_file())


def test_volumes_are_prepared_as_they_are_without_a_store(rows, tmp_path):
    report = build_store(rows, tmp_path / "store", PROCESSOR, num_workers=0)
    store = VolumeStore(tmp_path / "store")
    assert (report.num_added, report.num_present, report.unreadable) == (12, 0, [])
    assert sorted(report.keys.values()) == list(store.keys())
    for row in rows[:3]:
        np.testing.assert_array_equal(store.read(report.keys[row.number]).array, PROCESSOR.prepare(row.volume).array)


def test_the_largest_volumes_come_first(rows, tmp_path):
    order = []
    build_store(
        rows, tmp_path / "store", PROCESSOR, num_workers=0, on_outcome=lambda outcome: order.append(outcome.task)
    )
    sizes = [task.size for task in order]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] > 0


def test_sizes_are_asked_for_side_by_side_and_what_has_none_is_left_to_the_worker(folder, rows, tmp_path, monkeypatch):
    series = tmp_path / "series" / "below"
    series.mkdir(parents=True)
    for name in ("a", "b"):
        (series / name).write_bytes(b"x" * 700)
    addresses = {
        rows[1].number: f"file://{folder}/1.nii",
        rows[2].number: f"file://{tmp_path}/series",
        rows[3].number: str(tmp_path / "series"),
        rows[4].number: f"file://{folder}/none.nii",
        rows[5].number: str(folder / "none.nii"),
    }
    together, ask = threading.Barrier(len(rows)), build._size

    def met(source, store):
        together.wait(60)  # until every other one is under way
        return ask(source, store)

    monkeypatch.setattr(build, "_size", met)
    outcomes = []
    build_store(
        *(rows, tmp_path / "store", PROCESSOR),
        num_workers=0,
        addresses=addresses,
        max_unreadable=len(rows),
        on_outcome=outcomes.append,
    )
    sizes = {outcome.task.number: outcome.task.size for outcome in outcomes}
    expected = {row.number: row.volume.stat().st_size for row in rows}
    expected |= {rows[2].number: 1400, rows[3].number: 1400, rows[4].number: 0, rows[5].number: 0}
    assert sizes == expected
    unreadable = {outcome.task.number for outcome in outcomes if outcome.key is None}
    assert unreadable == {row.number for row in rows[2:6]}


def test_a_log_without_a_bar_tells_how_far_it_is(rows, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(build, "_TELL_EVERY", 0.0)
    caplog.set_level("INFO")
    build_store(rows, tmp_path / "store", PROCESSOR, num_workers=0)
    assert "the sizes of 6/12 volumes are known" in caplog.text
    assert "6/12 volumes, 0.0 of 0.0 GB, 0 quarantined, about 0 minutes left" in caplog.text


def test_a_second_build_prepares_nothing(rows, tmp_path):
    first = build_store(rows, tmp_path / "store", PROCESSOR, num_workers=0)
    second = build_store(rows, tmp_path / "store", PROCESSOR, num_workers=0)
    assert (second.num_added, second.num_present) == (0, 12)
    assert second.keys == first.keys


def test_a_stopped_build_is_finished_by_the_next(rows, tmp_path):
    class StopError(Exception):
        pass

    def stop(outcome, seen=[]):  # noqa: B006 - counts over the calls
        seen.append(outcome)
        if len(seen) == 5:
            raise StopError

    with pytest.raises(StopError):
        build_store(rows, tmp_path / "store", PROCESSOR, num_workers=0, on_outcome=stop)
    report = build_store(rows, tmp_path / "store", PROCESSOR, num_workers=0)
    assert (report.num_added, report.num_present) == (7, 5)
    assert len(VolumeStore(tmp_path / "store")) == 12


def test_a_killed_worker_costs_nothing_but_time(cluster, rows, tmp_path):
    """One worker process is killed as the first volume arrives; what it held is done by others, once."""
    with cluster.get_client() as client:
        processes = client.run(os.getpid)
    victim = sorted(processes.values())[0]

    def kill(outcome, done=[]):  # noqa: B006 - kills once
        if not done:
            os.kill(victim, signal.SIGKILL)
            done.append(victim)

    store = tmp_path / "store"
    report = build_store(rows, store, PROCESSOR, scheduler=cluster.scheduler_address, on_outcome=kill)
    assert sorted(report.keys) == [row.number for row in rows]
    assert report.num_added + report.num_present == 12
    assert report.unreadable == []
    assert files_of(store) == sorted(f"{key}.t3d" for key in report.keys.values()), "no copy, no partial file"
    opened = VolumeStore(store)
    for key in report.keys.values():
        opened.verify(key)
    with cluster.get_client() as client:
        assert victim not in client.run(os.getpid).values()


def test_workers_need_only_the_addresses(cluster, folder, rows, tmp_path):
    """Volumes are fetched by address and kept nowhere; the second build fetches none of them."""
    addresses = addresses_below(folder / "manifest.csv", rows, f"file://{folder}")
    outcomes = []
    arguments = {
        "scheduler": cluster.scheduler_address,
        "addresses": addresses,
        "on_outcome": outcomes.append,
    }
    first = build_store(rows, f"file://{tmp_path}/store", PROCESSOR, **arguments)
    assert first.num_added == 12
    assert all(outcome.task.source.startswith("file://") for outcome in outcomes)
    assert first.keys == build_store(rows, tmp_path / "other", PROCESSOR, num_workers=0).keys
    second = build_store(rows, f"file://{tmp_path}/store", PROCESSOR, **arguments)
    assert second.num_present == 12
    with pytest.raises(BuildError, match="does not lie below the manifest's folder"):
        addresses_below(tmp_path / "manifest.csv", rows, "s3://bucket")


def test_a_damaged_memory_of_a_far_volume_prepares_no_second_one(folder, rows, tmp_path):
    addresses = addresses_below(folder / "manifest.csv", rows[:1], f"file://{folder}")
    arguments = {"num_workers": 0, "addresses": addresses}
    first = build_store(rows[:1], tmp_path / "store", PROCESSOR, **arguments)
    (path,) = (tmp_path / "store" / "sources").iterdir()
    known = json.loads(path.read_text())
    digit = "0" if known["content"][-1] != "0" else "1"
    path.write_text(json.dumps({**known, "content": known["content"][:-1] + digit}))
    second = build_store(rows[:1], tmp_path / "store", PROCESSOR, **arguments)
    assert (second.num_added, second.keys) == (0, first.keys)
    assert len(files_of(tmp_path / "store")) == 1
    assert json.loads(path.read_text()) == known


def test_a_volume_that_kills_its_workers_is_quarantined(cluster, rows, tmp_path):
    """A worker that dies with every volume it is given would never finish; the volume is named instead."""
    report = build_store(
        rows[:2],
        tmp_path / "store",
        DeadlyProcessor(PROCESSOR, rows[0].volume.name),
        scheduler=cluster.scheduler_address,
        max_unreadable=1,
    )
    assert list(report.keys) == [2]
    assert "every worker that prepared it died" in report.unreadable[0].reason


@pytest.mark.slow
def test_of_volumes_that_go_together_the_deadly_one_alone_is_quarantined(cluster, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_BUNDLES_PER_THREAD", 1)
    rows, bundles = rows[:4], []
    monkeypatch.setattr(build, "bundled", lambda *arguments: bundles.extend(bundled(*arguments)) or bundles)
    report = build_store(
        rows,
        tmp_path / "store",
        DeadlyProcessor(PROCESSOR, rows[3].volume.name),
        scheduler=cluster.scheduler_address,
        max_unreadable=1,
    )
    assert len(bundles) < len(rows), "volumes went together"
    assert [outcome.task.number for outcome in report.unreadable] == [rows[3].number]
    assert sorted(report.keys) == [row.number for row in rows if row is not rows[3]]
    assert files_of(tmp_path / "store") == sorted(f"{key}.t3d" for key in report.keys.values())


def test_small_volumes_go_to_workers_together(cluster, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_BUNDLES_PER_THREAD", 1)
    outcomes = []
    report = build_store(
        rows, tmp_path / "store", PROCESSOR, scheduler=cluster.scheduler_address, on_outcome=outcomes.append
    )
    assert report.num_added == 12
    assert len(outcomes) == 12
    assert report.keys == build_store(rows, tmp_path / "other", PROCESSOR, num_workers=0).keys


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 20 << 20), max_size=60), most=st.integers(1, 20))
def test_small_volumes_make_bundles_and_large_ones_stay_alone(sizes, most):
    tasks = [PreparationTask(number, "x", None, size) for number, size in enumerate(sorted(sizes, reverse=True))]
    bundles = list(bundled(tasks, most))
    assert [task for bundle in bundles for task in bundle] == tasks
    assert all(len(bundle) <= most for bundle in bundles)
    assert all(len(bundle) == 1 or sum(task.size for task in bundle) <= 16 << 20 for bundle in bundles)
    for one, other in itertools.pairwise(bundles):
        assert len(one) == most or sum(task.size for task in [*one, other[0]]) > 16 << 20, "as few as possible"


class DeadlyProcessor:
    """An image processor whose process dies, as for lack of memory, with one of the volumes."""

    def __init__(self, image_processor, name: str) -> None:
        self.image_processor = image_processor
        self.name = name

    def preparation_key(self):
        return self.image_processor.preparation_key()

    def prepare(self, source):
        if Path(source).name == self.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.image_processor.prepare(source)


def broken_rows(tmp_path: Path, count: int) -> list:
    records = [{"volume": write_volume(tmp_path / "good.nii", scan(12, 0)), "report": REPORT}]
    for number in range(count):
        (tmp_path / f"bad{number}.nii").write_bytes(b"\0" * 400)
        records.append({"volume": tmp_path / f"bad{number}.nii", "report": REPORT})
    return read_manifest(write_records(records, tmp_path / "manifest.csv")).rows


def test_unreadable_volumes_are_listed(tmp_path):
    rows = broken_rows(tmp_path, 2)
    rows[1].volume.unlink()
    quarantine = tmp_path / "out" / "quarantine.csv"
    report = build_store(rows, tmp_path / "store", PROCESSOR, num_workers=0, max_unreadable=2, quarantine=quarantine)
    assert list(report.keys) == [1]
    with quarantine.open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [(line["row"], Path(line["volume"]).name) for line in listed] == [("2", "bad0.nii"), ("3", "bad1.nii")]
    assert "no such file or folder" in listed[0]["reason"]
    assert "bad1.nii" in listed[1]["reason"]
    assert "2 volumes could not be read and are quarantined" in report.describe()


def test_too_many_unreadable_volumes_stop_the_build(tmp_path):
    rows = broken_rows(tmp_path, 4)
    quarantine = tmp_path / "quarantine.csv"
    with pytest.raises(BuildError, match=r"2 of 5 volumes could not be read, max_unreadable allows 1 \(row \d: "):
        build_store(rows, tmp_path / "store", PROCESSOR, num_workers=0, quarantine=quarantine)
    assert len(quarantine.read_text().splitlines()) == 3, "the list is written all the same"
    with pytest.raises(BuildError, match="max_unreadable allows 0"):
        build_store(rows, tmp_path / "store", PROCESSOR, num_workers=0, max_unreadable=0)


def test_a_store_in_trouble_is_no_fault_of_a_volume(rows, tmp_path):
    store = tmp_path / "store"
    VolumeStore.create(store, PROCESSOR)
    (store / "volumes").write_text("not a folder")
    with pytest.raises(OSError, match="volumes"):
        build_store(rows, store, PROCESSOR, num_workers=0, max_unreadable=100)


def test_no_scheduler(rows, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(build, "_CONNECT", 1)
    with pytest.raises(BuildError, match=r"tcp://127\.0\.0\.1:9: no Dask scheduler answers"):
        build_store(rows, tmp_path / "store", PROCESSOR, scheduler="tcp://127.0.0.1:9")


def test_rescaled_volumes_have_keys_of_their_own(tmp_path):
    stored = (scan(12, 0) + 1024).astype(np.int16)
    volume = write_volume(tmp_path / "a.nii", stored)
    record = {"volume": volume, "report": REPORT, "rescale": [1, -1024]}
    rows = read_manifest(write_records([record], tmp_path / "manifest.jsonl")).rows
    report = build_store(rows, tmp_path / "store", PROCESSOR, num_workers=0)
    store = VolumeStore(tmp_path / "store")
    assert report.keys[1] == rescaled_key(store.key_of(volume), (1.0, -1024.0)) != store.key_of(volume)
    right = write_volume(tmp_path / "right.nii", scan(12, 0))
    np.testing.assert_array_equal(store.read(report.keys[1]).array, PROCESSOR.prepare(right).array)
    assert "1 volumes: rescaled by 1 and -1024" in report.describe()


def test_the_stored_manifest_is_read_where_no_mask_is(tmp_path):
    """Training opens none; the manifest of the sources keeps them."""
    for name in ("a", "b"):
        write_volume(tmp_path / f"{name}.nii", scan(12, ord(name)))
        write_volume(tmp_path / f"{name}-mask.nii", np.ones((12, 24, 24), dtype=np.uint8))
    manifest = tmp_path / "manifest.csv"
    rows = f'a.nii,{REPORT},a-mask.nii,1\nb.nii,{REPORT} b,"{{""m"": ""b-mask.nii""}}",0\n'
    manifest.write_text(f"volume,report,masks,label:nodule\n{rows}")
    report = build_store(read_manifest(manifest).rows, tmp_path / "store", PROCESSOR, num_workers=0)
    stored = tmp_path / "elsewhere" / "stored.csv"
    write_stored_manifest(manifest, report, stored)
    for file in tmp_path.glob("*.nii"):
        file.unlink()
    rows = read_manifest(stored).rows
    assert [(row.masks, row.labels["nodule"]) for row in rows] == [({}, 1), ({}, 0)]


def test_training_reads_the_stored_manifest_without_the_volumes(tmp_path):
    records = [
        {"volume": write_volume(tmp_path / f"{n}.nii", scan(12, n)), "report": f"{REPORT} {n}"} for n in (0, 0, 1)
    ]
    for number, record in enumerate(records):
        record["volume"] = record["volume"].rename(tmp_path / f"renamed{number}.nii") if number != 1 else None
    (tmp_path / "copy.nii").write_bytes((tmp_path / "renamed0.nii").read_bytes())
    records[1]["volume"] = tmp_path / "copy.nii"
    manifest = write_records(records, tmp_path / "manifest.parquet")
    report = build_store(read_manifest(manifest).rows, tmp_path / "store", PROCESSOR, num_workers=0)
    stored = tmp_path / "elsewhere" / "stored.parquet"
    assert write_stored_manifest(manifest, report, stored) == 1, "the copy holds the same volume"
    leaking = write_records(
        [record | {"split": split} for record, split in zip(records, "aba", strict=True)], tmp_path / "l.csv"
    )
    with pytest.raises(BuildError, match=r"rows 1 \('a'\) and 2 \('b'\) hold the same volume"):
        write_stored_manifest(leaking, report, stored)
    expected = PROCESSOR.prepare(tmp_path / "renamed2.nii").array
    for file in tmp_path.glob("*.nii"):
        file.unlink()
    dataset = PretrainingDataset(read_manifest(stored).rows, PROCESSOR, store=tmp_path / "store")
    assert [row.report for row in dataset.rows] == [records[0]["report"], records[2]["report"]]
    np.testing.assert_array_equal(np.asarray(dataset[1].prepared.array), expected)
