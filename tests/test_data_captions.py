# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Captions go into a manifest whole or not at all, continue where they stopped, and leave reports alone."""

import csv
import json
from pathlib import Path

import pytest

from modeling_t3d.data.captions import CaptionError, write_captions
from modeling_t3d.data.manifest import read_manifest
from modeling_t3d.data.manifest_files import ManifestError, read_records


class Numbered:
    """A source that counts its calls and may fail at one of them."""

    def __init__(self, fails_at: int | None = None, text: str = "Volume {} shows nothing unusual."):
        self.calls: list[int] = []
        self.fails_at = fails_at
        self.text = text

    def settings(self) -> dict:
        return {"source": "numbered", "text": self.text}

    def __call__(self, row, record) -> str:
        if row.number == self.fails_at:
            raise CaptionError(f"row {row.number}: fails")
        self.calls.append(row.number)
        return self.text.format(record["volume"])


@pytest.fixture
def manifest(tmp_path) -> Path:
    for name in ("a", "b", "c", "mask"):
        (tmp_path / f"{name}.nii.gz").write_bytes(b"")
    path = tmp_path / "in" / "manifest.csv"
    path.parent.mkdir()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["volume", "findings", "impression", "patient_id", "masks", "label:nodule", "site"])
        writer.writerow(["../a.nii.gz", "", "", "p1", "../mask.nii.gz", "1", "x"])
        writer.writerow(["../b.nii.gz", "The heart is of normal size.", "No effusion.", "p2", "", "0", "y"])
        writer.writerow(["../c.nii.gz", "", "", "p3", '{"organs": "../mask.nii.gz"}', "", "z"])
    return path


def test_rows_without_text_get_captions_and_the_rest_stays(manifest, tmp_path):
    source, output = Numbered(), tmp_path / "out" / "captions.csv"
    report = write_captions(manifest, output, source)
    assert (report.path, report.num_written, report.num_kept, report.num_resumed) == (output, 2, 1, 0)
    rows = read_manifest(output).rows
    assert [row.report for row in rows] == [
        "Volume ../a.nii.gz shows nothing unusual.",
        "The heart is of normal size. No effusion.",
        "Volume ../c.nii.gz shows nothing unusual.",
    ]
    before = read_manifest(manifest, require_report=False).rows
    for old, new in zip(before, rows, strict=True):
        assert new.volume.resolve() == old.volume.resolve()
        assert {name: mask.resolve() for name, mask in new.masks.items()} == {
            name: mask.resolve() for name, mask in old.masks.items()
        }
        assert (new.patient_id, new.labels) == (old.patient_id, old.labels)
    assert [record["site"] for _, record in read_records(output)[0]] == ["x", "y", "z"]


def test_an_interrupted_run_is_finished_without_doing_anything_twice(manifest, tmp_path):
    output = tmp_path / "captions.jsonl"
    first, second = Numbered(fails_at=3), Numbered()
    with pytest.raises(CaptionError, match="row 3: fails"):
        write_captions(manifest, output, first)
    assert not output.exists()
    report = write_captions(manifest, output, second)
    assert (first.calls, second.calls) == ([1], [3])
    assert (report.num_written, report.num_resumed) == (2, 1)
    whole = tmp_path / "whole.jsonl"
    write_captions(manifest, whole, Numbered())
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_line_of_a_killed_run_is_no_caption(manifest, tmp_path, cut):
    output = tmp_path / "captions.csv"
    write_captions(manifest, output, Numbered())
    expected = output.read_bytes()
    journal = tmp_path / "captions.csv.captions.jsonl"
    complete = journal.read_bytes()
    journal.write_bytes(complete[:-cut])
    source = Numbered()
    write_captions(manifest, output, source)
    assert source.calls == [3]
    assert output.read_bytes() == expected
    assert journal.read_bytes() == complete


def test_captions_of_other_settings_are_not_mixed(manifest, tmp_path):
    output = tmp_path / "captions.csv"
    write_captions(manifest, output, Numbered())
    with pytest.raises(CaptionError, match=r"captions\.csv\.captions\.jsonl: holds captions made with other settings"):
        write_captions(manifest, output, Numbered(text="Another text about {}, just as long."))


def test_a_changed_row_is_captioned_anew(manifest, tmp_path):
    output = tmp_path / "captions.csv"
    write_captions(manifest, output, Numbered())
    manifest.write_text(
        manifest.read_text().replace("../c.nii.gz", "../b.nii.gz", 1).replace("../b.nii.gz,The", "../c.nii.gz,The")
    )
    source = Numbered()
    write_captions(manifest, output, source)
    assert source.calls == [3]


def test_reports_are_replaced_only_when_asked(manifest, tmp_path):
    output = tmp_path / "captions.csv"
    report = write_captions(manifest, output, Numbered(), overwrite=True)
    assert (report.num_written, report.num_kept) == (3, 0)
    assert read_manifest(output).rows[1].report == "Volume ../b.nii.gz shows nothing unusual."


def test_a_format_that_is_none_is_refused_before_the_first_caption(manifest, tmp_path):
    source = Numbered()
    with pytest.raises(ManifestError, match=r"captions\.txt: a manifest is a \.csv"):
        write_captions(manifest, tmp_path / "captions.txt", source)
    assert source.calls == []


@pytest.mark.parametrize("name", ["a", "mask"])
def test_a_row_whose_files_changed_is_captioned_anew(manifest, tmp_path, name):
    output = tmp_path / "captions.csv"
    write_captions(manifest, output, Numbered())
    again = Numbered()
    write_captions(manifest, output, again)
    assert again.calls == []
    (tmp_path / f"{name}.nii.gz").write_bytes(b"other")
    write_captions(manifest, output, again)
    assert again.calls == ([1] if name == "a" else [1, 3])


def test_the_journal_names_nobody(manifest, tmp_path):
    write_captions(manifest, tmp_path / "captions.csv", Numbered(text="A caption."))
    lines = (tmp_path / "captions.csv.captions.jsonl").read_text().splitlines()
    assert [json.loads(line)["caption"] for line in lines[1:]] == ["A caption.", "A caption."]
    assert "p1" not in "".join(lines)
    assert "a.nii" not in "".join(lines)


def test_what_cannot_be_written_is_refused(manifest, tmp_path):
    with pytest.raises(CaptionError, match=r"manifest\.csv: is the manifest that is read; choose another output"):
        write_captions(manifest, manifest, Numbered())
    with pytest.raises(CaptionError, match="row 1: the source wrote nothing"):
        write_captions(manifest, tmp_path / "empty.csv", Numbered(text=" \n "))
    manifest.write_text("volume\n")
    with pytest.raises(ManifestError, match="no rows"):
        write_captions(manifest, tmp_path / "none.csv", Numbered())


def test_rows_without_text_are_told_of_captions(manifest):
    with pytest.raises(ManifestError, match=r"rows 1, 3: no text .* have examples/generate_captions\.py write it"):
        read_manifest(manifest)
