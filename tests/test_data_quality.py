# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The quality report finds what is planted in a data set, and its page shows it in a browser without naming anyone."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_writer import write_slice
from PIL import Image

from modeling_t3d.data.manifest_files import write_records
from modeling_t3d.data.quality import MIN_VOLUMES_FOR_OUTLIERS, examine_manifest, find_outliers
from modeling_t3d.data.quality_page import bar_chart, histogram, render, write_quality_page
from modeling_t3d.data.quality_volume import VolumeFacts, draw, examine_volume
from modeling_t3d.geometry_t3d import VolumeReadError
from modeling_t3d.volume_io_t3d import read_volume, to_volume, write_nifti

REPORT = "The lungs are clear and the heart is of normal size"
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


def scan(seed: int = 0) -> np.ndarray:
    """A box of tissue in air, axes (z, y, x)."""
    array = np.full((20, 24, 24), -1000, dtype=np.int16)
    array[:, 4:20, 4:20] = 40 + np.random.default_rng(seed).integers(-9, 9, (20, 16, 16))
    array[5:15, 8:16, 8:16] = -850
    return array


def write_volume(path: Path, array: np.ndarray, spacing=(3.0, 2.0, 2.0)) -> Path:
    write_nifti(to_volume(array, spacing=spacing, axes="SAR"), path)
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A manifest with one of everything that can be wrong, and the numbers of the rows that are."""
    folder = tmp_path_factory.mktemp("SECRET-hospital")
    records = []
    for number in range(1, 13):
        records.append(
            {
                "volume": write_volume(folder / f"SECRET-{number}.nii", scan(number)),
                "report": f"{REPORT}, scan {number}.",
                "patient_id": f"SECRET-p{number}",
                "study_id": f"SECRET-s{number}",
                "reconstruction": "lung" if number % 2 else f"SECRET-{number}",
                "split": "train" if number < 9 else "test",
                "labels": {"nodule": number % 2, "cyst": None},
            }
        )
    write_volume(records[1]["volume"], scan(2), spacing=(12.0, 2.0, 2.0))  # row 2: thick slices
    write_volume(records[2]["volume"], (scan(3) + 1024).astype(np.int16))  # row 3: no HU
    records[3]["volume"].unlink()  # row 4: missing
    records[4]["volume"].write_bytes(records[4]["volume"].read_bytes()[:900])  # row 5: cut off
    records[5]["report"] = ""  # row 6: no report
    records[6]["report"] = "Normal."  # row 7: short
    records[8]["report"] = records[7]["report"].upper() + " "  # rows 8 and 9: the same report
    records[10]["patient_id"] = "SECRET-p1"  # rows 1 and 11: one patient, two splits
    records[11]["masks"] = {"lung": folder / "SECRET-gone.nii"}  # row 12: no mask
    records.append(dict(records[0]))  # row 13: the volume of row 1
    records.append({"report": REPORT})  # row 14: no volume
    return write_records(records, folder / "manifest.csv")


@pytest.fixture(scope="module")
def report(planted):
    return examine_manifest(planted)


def test_what_is_planted_is_found(report):
    found = {check.name: (check.level, check.rows) for check in report.checks}
    assert found == {
        "rows": ("error", (14,)),
        "missing files": ("error", (4,)),
        "missing masks": ("error", (12,)),
        "patients in two splits": ("error", (1, 11, 13)),
        "studies in two splits": ("good", ()),
        "repeated volumes": ("error", (13,)),
        "unnamed patients": ("good", ()),
        "empty reports": ("error", (6,)),
        "short reports": ("warning", (7,)),
        "duplicate reports": ("warning", (8, 9)),
        "unreadable volumes": ("error", (5,)),
        "values that are no HU": ("error", (3,)),
        "outliers": ("warning", (2,)),
    }
    assert not report.is_usable
    assert {(one.number, one.measure) for one in report.outliers} == {(2, "slice spacing"), (2, "length")}


def test_counts(report):
    assert (report.num_rows, report.num_volumes, report.num_studies, report.num_patients) == (14, 13, 12, 11)
    assert report.splits["train"] == (9, 8, 8, 8, 9)
    assert report.splits["test"] == (4, 4, 4, 4, 4)
    assert report.volumes_per_study == {1: 11, 2: 1}
    assert report.reconstructions == {"lung": 7, "other": 6}, "a name that one patient alone has is not shown"
    assert report.labels["nodule"] == (7, 6, 0)
    assert len(report.volumes) == 11


def test_a_good_data_set_is_usable(tmp_path):
    records = [
        {"volume": write_volume(tmp_path / f"{n}.nii", scan(n)), "report": f"{REPORT} {n}.", "patient_id": n}
        for n in range(9)
    ]
    report = examine_manifest(write_records(records, tmp_path / "m.parquet"))
    assert report.is_usable
    assert {check.level for check in report.checks} == {"good"}
    assert "nothing to mend" in render(report)


def test_unnamed_patients_are_a_warning(tmp_path):
    records = [{"volume": write_volume(tmp_path / f"{n}.nii", scan(n)), "report": f"{REPORT} {n}."} for n in range(2)]
    checks = {check.name: check for check in examine_manifest(write_records(records, tmp_path / "m.csv")).checks}
    assert checks["unnamed patients"].level == "warning"
    assert checks["unnamed patients"].rows == (1, 2)


def test_a_sample_is_said_to_be_one(planted):
    report = examine_manifest(planted, max_volumes=5)
    assert len(report.volumes) <= 5
    assert report.num_rows == 14
    unreadable = next(check for check in report.checks if check.name == "unreadable volumes")
    assert "(of 5 that were opened, 12 are there)" in unreadable.text
    again = examine_manifest(planted, max_volumes=5)
    assert [facts.number for facts in again.volumes] == [facts.number for facts in report.volumes]


def test_processes_find_the_same(planted, report):
    assert examine_manifest(planted, num_workers=2) == report


def test_outliers_need_company_and_distance():
    def facts(number, spacing):
        usual = dict.fromkeys(("slice spacing", "pixel spacing", "length", "tissue", "lowest", "highest"), 1.0)
        return VolumeFacts(number, measures=usual | {"slice spacing": spacing, "tissue": 100 * spacing})

    few = [facts(n, 1.0) for n in range(MIN_VOLUMES_FOR_OUTLIERS - 2)] + [facts(99, 9.0)]
    assert find_outliers(few) == []
    many = [facts(n, 1.0) for n in range(20)] + [facts(98, 1.4), facts(99, 9.0)]
    assert [(one.number, one.measure, one.value, one.usual) for one in find_outliers(many)] == [
        (99, "slice spacing", 9.0, 1.0),
        (99, "tissue", 900.0, 100.0),
    ]
    many[-1].not_hounsfield = "a label map"
    assert [one.measure for one in find_outliers(many)] == ["slice spacing"], "its HU are said to be none"


def test_pictures_stand_upright():
    """Superior and anterior are up and the patient's right is at the left, whatever the orientation of the file."""
    array = np.full((40, 40, 40), -1000, dtype=np.int16)
    array[30:, 20:22, 30:] = 400  # superior, right (seen in the coronal slice)
    array[19:22, 30:, 30:] = 400  # anterior, right (seen in the axial slice)
    volume = to_volume(array, spacing=(2, 2, 2), axes="SAR")
    turned = to_volume(np.ascontiguousarray(array[::-1, ::-1].transpose(2, 0, 1)), spacing=(2, 2, 2), axes="RIP")
    picture = np.asarray(Image.open(io.BytesIO(draw(volume))))
    np.testing.assert_array_equal(picture, np.asarray(Image.open(io.BytesIO(draw(turned.to_canonical())))))
    coronal, axial = picture[:, :128], picture[:, 132:]
    for view in (coronal, axial):
        assert view[:28, :28].mean() > 200, "upper left corner"
        assert view[40:, 40:].mean() < 10


def test_errors_do_not_name_the_file(tmp_path):
    (tmp_path / "SECRET.nii.gz").write_bytes(b"nothing")
    facts = examine_volume(3, tmp_path / "SECRET.nii.gz")
    assert facts.error
    assert "SECRET" not in facts.error
    assert str(tmp_path) not in facts.error


def test_erasing_names_from_an_error_leaves_its_figures(tmp_path):
    """The names of slices, which may be bare numbers, stand in positions and steps too."""
    folder = tmp_path / "1"
    folder.mkdir()
    for position in (0.0, 8.1, 18.1, 28.1, 38.1, 68.1):
        write_slice(folder / str(int(position)), scan()[0], (0, 0, position))
    facts = examine_volume(1, folder)
    with pytest.raises(VolumeReadError) as caught:
        read_volume(folder)
    assert facts.error == str(caught.value).removeprefix(f"{folder}: ")


def test_damaged_and_odd_files_are_facts(tmp_path):
    values = scan().astype(np.float32)
    values[0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "nan.nii")
    assert "NaN" in examine_volume(1, tmp_path / "nan.nii").error
    assert examine_volume(1, tmp_path / "gone.nii").error
    np.savez(tmp_path / "rad.npz", ct=scan())
    assert examine_volume(1, tmp_path / "rad.npz").spacing == (0.8, 0.8, 0.8)


class Page(HTMLParser):
    """Tags that must be closed, addresses, and pictures."""

    VOID = ("meta", "img", "br", "rect", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.addresses, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_startendtag(self, tag, attributes):
        assert tag in self.VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_well_formed_and_needs_nothing_else(report):
    text = render(report)
    page = Page(text)
    assert page.open == []
    assert len(page.addresses) == len(report.volumes)
    for address in page.addresses:
        assert address.startswith("data:image/png;base64,")
        assert Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).size[1] == 128
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe", text)
    assert "default-src 'none'" in text
    words = " ".join(page.text)
    for expected in (
        "manifest.csv",
        "rows 1, 11, 13",
        "to be mended before training",
        "slice spacing 12 mm, usual 3",
        "no value is negative",
    ):
        assert expected in words


def test_the_page_names_no_one(report):
    assert "SECRET" not in render(report)


def test_names_from_the_manifest_are_escaped(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    records = [
        {
            "volume": write_volume(tmp_path / f"{n}.nii", scan(n)),
            "report": REPORT,
            "patient_id": n,
            "split": evil,
            "labels": {evil: 1},
            "reconstruction": evil,
        }
        for n in range(2)
    ]
    text = render(examine_manifest(write_records(records, tmp_path / f"a{'&'}b.csv")))
    assert evil not in text
    assert "&lt;img src=x" in text
    assert "a&amp;b.csv" in text
    assert Page(text).open == []


def test_charts_say_their_numbers():
    assert "all 3 are 2" in histogram([2, 2, 2])
    chart = histogram([0, 0, 0, 10])
    assert ">3<" in chart
    assert ">10<" in chart
    assert "median 0" in chart
    assert ">7<" in bar_chart({"lung": 7, "soft": 3})


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; the page is parsed by another test")
def test_the_page_in_a_browser(report, tmp_path):
    path = write_quality_page(report, tmp_path / "out" / "quality.html")
    # Its own profile, and no network: nothing outside the page could be loaded.
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--window-size=1100,3200", f"--screenshot={tmp_path / 'page.png'}", path.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert pixels.shape[:2] == (3200, 1100)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    assert ((red > 150) & (green < 60) & (blue < 60)).sum() > 1000, "the verdict's badge"
    assert ((abs(red - 74) < 12) & (abs(green - 127) < 12) & (abs(blue - 181) < 12)).sum() > 1000, "bars of the charts"
    neutral = (red == green) & (green == blue) & (red > 40) & (red < 240)
    assert neutral.sum() > 10_000, "the pictures: nothing else on the page is grey"
