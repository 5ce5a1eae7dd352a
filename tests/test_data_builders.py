# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Small folders, laid out as the releases are, become manifests; what is missing or different is named."""

import csv
import io
import itertools
import zipfile
from pathlib import Path

import numpy as np
import pytest

from modeling_t3d.data.builders import BUILDERS, LayoutError, assign_splits, build_records, read_rad_chestct
from modeling_t3d.data.manifest import read_manifest
from modeling_t3d.data.manifest_files import write_records
from modeling_t3d.data.sources import open_source
from modeling_t3d.geometry_t3d import VolumeIntensityError, VolumeReadError
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.volume_io_t3d import to_volume, write_nifti

PROCESSOR = T3DImageProcessor(spacing=(3, 3, 3), global_size=(16, 16, 16), local_size=(8, 8, 8))
FINDINGS = "The lungs are clear and the heart is of normal size."


def table(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def body() -> np.ndarray:
    """HU of a box of tissue with a bright corner (so that orientation shows) in air, axes (z, y, x)."""
    array = np.full((20, 24, 24), -1000, dtype=np.int16)
    array[:, 4:20, 4:20] = 40
    array[12:18, 14:19, 6:12] = 300  # superior, anterior, left of the middle
    return array


def names(records: list[dict]) -> list[str]:
    return [record["volume"].name for record in records]


# ---------------------------------------------------------------------------------------------- CT-RATE


def make_ct_rate(root: Path, fixed: bool = True) -> Path:
    """Two studies of one patient, one of them in two reconstructions, and a held-out study."""
    data = root / "dataset"
    volumes = ["train_1_a_1", "train_1_a_2", "train_1_b_1", "train_2_a_1", "train_3_a_1"]
    for name in volumes[:4]:
        patient, study = "_".join(name.split("_")[:2]), name.rsplit("_", 1)[0]
        touch(data / ("train_fixed" if fixed else "train") / patient / study / f"{name}.nii.gz")
    touch(data / ("valid_fixed" if fixed else "valid") / "valid_1" / "valid_1_a" / "valid_1_a_1.nii.gz")
    for split, folder, found in (("train", "train", volumes), ("validation", "valid", ["valid_1_a_1"])):
        texts = {"ClinicalInformation_EN": "Not given.", "Technique_EN": "CT.", "Findings_EN": FINDINGS}
        reports = [{"VolumeName": f"{name}.nii.gz", **texts, "Impressions_EN": "Not given."} for name in found]
        table(data / "radiology_text_reports" / f"{split}_reports.csv", reports)
        labels = [{"VolumeName": f"{name}.nii.gz", "Medical material": 0, "Lung nodule": 1} for name in found]
        table(data / "multi_abnormality_labels" / f"{folder}_predicted_labels.csv", labels)
        facts = [
            {"VolumeName": f"{name}.nii.gz", "RescaleIntercept": "-1024", "RescaleSlope": "1", "ZSpacing": "1.5"}
            for name in found
        ]
        table(data / "metadata" / f"{split}_metadata.csv", facts)
    (data / "metadata" / "no_chest_train.txt").write_text("train_2_a_1.nii.gz\n")
    return root


def test_ct_rate(tmp_path):
    release = build_records("ct-rate", make_ct_rate(tmp_path))
    assert names(release.records) == [
        f"{n}.nii.gz" for n in ("train_1_a_1", "train_1_a_2", "train_1_b_1", "valid_1_a_1")
    ]
    first = release.records[0]
    assert (first["patient_id"], first["study_id"], first["reconstruction"]) == ("train_1", "train_1_a", "1")
    assert (first["findings"], first["impression"]) == (FINDINGS, "")
    assert first["labels"] == {"Medical material": 0, "Lung nodule": 1}
    assert [record["split"] for record in release.records] == ["train"] * 3 + ["validation"]
    assert "rescale" not in first
    assert "1 reports of the split train have no volume here and were left out" in release.notes
    assert "1 volumes of the split train show no chest and were left out" in release.notes
    assert build_records("ct-rate", tmp_path / "dataset").records == release.records, "the inner folder does as well"


def test_ct_rate_volumes_without_a_report_are_counted(tmp_path):
    make_ct_rate(tmp_path)
    touch(tmp_path / "dataset" / "train_fixed" / "train_9" / "train_9_a" / "train_9_a_1.nii.gz")
    assert "1 volumes of the split train have no report and were left out" in build_records("ct-rate", tmp_path).notes


def test_ct_rate_v1_takes_its_rescale_from_the_table_on_request_alone(tmp_path):
    make_ct_rate(tmp_path, fixed=False)
    release = build_records("ct-rate", tmp_path)
    assert all("rescale" not in record for record in release.records)
    assert "csv_rescale takes it from the metadata table" in release.notes[0]
    records = build_records("ct-rate", tmp_path, csv_rescale=True).records
    assert [record["rescale"] for record in records] == [[1.0, -1024.0]] * 4
    hounsfield = to_volume(body(), spacing=(3, 3, 3), axes="SAR")
    stored = to_volume((body() + 1024).astype(np.int16), spacing=(3, 3, 3), axes="SAR")
    right = tmp_path / "v2.nii.gz"
    write_nifti(hounsfield, right)
    write_nifti(stored, records[0]["volume"])  # the header lacks the rescale
    path = write_records(records, tmp_path / "manifest.csv")
    row = read_manifest(path).rows[0]
    with pytest.raises(VolumeIntensityError, match="not HU"):
        PROCESSOR.prepare(open_source(row.volume))
    prepared = PROCESSOR.prepare(open_source(row.volume, row.rescale))
    np.testing.assert_array_equal(prepared.array, PROCESSOR.prepare(right).array)
    assert any("rescaled by 1 and -1024" in warning for warning in prepared.warnings)


def test_ct_rate_v2_is_never_rescaled_twice(tmp_path):
    make_ct_rate(tmp_path)
    with pytest.raises(LayoutError, match=r"already give HU.*leave csv_rescale out"):
        build_records("ct-rate", tmp_path, csv_rescale=True)
    make_ct_rate(tmp_path, fixed=False)  # both versions beside each other
    assert all("train_fixed" in str(r["volume"]) for r in build_records("ct-rate", tmp_path).records[:3])
    records = build_records("ct-rate", tmp_path, version="v1").records
    assert not any("fixed" in str(record["volume"]) for record in records)


@pytest.mark.parametrize("cell", ["", "nan", "NaN"])
def test_ct_rate_labels_without_a_value_are_unknown(tmp_path, cell):
    path = make_ct_rate(tmp_path) / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv"
    table(path, [{"VolumeName": "train_1_a_1.nii.gz", "Lung nodule": cell, "Medical material": "1.0"}])
    first, second = build_records("ct-rate", tmp_path).records[:2]
    assert first["labels"] == {"Lung nodule": None, "Medical material": 1}
    assert second["labels"] == {}


def test_ct_rate_cells_that_are_no_number_are_refused(tmp_path):
    make_ct_rate(tmp_path, fixed=False)
    rows = [
        {"VolumeName": f"train_1_a_{number}.nii.gz", "Lung nodule": cell, "RescaleSlope": 1, "RescaleIntercept": cell}
        for number, cell in ((1, 0), (2, "A. Person"))
    ]
    for name, message in (
        ("metadata/train_metadata.csv", "row 2: RescaleSlope or RescaleIntercept is no number; download it again"),
        ("multi_abnormality_labels/train_predicted_labels.csv", "row 2: 'Lung nodule' is not 1, 0 or empty; download"),
    ):
        table(tmp_path / "dataset" / name, rows)
        with pytest.raises(LayoutError, match=rf"{Path(name).name}: {message}") as caught:
            build_records("ct-rate", tmp_path, csv_rescale=True)
        assert "Person" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- BIMCV-R


def make_bimcv_r(root: Path, folders: bool = False) -> Path:
    files = [
        "sub-S1_ses-E1_run-1_bp-chest_ct",
        "sub-S1_ses-E1_run-2_bp-chest_ct",
        "sub-S2_ses-E3_acq-1_run-1_bp-chest_ct",
    ]
    for number, file in enumerate(files):
        touch(root / f"CT{number + 1}" / "ct" / f"{file}.nii.gz")
    base = "/raid/covid19_posi"
    paths = [f"{base}/sub-S1/ses-E1/mod-rx", f"{base}/sub-S2/ses-E3/mod-rx", f"{base}/sub-S9/ses-E9/mod-rx"]
    if not folders:
        paths = [f"{path}/{file}.nii.gz" for path, file in zip([paths[0], paths[0], paths[1]], files, strict=True)]
    labels = ["['nodule', ' pneumonia', '']", "['normal']", "['normal']"]
    rows = [
        {"Report": "sin hallazgos .", "Labels": label, "path": path, "Report_en": FINDINGS}
        for path, label in zip(paths, labels, strict=True)
    ]
    table(root / "meta" / "curated_ct_report_path_En.csv", rows)
    return root


@pytest.mark.parametrize("folders", [False, True])
def test_bimcv_r(tmp_path, folders):
    release = build_records("bimcv-r", make_bimcv_r(tmp_path, folders))
    assert [(r["patient_id"], r["study_id"]) for r in release.records] == [("sub-S1", "ses-E1")] * 2 + [
        ("sub-S2", "ses-E3")
    ]
    assert [r["reconstruction"] for r in release.records] == [
        "run-1_bp-chest_ct",
        "run-2_bp-chest_ct",
        "acq-1_run-1_bp-chest_ct",
    ]
    assert release.records[0]["report"] == FINDINGS
    assert release.records[0]["labels"] == {"nodule": 1, "normal": 0, "pneumonia": 1}
    assert release.notes == (["1 reports have no volume here and were left out"] if folders else [])
    assert build_records("bimcv-r", tmp_path, language="es").records[0]["report"] == "sin hallazgos ."


# ---------------------------------------------------------------------------------------------- INSPECT


def make_inspect(root: Path) -> Path:
    full = root / "full"
    for name in ("PE1", "PE2", "PE7"):
        touch(full / "CTPA" / f"{name}.nii.gz")
    table(
        full / "impressions_20250611.tsv", [{"impression_id": n, "impressions": f'No "PE" {n}.'} for n in (11, 12, 13)]
    )
    splits = [
        {"impression_id": n, "split": split}
        for n, split in ((11, "train"), (12, "valid"), (12, "valid"), (13, "test"))
    ]
    table(full / "splits_20250611.tsv", splits)
    mapping = [(11, "PE1", 501), (12, "PE2.nii.gz", 502), (13, "PE3", 503)]
    rows = [
        {"impression_id": n, "image_id": image, "person_id": person, "procedure_DATETIME": "2001-01-01"}
        for n, image, person in mapping
    ]
    table(full / "study_mapping_20250611.tsv", rows)
    labels = [
        {"impression_id": n, "pe_positive_nlp": positive, "12_month_PH": ph, "readmission_days": days}
        for n, positive, ph, days in ((11, "True", "Censored", 1), (12, "False", "True", 77))
    ]
    table(full / "labels_20250611.tsv", labels)
    return root


def test_inspect(tmp_path):
    release = build_records("inspect", make_inspect(tmp_path))
    first, second = release.records
    assert (first["impression"], first["patient_id"], first["study_id"], first["split"]) == (
        'No "PE" 11.',
        "501",
        "11",
        "train",
    )
    assert second["split"] == "validation"
    assert first["labels"] == {"pe_positive_nlp": 1, "12_month_PH": None}
    assert second["labels"] == {"pe_positive_nlp": 0, "12_month_PH": 1}
    assert release.notes == [
        "1 studies have no volume here and were left out",
        "1 volumes are not named in study_mapping and were left out",
    ]


# ---------------------------------------------------------------------------------------------- RAD-ChestCT


def make_rad_chestct(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    array = body()[::-1, ::-1, ::-1]  # indices grow towards inferior, posterior, left
    for name in ("trn00001", "val00001", "tst00001"):
        np.savez_compressed(root / f"{name}.npz", ct=array)
    notes = [("trn00001", 1), ("trn00002", 2), ("val00001", 3), ("tst00001", 4)]
    rows = [
        {"NoteAcc_DEID": n, "VolumeAcc_DEID": f"{n}.npz", "MRN_DEID": f"m{p}", "orig_slope": 1, "orig_inter": -1024}
        for n, p in notes
    ]
    table(root / "CT_Scan_Metadata_Complete_35747.csv", rows)
    for split, note in (("train", "trn00001"), ("valid", "val00001"), ("test", "tst00001")):
        row = {
            "NoteAcc_DEID": note,
            "nodule*right_upper": 0,
            "nodule*lung": 1,
            "mass*lung": 0,
            "mass*other_location": 0,
        }
        table(root / f"img{split}_Abnormality_and_Location_Labels.csv", [row])
    return root


def test_rad_chestct(tmp_path):
    release = build_records("rad-chestct", make_rad_chestct(tmp_path / "rad"))
    assert [(r["study_id"], r["patient_id"], r["split"]) for r in release.records] == [
        ("trn00001", "m1", "train"),
        ("val00001", "m3", "validation"),
        ("tst00001", "m4", "test"),
    ]
    assert release.records[0]["labels"] == {"nodule": 1, "mass": 0}
    assert release.notes == ["1 scans of the metadata table have no volume here and were left out"]
    path = write_records(release.records, tmp_path / "manifest.csv")
    assert len(read_manifest(path, require_report=False).rows) == 3


def test_rad_chestct_findings_that_no_location_shows_are_unknown_where_one_is_not_stated(tmp_path):
    root = make_rad_chestct(tmp_path)
    labels = {"nodule*lung": 1, "nodule*hilum": "nan", "mass*lung": 0, "mass*hilum": "", "cyst*lung": "0.0"}
    path = root / "imgtrain_Abnormality_and_Location_Labels.csv"
    table(path, [{"NoteAcc_DEID": "trn00001", **labels}])
    assert build_records("rad-chestct", root).records[0]["labels"] == {"nodule": 1, "mass": None, "cyst": 0}
    table(path, [{"NoteAcc_DEID": "trn00001", **labels, "cyst*lung": "A. Person"}])
    with pytest.raises(LayoutError, match=rf"{path.name}: row 1: 'cyst\*lung' is not 1, 0 or empty") as caught:
        build_records("rad-chestct", root)
    assert "Person" not in str(caught.value)


def test_rad_chestct_volumes_stand_upright(tmp_path):
    volume = read_rad_chestct(make_rad_chestct(tmp_path) / "trn00001.npz")
    assert (volume.spacing, volume.axis_codes) == ((0.8, 0.8, 0.8), "IPL")
    np.testing.assert_array_equal(volume.to_canonical().array, body())


def test_rad_chestct_refuses_other_files(tmp_path):
    np.savez(tmp_path / "other.npz", image=body())
    with pytest.raises(VolumeReadError, match="holds no array 'ct'"):
        read_rad_chestct(tmp_path / "other.npz")
    np.savez(tmp_path / "flat.npz", ct=body()[0])
    with pytest.raises(VolumeReadError, match=r"'ct' has shape \(24, 24\)"):
        read_rad_chestct(tmp_path / "flat.npz")
    np.savez(tmp_path / "pickle.npz", ct=np.array([{}], dtype=object))
    with pytest.raises(VolumeReadError, match=r"'ct' has shape \(1,\) and type object"):
        read_rad_chestct(tmp_path / "pickle.npz")
    whole = (make_rad_chestct(tmp_path / "rad") / "trn00001.npz").read_bytes()
    for cut in (0, 10, len(whole) // 2):
        (tmp_path / "cut.npz").write_bytes(whole[:cut])
        with pytest.raises(VolumeReadError, match=r"cut\.npz: is not a readable"):
            read_rad_chestct(tmp_path / "cut.npz")


def test_rad_chestct_allocates_no_more_than_a_file_can_hold(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i2", "fortran_order": False, "shape": (90000, 90000, 90000)}
    )
    with zipfile.ZipFile(tmp_path / "huge.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ct.npy", header.getvalue() + b"\0" * 4000)
    with pytest.raises(VolumeReadError, match=r"promises 90000x90000x90000 voxels .* more than the file holds"):
        read_rad_chestct(tmp_path / "huge.npz")


def test_rad_chestct_damaged_anywhere(tmp_path):
    """Whatever byte is wrong: the volume, or the one error, never another."""
    whole = bytearray((make_rad_chestct(tmp_path / "rad") / "trn00001.npz").read_bytes())
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = whole.copy()
        for place in random.integers(0, len(whole), random.integers(1, 4)):
            damaged[place] = random.integers(0, 256)
        (tmp_path / "damaged.npz").write_bytes(damaged)
        try:
            read_rad_chestct(tmp_path / "damaged.npz")
        except VolumeReadError:
            refused += 1
    assert refused > 200


# ---------------------------------------------------------------------------------------------- one's own folder


def test_plain_folder(tmp_path):
    for name in (
        "p1/s1/lung.nii.gz",
        "p1/s1/soft.nii.gz",
        "p1/s1/lung_mask.nii.gz",
        "p2/only.mha",
        "flat.nii",
        ".x.nii",
    ):
        touch(tmp_path / name)
    (tmp_path / "p1" / "s1" / "report.txt").write_text(f"FINDINGS:\n{FINDINGS}\n\nImpression: Normal chest.\n")
    (tmp_path / "p2" / "only.txt").write_text(FINDINGS)
    (tmp_path / "lost.txt").write_text(FINDINGS)
    series = tmp_path / "p3" / "ct"
    series.mkdir(parents=True)
    (series / "IM0").write_bytes(b"\0" * 128 + b"DICM")
    (series / "notes.txt").write_text("from the scanner")
    (tmp_path / "p3" / "ct.txt").write_text(FINDINGS)
    release = build_records("folder", tmp_path)
    by_name = {record["volume"].name: record for record in release.records}
    assert sorted(by_name) == ["ct", "flat.nii", "lung.nii.gz", "only.mha", "soft.nii.gz"]
    lung = by_name["lung.nii.gz"]
    assert (lung["findings"], lung["impression"]) == (FINDINGS, "Normal chest.")
    assert (lung["patient_id"], lung["study_id"], lung["reconstruction"]) == ("p1", "p1/s1", "lung")
    assert lung["masks"] == {"mask": tmp_path / "p1" / "s1" / "lung_mask.nii.gz"}
    assert by_name["soft.nii.gz"]["findings"] == FINDINGS
    assert by_name["only.mha"]["report"] == FINDINGS
    assert by_name["ct"]["report"] == FINDINGS
    assert "patient_id" not in by_name["flat.nii"]
    assert release.notes == [
        "1 volumes have no report; a .txt file of the same name would give one",
        "1 text files belong to no volume and were left out",
    ]


@pytest.mark.parametrize("name", ["1.2.840.113619.2.55.3.0", "i1.CTDC.1", "IM0", "IM0.dcm"])
def test_plain_folder_finds_dicom_files_of_any_name(tmp_path, name):
    series = touch(tmp_path / "p1" / "ct" / name).parent
    (series / name).write_bytes(b"\0" * 128 + b"DICM")
    for other in ("p1/notes/notes.txt", "p1/notes/preview.1"):  # neither a kind that DICOM has nor its marker
        touch(tmp_path / other).write_bytes(b"\0" * 200)
    assert [record["volume"] for record in build_records("folder", tmp_path).records] == [series]


def test_plain_folder_keeps_all_that_stands_under_equal_headings(tmp_path):
    touch(tmp_path / "a.nii")
    text = "FINDINGS:\nChest: nodule.\nFinding:\nAbdomen: normal.\nIMPRESSION:\nNodule.\nADDENDUM\nIMPRESSION: Told."
    (tmp_path / "a.txt").write_text(text)
    record = build_records("folder", tmp_path).records[0]
    assert record["findings"] == "Chest: nodule.\nAbdomen: normal."
    assert record["impression"] == "Nodule.\nADDENDUM\nTold."


@pytest.mark.parametrize(
    ("text", "findings", "impression", "is_shortened"),
    [
        ("The lungs are clear. A nodule.\n\nIMPRESSION:\nBenign.", "The lungs are clear. A nodule.", "Benign.", False),
        ("HISTORY: Cough.\nFINDINGS: Clear.\nIMPRESSION: Normal.", "Clear.", "Normal.", True),
        ("FINDINGS: Clear. IMPRESSION: Normal.", "Clear.", "Normal.", False),
        ("FINDINGS\nIMPRESSION\nNormal chest.", "", "Normal chest.", False),
        (
            "CHEST FINDINGS:\nClear.\nAbdomen findings: Gas.\nImpression and plan: Normal.",
            "CHEST FINDINGS:\nClear.\nAbdomen findings: Gas.",
            "Impression and plan: Normal.",
            False,
        ),
        (
            "FINDINGS:\nNo other findings\nin the chest. Impressions of teeth.",
            "No other findings\nin the chest. Impressions of teeth.",
            "",
            False,
        ),
    ],
)
def test_plain_folder_keeps_findings_and_impression_however_they_are_headed(
    tmp_path, text, findings, impression, is_shortened
):
    touch(tmp_path / "a.nii")
    (tmp_path / "a.txt").write_text(text)
    release = build_records("folder", tmp_path)
    assert release.records[0].get("findings", "") == findings
    assert release.records[0].get("impression", "") == impression
    assert ("1 volumes have a report with text before its findings" in " ".join(release.notes)) == is_shortened


def test_plain_folder_reports_are_utf8(tmp_path):
    touch(tmp_path / "a.nii")
    report = tmp_path / "a.txt"
    report.write_text("Befund: Herz normal groß.", encoding="utf-8-sig")
    assert build_records("folder", tmp_path).records[0]["report"] == "Befund: Herz normal groß."
    for encoding in ("cp1252", "utf-16"):
        report.write_text("Befund: Herz normal groß.", encoding=encoding)
        with pytest.raises(LayoutError, match=r"a\.txt: is not UTF-8; save it as UTF-8"):
            build_records("folder", tmp_path)


# ---------------------------------------------------------------------------------------------- what may be wrong

MAKERS = {
    "ct-rate": make_ct_rate,
    "bimcv-r": make_bimcv_r,
    "inspect": make_inspect,
    "rad-chestct": make_rad_chestct,
}
NEEDED = {
    "ct-rate": ["dataset/radiology_text_reports/train_reports.csv"],
    "bimcv-r": ["meta/curated_ct_report_path_En.csv"],
    "inspect": [f"full/{name}_20250611.tsv" for name in ("impressions", "splits", "study_mapping")],
    "rad-chestct": ["CT_Scan_Metadata_Complete_35747.csv", "imgvalid_Abnormality_and_Location_Labels.csv"],
}
FILES = [(layout, name) for layout, files in NEEDED.items() for name in files]
KEYS = {"ct-rate": "Findings_EN", "bimcv-r": "Report_en", "inspect": "impression_id", "rad-chestct": "NoteAcc_DEID"}


@pytest.mark.parametrize(("layout", "name"), FILES)
def test_a_missing_table_is_named_with_its_source(tmp_path, layout, name):
    MAKERS[layout](tmp_path)
    (tmp_path / name).unlink()
    table_name = Path(name).name.replace("20250611.tsv", "")
    with pytest.raises(LayoutError, match=rf"{table_name}.* is missing; download it from http") as caught:
        build_records(layout, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("layout", "name"), FILES)
def test_a_table_with_other_columns_is_refused(tmp_path, layout, name):
    MAKERS[layout](tmp_path)
    path = tmp_path / name
    path.write_text(path.read_text().replace(KEYS[layout], "other", 1))
    with pytest.raises(LayoutError, match=rf"{path.name}: no column '{KEYS[layout]}' \(found .*other"):
        build_records(layout, tmp_path)


@pytest.mark.parametrize("layout", MAKERS)
def test_a_cut_table_is_refused(tmp_path, layout):
    MAKERS[layout](tmp_path)
    path = tmp_path / NEEDED[layout][0]
    path.write_text(path.read_text() + "x")
    with pytest.raises(LayoutError, match=rf"{path.name}: row \d has 1 cells instead of \d+; download it again"):
        build_records(layout, tmp_path)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
@pytest.mark.parametrize(("layout", "name"), FILES)
def test_a_table_in_another_encoding_is_refused(tmp_path, layout, name, encoding):
    MAKERS[layout](tmp_path)
    path = tmp_path / name
    path.write_text(path.read_text() + "groß", encoding=encoding)
    with pytest.raises(LayoutError, match=rf"{path.name}: is not UTF-8; save it as UTF-8"):
        build_records(layout, tmp_path)


@pytest.mark.parametrize(("layout", "name"), FILES)
def test_blank_lines_are_passed_over(tmp_path, layout, name):
    MAKERS[layout](tmp_path)
    release = build_records(layout, tmp_path)
    path = tmp_path / name
    path.write_text(path.read_text().replace("\n", "\n\n"))
    assert build_records(layout, tmp_path) == release


@pytest.mark.parametrize("layout", BUILDERS)
def test_an_empty_folder_is_refused(tmp_path, layout):
    with pytest.raises(LayoutError, match=r"missing|none of the folders|no volumes"):
        build_records(layout, tmp_path)


@pytest.mark.parametrize("layout", MAKERS)
def test_tables_without_any_volume_are_refused(tmp_path, layout):
    MAKERS[layout](tmp_path)
    for file in [*tmp_path.rglob("*.nii.gz"), *tmp_path.rglob("*.npz")]:
        file.unlink()
    with pytest.raises(LayoutError, match=r"no volume of .* (download|unpack)"):
        build_records(layout, tmp_path)


def test_unknown_layouts_and_options(tmp_path):
    with pytest.raises(LayoutError, match=r"unknown layout 'ctrate'; do you mean 'ct-rate'\?"):
        build_records("ctrate", tmp_path)
    with pytest.raises(LayoutError, match=r"has no option 'csv_rescale'; it takes language"):
        build_records("bimcv-r", tmp_path, csv_rescale=True)
    with pytest.raises(LayoutError, match="no such folder"):
        build_records("folder", tmp_path / "gone")


@pytest.mark.parametrize("layout", MAKERS)
def test_every_layout_gives_a_manifest_that_is_read(tmp_path, layout):
    folder = tmp_path / "release"
    folder.mkdir()
    release = build_records(layout, MAKERS[layout](folder))
    assign_splits(release.records, {"train": 1.0})
    manifest = read_manifest(
        write_records(release.records, tmp_path / "m.jsonl"), require_report=False, min_report_words=1
    )
    assert [row.volume.resolve() for row in manifest.rows] == [r["volume"].resolve() for r in release.records]
    assert all(row.patient_id and row.study_id for row in manifest.rows)


@pytest.mark.parametrize("layout", MAKERS)
def test_a_volume_that_is_named_twice_is_kept_once_and_counted(tmp_path, layout):
    MAKERS[layout](tmp_path)
    records = build_records(layout, tmp_path).records
    path = tmp_path / {**dict(FILES), "rad-chestct": NEEDED["rad-chestct"][0]}[layout]  # the one that names volumes
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    release = build_records(layout, tmp_path)
    assert release.records == records
    assert [note.split()[0] for note in release.notes if "name a volume that an earlier row names" in note] == ["1"]
    path = write_records(records, tmp_path / "m.jsonl")
    assert read_manifest(path, require_report=False, min_report_words=1).rows


def test_a_patient_has_one_split_in_every_form_of_the_name():
    for number in range(20):
        records = [{"volume": name, "patient_id": f"{name}{number}"} for name in ("M\u00fcller", "Mu\u0308ller")]
        assign_splits(records, {"train": 0.5, "test": 0.5})
        assert records[0]["split"] == records[1]["split"]


def test_splits_keep_patients_together_and_stay_when_more_is_downloaded():
    records = [
        {"volume": f"{patient}-{scan}", "patient_id": f"p{patient}"}
        for patient, scan in itertools.product(range(300), range(2))
    ]
    some = [dict(record) for record in records[:100]]
    shares = {"train": 0.7, "validation": 0.1, "test": 0.2}
    for rows in (records, some):
        assign_splits(rows, shares)
    assert [row["split"] for row in some] == [row["split"] for row in records[:100]]
    assert all(one["split"] == two["split"] for one, two in zip(records[::2], records[1::2], strict=True))
    counts = {name: sum(row["split"] == name for row in records) / len(records) for name in shares}
    assert counts == pytest.approx(shares, abs=0.08)
    fixed = [{"volume": "a", "patient_id": "p", "split": "test"}]
    assign_splits(fixed, {"train": 1.0})
    assert fixed[0]["split"] == "test", "what the release says stays"
    with pytest.raises(LayoutError, match="must add up to 1"):
        assign_splits(records, {"train": 0.5})
