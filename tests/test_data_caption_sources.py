# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The three sources of captions: masks in words that are true of them, metadata that names nobody, a captioner."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from dicom_writer import SECRETS, write_series
from testing_utils import shared_data
from transformers import (
    BertConfig,
    BertTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from modeling_t3d.data.caption_masks import MaskCaptioner, read_label_names
from modeling_t3d.data.caption_metadata import MetadataCaptioner
from modeling_t3d.data.caption_slices import SliceCaptioner
from modeling_t3d.data.captions import CaptionError
from modeling_t3d.data.manifest import ManifestRow, read_manifest
from modeling_t3d.data.phantom_anatomy import ORGANS
from modeling_t3d.data.phantom_files import write_phantoms
from modeling_t3d.data.phantom_findings import FINDINGS
from modeling_t3d.data.phantom_studies import generate_phantom
from modeling_t3d.geometry_t3d import Volume
from modeling_t3d.volume_io_t3d import to_volume, write_nifti

ROOT = Path(__file__).resolve().parents[1]
PHANTOM_NAMES = ROOT / "examples" / "label_names" / "phantoms.json"
NAMES = {"organs": {1: "liver", 2: "kidney_left", 3: "lungs"}, "lesions": {1: "cyst"}}


def row_of(volume: Path, number: int = 1, **fields) -> ManifestRow:
    return ManifestRow(number, volume, "", "p", "s", **fields)


@pytest.fixture
def maps(tmp_path) -> dict[str, np.ndarray]:
    """Canonical label maps (z, y, x) of 2 mm voxels: x grows to the right."""
    organs = np.zeros((30, 20, 40), dtype=np.uint8)
    organs[2:9, 4:16, 26:38] = 1  # below, on the right
    organs[3:8, 6:10, 4:8] = 2
    organs[20:29, 4:16, 3:14] = 3
    organs[20:29, 4:16, 27:38] = 3
    lesions = np.zeros_like(organs)
    lesions[4:6, 8:10, 30:32] = 1  # in the liver
    lesions[22:25, 2:3, 20:21] = 1  # in front of and between the lungs
    return {"organs": organs, "lesions": lesions}


def write_maps(folder: Path, maps: dict[str, np.ndarray], axes: str = "SAR") -> dict[str, Path]:
    paths = {}
    for name, array in maps.items():
        volume = to_volume(array, spacing=(2, 2, 2), axes="SAR")
        if axes != "SAR":  # the same world, stored otherwise
            volume = Volume(
                np.ascontiguousarray(volume.array[:, ::-1, ::-1].transpose(2, 1, 0)),
                volume.affine @ np.array([[0, 0, 1, 0], [0, -1, 0, 19], [-1, 0, 0, 39], [0, 0, 0, 1.0]]),
            )
        write_nifti(volume, folder / f"{name}.nii.gz")
        paths[name] = folder / f"{name}.nii.gz"
    return paths


EXPECTED = (
    "Liver of 8.1 ml, 24 mm across, on the right, in the lower third of the scan. "
    "Left kidney of 0.64 ml, 10 mm across, in the lower third of the scan. "
    "Lungs of 9.5 ml, 24 mm across, on the left, in the upper third of the scan. "
    "Lungs of 9.5 ml, 24 mm across, on the right, in the upper third of the scan."
)
CYSTS = (
    "Cyst of 0.064 ml, 4.0 mm across, in the liver. "
    "Cyst of 0.024 ml, 6.0 mm across, near the midline, in the upper third of the scan."
)


# ----------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("axes", ["SAR", "LPS"])
def test_masks_are_told_as_they_are_however_they_are_stored(maps, tmp_path, axes):
    paths = write_maps(tmp_path, maps, axes)
    assert MaskCaptioner(NAMES)(row_of(tmp_path, masks=paths), {}) == f"{EXPECTED} {CYSTS}"
    assert MaskCaptioner(NAMES, described=["lesions"])(row_of(tmp_path, masks=paths), {}) == CYSTS


def test_a_mirrored_body_is_told_with_the_other_side(maps, tmp_path):
    mirrored = {name: array[..., ::-1] for name, array in maps.items()}
    caption = MaskCaptioner(NAMES)(row_of(tmp_path, masks=write_maps(tmp_path, {"organs": mirrored["organs"]})), {})
    assert caption.startswith("Liver of 8.1 ml, 24 mm across, on the left, in the lower third of the scan.")


def test_large_structures_lie_on_both_sides_or_near_the_midline(tmp_path):
    array = np.zeros((60, 60, 120), dtype=np.uint8)
    array[20:40, 10:50, 5:45] = array[20:40, 10:50, 75:115] = 1
    array[20:40, 10:50, 58:63] = 2
    array[0:10, 10:50, 45:75] = 3
    masks = write_maps(tmp_path, {"organs": array})
    names = {"organs": {1: "lungs", 2: "spine", 3: "bowel"}}
    sentences = MaskCaptioner(names)(row_of(tmp_path, masks=masks), {}).split(". ")
    assert [sentence.split(", ")[-2] for sentence in sentences] == [
        "on both sides",
        "near the midline",
        "near the midline",
    ]


def test_a_tilted_label_map_holds_no_other_structures_than_the_file(tmp_path):
    """Interpolated labels lie between those of neighbours, and have names of their own."""
    labels = np.zeros((40, 40, 20), dtype=np.uint8)
    labels[10:30, 10:30, 4:16] = 10
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[1, 2] = -1.0
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "organs.nii.gz")
    row = row_of(tmp_path, masks={"organs": tmp_path / "organs.nii.gz"})
    every = MaskCaptioner({"organs": {value: f"organ {value}" for value in range(1, 20)}})(row, {})
    assert every == "Organ 10 of 58 ml, on both sides, in the middle third of the scan."
    assert MaskCaptioner()(row, {}).startswith("Organs of 58 ml")


def test_a_binary_mask_needs_no_names(maps, tmp_path):
    masks = write_maps(tmp_path, {"kidney_cyst_left": maps["lesions"]})
    assert MaskCaptioner()(row_of(tmp_path, masks=masks), {}).startswith("Left kidney cyst of 0.064 ml, 4.0 mm across")


def test_a_mask_for_each_structure_is_named_by_itself(maps, tmp_path):
    """The value 1 of a table for one map says nothing of masks that all hold 1."""
    binary = maps["lesions"].astype(bool).astype(np.uint8)
    masks = write_maps(tmp_path, {"kidney_left": binary, "liver": binary})
    names = {"*": {1: "spleen", 2: "kidney left", 3: "liver"}}
    caption = MaskCaptioner(names)(row_of(tmp_path, masks=masks), {})
    assert caption.startswith("Left kidney of 0.064 ml")
    assert "Liver of 0.064 ml" in caption
    assert "Spleen" not in caption
    with pytest.raises(CaptionError, match="row 1: the mask 'kidney_left', one of 2, holds the value 1 alone"):
        MaskCaptioner({"*": {1: "spleen", 3: "liver"}})(row_of(tmp_path, masks=masks), {})


def test_an_empty_mask_says_so(tmp_path):
    masks = write_maps(tmp_path, {"lesions": np.zeros((4, 4, 4), dtype=np.uint8)})
    assert MaskCaptioner()(row_of(tmp_path, masks=masks), {}) == "No structure of the masks was found in this scan."


def test_masks_that_cannot_be_told_are_refused(maps, tmp_path):
    masks = write_maps(tmp_path, maps)
    with pytest.raises(CaptionError, match="row 7 names no masks, from which its caption was to come"):
        MaskCaptioner(NAMES)(row_of(tmp_path, 7), {})
    with pytest.raises(CaptionError, match="row 1: the mask 'organs' holds 3 values without names"):
        MaskCaptioner()(row_of(tmp_path, masks=masks), {})
    with pytest.raises(CaptionError, match="row 1: value 3 of the mask 'organs' has no name"):
        MaskCaptioner({"organs": {1: "liver", 2: "kidney"}})(row_of(tmp_path, masks=masks), {})
    with pytest.raises(CaptionError, match="row 1 has no mask 'tumours', only 'organs', 'lesions'"):
        MaskCaptioner(NAMES, described=["tumours"])(row_of(tmp_path, masks=masks), {})
    (tmp_path / "lesions.nii.gz").write_bytes(b"broken")
    with pytest.raises(CaptionError, match=r"row 1: .*lesions\.nii\.gz"):
        MaskCaptioner(NAMES)(row_of(tmp_path, masks=masks), {})


def test_label_names_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"1": "liver", "2": "spleen"}')
    (tmp_path / "b.json").write_text('{"organs": {"1": "liver"}}')
    (tmp_path / "c.csv").write_text("label,name\n1,liver\n2,spleen\n")
    assert (
        read_label_names(tmp_path / "a.json")
        == {"*": {1: "liver", 2: "spleen"}}
        == read_label_names(tmp_path / "c.csv")
    )
    assert read_label_names(tmp_path / "b.json") == {"organs": {1: "liver"}}
    for name, text in (("d.json", "[1]"), ("e.json", '{"liver": "1"}'), ("f.csv", "value,title\n1,liver\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(CaptionError, match=f"{name}: label names are a JSON object such as"):
            read_label_names(tmp_path / name)
    with pytest.raises(CaptionError, match=r"none\.json: cannot be opened"):
        read_label_names(tmp_path / "none.json")


def test_names_of_the_phantoms_are_those_that_they_are_made_with():
    names = read_label_names(PHANTOM_NAMES)
    assert names["organs"] == {value: name for name, value in ORGANS.items()}
    assert names["lesions"] == {spec.index: name for name, spec in FINDINGS.items()}


def test_real_label_maps():
    folder = shared_data("totalsegmentator_abdomen")
    names = read_label_names(folder / "label_names_117.csv")
    row = row_of(folder / "ct.nii.gz", masks={"organs": folder / "labels_117.nii.gz"})
    caption = MaskCaptioner(names)(row, {})
    assert "Spleen of " in caption
    spleen = next(sentence for sentence in caption.split(". ") if sentence.startswith("Spleen"))
    assert "on the left" in spleen
    liver = next(sentence for sentence in caption.split(". ") if sentence.startswith("Liver"))
    assert "on the right" in liver
    assert "Left kidney of " in caption


# ----------------------------------------------------------------------------------------- metadata


def test_metadata_of_a_series_names_nobody(tmp_path):
    elements = {"BodyPartExamined": "CHEST", "ContrastBolusAgent": SECRETS[3], "KVP": 120, "SliceThickness": 2.5}
    write_series(tmp_path / "scan", np.zeros((4, 5, 6), dtype=np.int16), **elements)
    record = {"patient_id": SECRETS[1], "PatientName": SECRETS[0], "report": "", "institution": "St. Secret"}
    caption = MetadataCaptioner()(row_of(tmp_path / "scan", labels={"nodule": 1, "effusion": 0, "cyst": None}), record)
    assert caption == (
        "Computed tomography of the chest with contrast agent. 4 slices 2 mm apart, 0.8 mm in plane, 8 mm from bottom "
        "to top. Slice thickness 2.5 mm. Tube voltage 120 kV."
    )
    assert not any(secret in caption for secret in (*SECRETS, "Secret"))


def test_metadata_of_a_manifest_is_numbers_and_words_of_lists(tmp_path):
    write_nifti(to_volume(np.zeros((4, 5, 6), dtype=np.int16), spacing=(2, 1, 1), axes="SAR"), tmp_path / "a.nii.gz")
    record = {"Modality": "mr", "BodyPartExamined": "Jane Doe", "contrast": "no", "SliceThickness": "nan", "KVP": "x"}
    row = row_of(tmp_path / "a.nii.gz", labels={"nodule": 1, "effusion": 0, "cyst": None})
    assert MetadataCaptioner(modality="CT")(row, record).startswith("Magnetic resonance imaging. 4 slices 2 mm apart")
    known = {"modality": "free text", "body_part": "liver", "contrast": "yes", "slice_thickness": "3"}
    assert MetadataCaptioner(modality="CT", with_labels=True)(row, known) == (
        "Computed tomography of the liver with contrast agent. 4 slices 2 mm apart, 1 mm in plane, 8 mm from bottom "
        "to top. Slice thickness 3 mm. Nodule. No effusion."
    )
    assert MetadataCaptioner()(row, {}).startswith("Scan. 4 slices")


def test_metadata_of_an_array_of_rad_chestct(tmp_path):
    np.savez_compressed(tmp_path / "trn00001.npz", ct=np.zeros((5, 6, 7), dtype=np.int16))
    caption = MetadataCaptioner()(row_of(tmp_path / "trn00001.npz"), {"modality": "CT"})
    assert caption.startswith("Computed tomography. 5 slices 0.8 mm apart")


def test_metadata_of_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(CaptionError, match=r"row 3: .*missing\.nii\.gz: no such file"):
        MetadataCaptioner()(row_of(tmp_path / "missing.nii.gz", 3), {})
    with pytest.raises(CaptionError, match="modality must be one of CT, MR"):
        MetadataCaptioner(modality="XX")


# ----------------------------------------------------------------------------------------- slices


@pytest.fixture(scope="module")
def captioner_folder(tmp_path_factory) -> Path:
    """A randomly initialised encoder-decoder captioner of a few thousand parameters, as a folder of the Hub."""
    folder = tmp_path_factory.mktemp("captioner")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(59))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(image_size=32, patch_size=16, **sizes),
        BertConfig(vocab_size=len(words), is_decoder=True, add_cross_attention=True, initializer_range=1.0, **sizes),
        decoder_start_token_id=2,
        pad_token_id=0,
        eos_token_id=3,
    )
    torch.manual_seed(0)
    model = VisionEncoderDecoderModel(config)
    model.generation_config.update(decoder_start_token_id=2, pad_token_id=0, eos_token_id=3)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def gradient_scan(folder: Path) -> Path:
    """Values that differ along every axis."""
    z, y, x = np.meshgrid(np.arange(8), np.arange(10), np.arange(12), indexing="ij")
    array = (60 * z - 20 * y + 10 * x).astype(np.int16)
    write_nifti(to_volume(array, spacing=(2, 1, 1), axes="SAR"), folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


def test_any_captioner_of_a_folder_writes_about_slices(captioner_folder, tmp_path):
    source = SliceCaptioner.from_pretrained(captioner_folder, num_slices=2, max_new_tokens=6)
    row = row_of(gradient_scan(tmp_path))
    caption = source(row, {})
    assert caption == source(row, {}), "greedy"
    assert caption.endswith(".")
    assert "word" in caption.lower()
    array = np.zeros((8, 10, 12), dtype=np.int16)
    assert len(source.describe(source.slices(array))) == 2
    settings = source.settings()
    assert settings == json.loads(json.dumps(settings))
    assert (settings["name"], settings["num_slices"]) == (str(captioner_folder), 2)
    other = shutil.copytree(captioner_folder, tmp_path / "other")
    assert SliceCaptioner.from_pretrained(other).settings()["content"] == settings["content"]
    (other / "note.txt").write_text("trained further")
    assert SliceCaptioner.from_pretrained(other).settings()["content"] != settings["content"]


def test_slices_are_shown_as_radiologists_see_them(captioner_folder):
    source = SliceCaptioner.from_pretrained(captioner_folder, num_slices=3, window=(0.0, 255.0))
    array = np.zeros((8, 4, 5), dtype=np.int16)
    array[4, 3, 4] = 255  # front, right
    bottom, middle, top = source.slices(array)
    assert middle.shape == (4, 5, 3)
    assert middle.dtype == np.uint8
    assert middle[0, 0].tolist() == [255, 255, 255]
    assert middle.sum() == 3 * 255
    assert bottom.sum() == top.sum() == 0
    assert len(source.slices(array[:2])) == 2, "no slice is shown twice"
    free = SliceCaptioner.from_pretrained(captioner_folder, num_slices=1, window=None)
    values = np.linspace(5, 9, 100, dtype=np.float32).reshape(1, 10, 10)
    (picture,) = free.slices(values)
    assert (picture.min(), picture.max()) == (0, 255)


def test_slices_are_shown_in_the_units_of_the_manifest(captioner_folder, tmp_path, monkeypatch):
    source, shown = SliceCaptioner.from_pretrained(captioner_folder), []
    monkeypatch.setattr(source, "describe", lambda pictures: shown.append(pictures) or ["text"])
    array = np.linspace(-160, 240, 8 * 6 * 6).reshape(8, 6, 6).astype(np.int16)
    write_nifti(to_volume(array + 1024, spacing=(2, 1, 1), axes="SAR"), tmp_path / "offset.nii.gz")
    np.savez_compressed(tmp_path / "array.npz", ct=array[::-1, ::-1, ::-1])  # axes IPL
    source(row_of(tmp_path / "offset.nii.gz", rescale=(1.0, -1024.0)), {})
    source(row_of(tmp_path / "array.npz"), {})
    for pictures in shown:
        np.testing.assert_array_equal(pictures, source.slices(array))


def test_repetitions_are_told_once(captioner_folder, tmp_path, monkeypatch):
    source = SliceCaptioner.from_pretrained(captioner_folder)
    monkeypatch.setattr(source, "describe", lambda pictures: ["a  lung", "the liver.", "a lung"])
    assert source(row_of(gradient_scan(tmp_path)), {}) == "A lung. The liver."


def test_captioners_that_cannot_be_are_refused(captioner_folder, tmp_path):
    with pytest.raises(CaptionError, match="is no image captioner that can be loaded"):
        SliceCaptioner.from_pretrained(tmp_path)
    with pytest.raises(CaptionError, match="window must be two rising numbers of HU or None"):
        SliceCaptioner.from_pretrained(captioner_folder, window=(1, 0))
    with pytest.raises(CaptionError, match="num_slices and max_new_tokens must be at least 1"):
        SliceCaptioner.from_pretrained(captioner_folder, num_slices=0)
    with pytest.raises(CaptionError, match=r"row 4: .*none\.nii\.gz"):
        SliceCaptioner.from_pretrained(captioner_folder)(row_of(tmp_path / "none.nii.gz", 4), {})


# ----------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("generate_captions", ROOT / "examples" / "generate_captions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_captions_phantoms_by_each_source(script, captioner_folder, tmp_path):
    manifest = write_phantoms(tmp_path / "phantoms", [1, 2], compress=False, resolution=9.0, masks=True)
    choices = {
        "masks": ["--label-names", str(PHANTOM_NAMES), "--described", "lesions"],
        "slices": ["--captioner", str(captioner_folder), "--num-slices", "1"],
        "metadata": ["--modality", "CT"],
    }
    captions = {}
    for source, options in choices.items():
        output = tmp_path / f"{source}.csv"
        arguments = ["--manifest", str(manifest), "--output", str(output), "--source", source, "--overwrite", *options]
        script.run(script.parse_arguments(arguments))
        captions[source] = [row.report for row in read_manifest(output, min_report_words=1).rows]
    phantom = generate_phantom(1, resolution=9.0)
    present = {name for name, value in phantom.labels.items() if value}
    told = {name for name in FINDINGS if name in captions["masks"][0].lower()}
    assert told <= present, "masks of coarse phantoms may lose small lesions, and invent none"
    assert told
    assert captions["metadata"][0].startswith("Computed tomography. ")
    with (tmp_path / "masks.csv").open(newline="") as file:
        assert not any(record["findings"] for record in csv.DictReader(file))


def test_the_script_asks_for_a_captioner(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(["--manifest", "a.csv", "--output", "b.csv", "--source", "slices"])
    assert "--source slices needs --captioner" in capsys.readouterr().err
