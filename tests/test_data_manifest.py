# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A manifest is read as written, and everything wrong with one is refused with the row and the remedy."""

import csv
import json
import unicodedata
from pathlib import Path

import pytest

from modeling_t3d.data.manifest import ManifestError, read_manifest
from modeling_t3d.data.manifest_files import read_records, write_records

REPORT = "The heart is of normal size."


def write(folder: Path, rows: list[dict], name: str = "manifest.csv", files: bool = True) -> Path:
    """A manifest of `rows`; each named volume becomes an empty file."""
    path = folder / name
    if files:
        for row in rows:
            if row.get("volume"):
                (folder / row["volume"]).touch()
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow = pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.jsonl", "manifest.parquet"])
def test_reads_every_column(tmp_path, name):
    (tmp_path / "m.nii.gz").touch()
    as_json = not name.endswith("csv")
    labels, masks = {"nodule": 1, "cyst": 0, "stone": None}, {"nodule": "m.nii.gz"}
    rows = [
        {
            "volume": "a.nii.gz",
            "findings": 'A nodule, 8 mm, in the "left" lung.',
            "impression": "Nodule.",
            "patient_id": "p1",
            "study_id": "s1",
            "reconstruction": "lung",
            "split": "validation",
            "labels": labels if as_json else json.dumps(labels),
            "masks": masks if as_json else json.dumps(masks),
            "label:effusion": "1",
            "rescale": [1.0, -1024.0] if as_json else "[1, -1024]",
            "key": "0" * 40,
        },
        {"volume": "b.nii.gz", "findings": REPORT, "impression": "", "patient_id": "p2", "study_id": "s1"},
    ]
    manifest = read_manifest(write(tmp_path, rows, name))
    first, second = manifest.rows
    assert first.report == 'A nodule, 8 mm, in the "left" lung. Nodule.'
    assert first.labels == {"nodule": 1, "cyst": 0, "stone": None, "effusion": 1}
    assert first.masks == {"nodule": tmp_path / "m.nii.gz"}
    assert (first.volume, first.split, first.reconstruction) == (tmp_path / "a.nii.gz", "validation", "lung")
    assert (first.rescale, first.key) == ((1.0, -1024.0), "0" * 40)
    assert (second.rescale, second.key, second.masks) == (None, None, {})
    assert second.split == "train"
    assert second.report == REPORT
    assert first.study_id != second.study_id, "the same study number of two patients names two studies"
    assert manifest.split_sizes() == {"validation": 1, "train": 1}
    assert "nodule" in manifest.label_names()


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_what_is_written_is_read(tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    elsewhere = tmp_path / "elsewhere" / "b.nii.gz"
    elsewhere.parent.mkdir()
    for file in (tmp_path / "out" / "a.nii.gz", tmp_path / "out" / "m.nii.gz", elsewhere):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    text = 'A nodule, 8 mm, in the "left" lung.\nNothing else; größer.'
    records = [
        {"volume": tmp_path / "out" / "a.nii.gz", "findings": text, "labels": {"nodule": 1, "cyst": None}},
        {"volume": elsewhere, "report": REPORT, "masks": {"lung": tmp_path / "out" / "m.nii.gz"}, "rescale": (2, -9)},
    ]
    path = write_records(records, tmp_path / "out" / name)
    first, second = read_manifest(path).rows
    assert (first.report, first.labels) == (text, {"nodule": 1, "cyst": None})
    assert read_records(path)[0][0][1]["volume"] == "a.nii.gz", "below the manifest: relative"
    assert second.volume == elsewhere
    assert (second.masks, second.rescale) == ({"lung": tmp_path / "out" / "m.nii.gz"}, (2.0, -9.0))
    assert [file.name for file in path.parent.iterdir() if "temporary" in file.name] == []


def test_wrong_files_are_not_written(tmp_path):
    with pytest.raises(ManifestError, match=r"a manifest is a \.csv, \.jsonl or \.parquet file; name it so"):
        write_records([GOOD], tmp_path / "a.xlsx")
    with pytest.raises(ManifestError, match="no rows to write"):
        write_records([], tmp_path / "a.csv")


@pytest.mark.parametrize(("sections", "text"), [("both", "A b c d e. F g h i j."), ("impression", "F g h i j.")])
def test_sections(tmp_path, sections, text):
    rows = [{"volume": "a.nii", "findings": "A b c d e.", "impression": "F g h i j."}]
    assert read_manifest(write(tmp_path, rows), sections=sections).rows[0].report == text


def test_absolute_paths_and_byte_order_mark(tmp_path):
    volume = tmp_path / "a.nii"
    volume.touch()
    path = tmp_path / "manifest.csv"
    path.write_text(f"volume,report\n{volume},{REPORT}\n", encoding="utf-8-sig")
    assert read_manifest(path).rows[0].volume == volume


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.jsonl", "manifest.parquet"])
def test_nan_is_an_empty_cell(tmp_path, name):
    nan = float("nan")
    gaps = {"findings": nan, "patient_id": nan, "study_id": nan, "label:cyst": nan, "rescale": nan, "key": nan}
    rows = [
        {"volume": "a.nii", "impression": REPORT, "split": "train", **gaps},
        {"volume": "b.nii", "impression": REPORT, "split": "test", **gaps},
    ]
    manifest = read_manifest(write(tmp_path, rows, name))
    first, second = manifest.rows
    assert (first.report, first.labels, first.rescale, first.key) == (REPORT, {"cyst": None}, None, None)
    assert (first.patient_id, second.patient_id) == ("a.nii", "b.nii"), "nobody's volumes are not one patient's"
    assert manifest.notes == ["no patient_id: whether the splits share patients could not be checked"]
    (tmp_path / "b.nii").unlink()
    with pytest.raises(ManifestError, match=r"row 2: the volume 'b\.nii' is missing"):
        read_manifest(tmp_path / name)


def test_nan_is_written_as_an_empty_cell(tmp_path):
    record = {"volume": "a.nii", "report": REPORT, "patient_id": float("nan"), "labels": {"cyst": float("nan")}}
    path = write_records([record], tmp_path / "a.csv")
    assert read_records(path)[0][0][1] == {**record, "patient_id": "", "labels": '{"cyst": null}'}


@pytest.mark.parametrize("column", ["patient_id", "study_id"])
@pytest.mark.parametrize(("one", "other"), [(12, 12.0), ("12", 12.0), ("M\u00fcller", "Mu\u0308ller")])
def test_an_id_written_in_two_ways_is_one(tmp_path, column, one, other):
    rows = [{**GOOD, column: one, "split": "train"}, {**OTHER, column: other, "split": "test"}]
    path = write(tmp_path, rows, "manifest.jsonl")
    with pytest.raises(ManifestError, match=r"are one patient's"):
        read_manifest(path)


def test_reconstructions_are_compared_in_one_form(tmp_path):
    rows = [{**GOOD, "reconstruction": unicodedata.normalize("NFD", "weich für Mediastinum")}]
    assert read_manifest(write(tmp_path, rows)).rows[0].reconstruction == "weich f\u00fcr Mediastinum"


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.jsonl", "manifest.parquet"])
def test_masks_without_a_path_are_no_masks(tmp_path, name):
    (tmp_path / "m.nii").touch()
    masks = {"lesions": None, "organs": "", "ribs": float("nan"), "lung": "m.nii"}
    if name.endswith("parquet"):
        masks["ribs"] = None  # a column of an Arrow table has one type
    cell = json.dumps(masks) if name.endswith("csv") else masks
    row = read_manifest(write(tmp_path, [{**GOOD, "masks": cell}], name)).rows[0]
    assert row.masks == {"lung": tmp_path / "m.nii"}


def test_short_reports_are_dropped_and_counted(tmp_path):
    rows = [{"volume": "a.nii", "report": REPORT}, {"volume": "b.nii", "report": "No change."}]
    manifest = read_manifest(write(tmp_path, rows))
    assert [row.number for row in manifest.rows] == [1]
    assert manifest.dropped_short == [2]
    assert "dropped 1 rows whose report has fewer than 5 words: rows 2" in manifest.describe()
    assert len(read_manifest(write(tmp_path, rows), min_report_words=2).rows) == 2


def test_labels_without_reports(tmp_path):
    rows = [{"volume": "a.nii", "label:nodule": 1}]
    with pytest.raises(ManifestError, match=r"row 1: no text in findings, impression or report"):
        read_manifest(write(tmp_path, rows))
    assert read_manifest(write(tmp_path, rows), require_report=False).rows[0].labels == {"nodule": 1}


@pytest.mark.parametrize("name", ["scanner", "patient_age", "patient_dob", "study_date", "study_time", "report_id"])
def test_unread_columns_are_named(tmp_path, name):
    manifest = read_manifest(write(tmp_path, [{"volume": "a.nii", "findings": REPORT, name: "x"}]))
    assert f"columns that are not read: {name}" in manifest.describe()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("PatientID", "patient_id"),
        ("patient", "patient_id"),
        ("study_uid", "study_id"),
        ("reports", "report"),
        ("Label:effusion", "label:effusion"),
        ("labels: effusion", "label:effusion"),
    ],
)
def test_misspelt_columns_are_refused(tmp_path, name, meant):
    with pytest.raises(ManifestError, match=rf"unknown column '{name}'; rename it to '{meant}'"):
        read_manifest(write(tmp_path, [{"volume": "a.nii", "findings": REPORT, name: "x"}]))


GOOD = {"volume": "a.nii", "report": REPORT}
OTHER = {"volume": "b.nii", "report": REPORT}
LONG = f"{REPORT} " * 200  # nothing that a file can be called
WRONG = {
    "no volume column": ([{"path": "a.nii", "report": REPORT}], r"no column 'volume'"),
    "misspelt column": ([{**GOOD, "patientid": "1"}], r"unknown column 'patientid'; rename it to 'patient_id'"),
    "empty volume": ([GOOD, {"volume": "", "report": REPORT}], r"row 2 names no volume"),
    "missing report": ([GOOD, {**OTHER, "report": " "}], r"row 2: no text in .* add it or remove the row"),
    "only short reports": ([{**GOOD, "report": "Normal."}], r"every report has fewer than 5 words; lower"),
    "duplicate": ([GOOD, {**GOOD, "volume": "./a.nii"}], r"rows 1 and 2 name the same volume; remove one"),
    "leak": (
        [{**GOOD, "patient_id": "7", "split": "train"}, {**OTHER, "patient_id": "7", "split": "test"}],
        r"rows 1 \('train'\) and 2 \('test'\) are one patient's; put all volumes of a patient into one split",
    ),
    "leak by study": (
        [{**GOOD, "study_id": "7", "split": "train"}, {**OTHER, "study_id": "7", "split": "test"}],
        r"are one patient's",
    ),
    "leak by a study without a patient": (
        [{**GOOD, "patient_id": "7", "study_id": "s", "split": "train"}, {**OTHER, "study_id": "s", "split": "test"}],
        r"rows 2 \('test'\) and 1 \('train'\) name one study, and one of them no patient; fill its 'patient_id' cell",
    ),
    "label value": ([{**GOOD, "label:cyst": "maybe"}], r"row 1: label 'cyst' is 'maybe'; write 1, 0 or nothing"),
    "labels not JSON": ([{**GOOD, "labels": "nodule"}], r"row 1: labels is not a JSON object"),
    "rescale": ([{**GOOD, "rescale": "[0, 1]"}], r"row 1: rescale is not two numbers; write \[slope, intercept\]"),
    "rescale text": ([{**GOOD, "rescale": "1"}], r"row 1: rescale is not two numbers"),
    "volume a report": ([GOOD, {"volume": LONG, "report": REPORT}], r"row 2: its 'volume' cell holds a text that is"),
    "volume of lines": ([{"volume": "a.\nb.", "report": REPORT}], r"row 1: its 'volume' cell .* write a file's path"),
    "volume of parts": ([{"volume": LONG.replace(" ", "/"), "report": REPORT}], r"row 1: its 'volume' cell holds"),
    "mask a report": ([{**GOOD, "masks": LONG}], r"row 1: its 'masks' cell holds a text that is no path"),
    "missing mask": ([{**GOOD, "masks": "gone.nii"}], r"row 1: the mask 'mask' is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_manifests_are_refused(tmp_path, case):
    rows, message = WRONG[case]
    for name in {row["volume"] for row in rows if row.get("volume")} & {"a.nii", "./a.nii", "b.nii"}:
        (tmp_path / name).touch()
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(write(tmp_path, rows, files=False))
    assert "\n" not in str(caught.value)
    assert REPORT not in str(caught.value)


@pytest.mark.parametrize("volume", [r"a\u0000", r"\ud800"])  # a NUL; half of a surrogate pair
def test_characters_that_no_path_has_are_refused(tmp_path, volume):
    (tmp_path / "manifest.jsonl").write_text(f'{{"volume": "{volume}", "report": "{REPORT}"}}\n')
    with pytest.raises(ManifestError, match=r"row 1: its 'volume' cell holds a text that is no path"):
        read_manifest(tmp_path / "manifest.jsonl", check_files=False)


def test_missing_files_are_named(tmp_path):
    path = write(tmp_path, [{"volume": f"{name}.nii", "report": REPORT} for name in "abc"], files=False)
    (tmp_path / "a.nii").touch()
    with pytest.raises(ManifestError, match=r"row 2: the volume 'b\.nii' is missing \(so are rows 3\); paths are"):
        read_manifest(path)
    assert len(read_manifest(path, check_files=False).rows) == 3


def test_a_single_section_must_exist(tmp_path):
    with pytest.raises(ManifestError, match=r"no column 'impression'.* use sections='both'"):
        read_manifest(write(tmp_path, [GOOD]), sections="impression")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "volume,report\na.nii,one, two\n", r"row 1 has other than 2 cells; quote texts"),
        ("a.parquet", "volume,report\n", r"is not readable Parquet"),
        ("a.csv", "volume,volume\na,b\n", r"column 'volume' stands twice"),
        ("a.csv", "volume,report\n", r"no rows"),
        ("a.jsonl", '{"volume": "a"}\n{oops}\n', r"row 2 is not JSON"),
        ("a.jsonl", "[1]\n", r"row 1 is not a JSON object"),
        ("a.csv", "volume;report\na.nii;Heart, lungs and bones.\n", r"are separated by semicolons; separate them by"),
        ("a.csv", '"report";"volume"\n"Heart.";"a.nii"\n', r"are separated by semicolons"),
        ("a.csv", "volume\treport\na.nii\tHeart, lungs.\n", r"are separated by tabs; separate them by commas"),
        ("a.txt", "", r"a manifest is a \.csv, \.jsonl or \.parquet file"),
    ],
)
def test_wrong_syntax_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path / name)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "volume,report\na.nii,Der Herzschatten ist normal groß.\n"),
        ("a.jsonl", '{"volume": "a.nii", "report": "Der Herzschatten ist normal groß."}\n'),
    ],
)
def test_other_encodings_are_refused(tmp_path, name, content, encoding):
    (tmp_path / name).write_text(content, encoding=encoding)
    with pytest.raises(ManifestError, match=rf"{name}: is not UTF-8; save it as UTF-8"):
        read_manifest(tmp_path / name)


def test_missing_manifest(tmp_path):
    with pytest.raises(ManifestError, match=r"no such manifest"):
        read_manifest(tmp_path / "manifest.csv")


def test_missing_split_names_those_that_exist(tmp_path):
    with pytest.raises(ManifestError, match=r"no row of split 'test'; the splits are 'train' \(1\)"):
        read_manifest(write(tmp_path, [GOOD])).split("test")
