# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The processor: both modalities in one call, the settings on disk, report sections, truncation, prompts."""

import doctest
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from body_phantom import body_array, upright_affine
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.processing_utils import Unpack

import modeling_t3d
import modeling_t3d.processing_t3d as processing
from modeling_t3d.image_processing_t3d import T3DImageProcessor
from modeling_t3d.processing_t3d import T3DProcessor, compose_report, read_descriptions

AFFINE = upright_affine((4.0, 4.0, 4.0))
WORDS = ("the", "lungs", "are", "clear", "pleural", "effusion", "nodule", "is", "not", "present", ".")


def make_tokenizer(**changes) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **changes)


def make_processor(image_settings=None, tokenizer_settings=None, **settings) -> T3DProcessor:
    sizes = {"spacing": (4, 4, 4), "global_size": (16, 16, 16), "local_size": (8, 8, 8)}
    image_processor = T3DImageProcessor(**{**sizes, **(image_settings or {})})
    return T3DProcessor(image_processor, make_tokenizer(**(tokenizer_settings or {})), **settings)


def test_doctest():
    results = doctest.testmod(processing)
    assert results.attempted > 0
    assert results.failed == 0


def test_both_modalities_in_one_call():
    processor = make_processor()
    text = ["pleural effusion is present .", "nodule"]
    inputs = processor(images=[body_array(), body_array(seed=1)], text=text, affine=AFFINE, views=3, seed=0)
    shapes = {key: tuple(value.shape) for key, value in inputs.items()}
    assert shapes == {
        "input_ids": (2, 7),
        "attention_mask": (2, 7),
        "pixel_values": (2, 1, 16, 16, 16),
        "local_pixel_values": (2, 3, 1, 8, 8, 8),
        "local_mask": (2, 3),
        "local_positions": (2, 3, 6),
    }
    assert inputs["attention_mask"].sum(1).tolist() == [7, 3]
    images = processor.image_processor([body_array(), body_array(seed=1)], affine=AFFINE, views=3, seed=0)
    assert all(torch.equal(inputs[key], images[key]) for key in images)
    assert set(processor.model_input_names) >= set(shapes)


def test_each_modality_alone():
    processor = make_processor()
    assert set(processor(text="nodule")) == {"input_ids", "attention_mask"}
    assert set(processor(images=body_array(), affine=AFFINE)) == {"pixel_values"}
    assert set(processor(body_array(), affine=AFFINE)) == {"pixel_values"}
    with pytest.raises(ValueError, match="at least one input"):
        processor()


def test_a_loaded_processor_takes_a_scan_to_tiles_and_their_outputs_back_to_the_scan(tmp_path):
    make_processor().save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    prepared = processor.prepare(body_array(), AFFINE)
    tiles = list(processor.iterate_views(prepared, "grid", batch_size=5))
    assert len(tiles) > 1
    tissue = (tile[0] > 0 for views in tiles for tile in views.pixel_values)
    result = processor.reassemble((tile.to(torch.int16) for tile in tissue), prepared, mode="labels")
    np.testing.assert_allclose(result.affine, AFFINE)
    assert np.array_equal(result.array, body_array() > 0)


def test_path_and_geometry_pass_through(tmp_path):
    import nibabel

    nibabel.save(nibabel.Nifti1Image(body_array(), np.diag([4.0, 4.0, 4.0, 1.0])), tmp_path / "scan.nii.gz")
    inputs = make_processor()(
        images=str(tmp_path / "scan.nii.gz"), text="nodule", views="grid", return_geometry=True, return_tensors="pt"
    )
    assert inputs["geometry"][0].source == str(tmp_path / "scan.nii.gz")
    assert len(inputs["geometry"][0].local_boxes) == inputs["local_mask"].shape[1]


def test_arguments_reach_their_modality():
    processor = make_processor(tokenizer_settings={"model_max_length": 117})
    array = body_array()
    plain = processor(images=array, text="nodule", affine=AFFINE)
    nested = processor(
        images=array,
        text="nodule",
        images_kwargs={"affine": AFFINE.tolist(), "rescale_factor": -1.0},  # no array before transformers 5.23
        text_kwargs={"padding": "max_length", "max_length": 9},
    )
    assert torch.equal(nested["pixel_values"], -plain["pixel_values"])
    assert nested["input_ids"].shape == (1, 9)
    flat = processor(
        images=array, text="nodule", affine=AFFINE, rescale_factor=-1.0, padding="max_length", max_length=9
    )
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    assert torch.equal(flat["input_ids"], nested["input_ids"])
    with pytest.raises(ValueError, match="two times"):
        processor(images=array, affine=AFFINE, images_kwargs={"seed": 1}, seed=2)


def test_unknown_arguments_are_refused():
    processor = make_processor()
    for unknown, message in (({"vews": 2}, "no argument 'vews'; did you mean 'views'?"), ({"audio": [1]}, "'audio'")):
        with pytest.raises(TypeError, match=re.escape(message)):
            processor(images=body_array(), text="nodule", affine=AFFINE, **unknown)


def test_settings_of_the_parts_are_kept():
    array = body_array()
    negative = make_processor(image_settings={"rescale_factor": -1.0})
    assert torch.equal(
        negative(images=array, affine=AFFINE)["pixel_values"],
        -make_processor()(images=array, affine=AFFINE)["pixel_values"],
    )
    padded = make_processor(tokenizer_settings={"padding": "max_length", "max_length": 20})
    assert padded(text="nodule", padding="max_length")["input_ids"].shape == (1, 20)


def test_call_is_typed_like_transformers_processors():
    parameters = inspect.signature(T3DProcessor.__call__).parameters.values()
    (keywords,) = (p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD)
    assert keywords.annotation.__origin__ is Unpack
    assert T3DImageProcessor.valid_kwargs.__name__ == "T3DImageProcessorKwargs"


@pytest.mark.parametrize("loader", [T3DProcessor, AutoProcessor])
def test_saved_processor_loads_as_it_was(tmp_path, loader):
    first = make_processor(
        image_settings={"spacing": None, "windows": [(-1000, 1000), (-160, 240)], "view_sampling": "overlapping"},
        report_sections="findings",
        min_report_words=3,
        max_report_tokens=77,
        present_template="there is {}",
        absent_template="there is no {}",
    )
    first.save_pretrained(tmp_path)
    modeling_t3d.T3DConfig.from_preset("tiny").save_pretrained(tmp_path)
    second = loader.from_pretrained(tmp_path)
    assert isinstance(second, T3DProcessor)
    assert second.to_dict() == first.to_dict()
    assert second.report_sections == "findings"
    assert second.max_report_tokens == 77
    assert second.image_processor.spacing is None
    assert second.describe() == first.describe()
    arguments = {"images": body_array(), "text": "the nodule", "affine": AFFINE, "views": 2, "seed": 1}
    expected, found = first(**arguments), second(**arguments)
    assert set(expected) == set(found)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["image_processor"]["image_processor_type"] == "T3DImageProcessor"
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), T3DImageProcessor)
    assert AutoTokenizer.from_pretrained(tmp_path)("nodule")["input_ids"] == make_tokenizer()("nodule")["input_ids"]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ("both", "Small  left effusion. No nodule seen. Left effusion, nothing else new."),
        ("findings", "Small left effusion. No nodule seen."),
        ("impression", "Left effusion, nothing else new."),
    ],
)
def test_sections_make_the_report(sections, expected):
    findings, impression = "Small  left effusion.\n No nodule seen. ", "Left effusion, nothing else new."
    assert compose_report(findings, impression, sections) == " ".join(expected.split())


def test_short_and_missing_reports():
    assert compose_report("Effusion is seen at left.", None) == "Effusion is seen at left."
    assert compose_report(None, "Effusion is seen at left.") == "Effusion is seen at left."
    assert compose_report("Effusion is seen at left.", None, "impression") is None
    assert compose_report("Effusion seen at left.", "") is None
    assert compose_report("Effusion.", None, min_report_words=1) == "Effusion."
    assert compose_report(None, "  ", min_report_words=0) is None
    with pytest.raises(ValueError, match="sections must be one of"):
        compose_report("a", "b", "all")


def test_long_reports_are_truncated_and_counted():
    processor = make_processor(max_report_tokens=6)
    encoding, truncated = processor.encode_reports(["nodule", "the lungs are clear", "the lungs are clear ."])
    assert truncated == 1
    assert encoding["input_ids"].shape == (3, 6)
    assert encoding["input_ids"][2, -1] == 3  # the end token stays
    assert make_processor().encode_reports(["the lungs are clear ."])[1] == 0
    short = make_processor(tokenizer_settings={"model_max_length": 4})
    assert short.encode_reports(["the lungs are clear ."])[1] == 1


def test_a_text_that_the_tower_cannot_take_is_refused():
    processor = make_processor(tokenizer_settings={"model_max_length": 6})
    assert "more than 6 tokens: truncated" in processor.describe()
    with pytest.raises(ValueError, match="a text has 8 tokens, and the text tower takes 6; pass truncation=True"):
        processor(text=["nodule", "the lungs are clear . nodule"])
    assert processor(text="the lungs are clear . nodule", truncation=True)["input_ids"].shape == (1, 6)
    assert processor(text="the lungs are clear")["input_ids"].shape == (1, 6)


def test_prompts():
    present, absent = make_processor().make_prompts(["pleural effusion", "nodule"])
    assert present == ["pleural effusion is present.", "nodule is present."]
    assert absent == ["pleural effusion is not present.", "nodule is not present."]
    assert make_processor().make_prompts(iter(["pleural effusion", "nodule"])) == (present, absent)
    for labels in ([], "nodule", ["nodule", " "], [1], iter(())):
        with pytest.raises(ValueError, match="labels must be"):
            make_processor().make_prompts(labels)


def test_prompts_carry_descriptions_and_keep_them_when_saved(tmp_path):
    descriptions = {"Pleural Effusion": "fluid around a lung"}
    processor = make_processor(finding_descriptions=descriptions)
    present, absent = processor.make_prompts(["pleural effusion", "nodule"])
    assert present == ["pleural effusion (fluid around a lung) is present.", "nodule is present."]
    assert absent == ["pleural effusion (fluid around a lung) is not present.", "nodule is not present."]
    assert "1 findings described" in processor.describe()
    processor.save_pretrained(tmp_path)
    assert T3DProcessor.from_pretrained(tmp_path).finding_descriptions == descriptions


def test_descriptions_are_read_from_a_file(tmp_path):
    own = Path(__file__).resolve().parents[1] / "examples" / "finding_descriptions" / "ct.json"
    assert read_descriptions(own)["pleural effusion"] == "fluid between lung and chest wall"
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "the file must map findings"),
        ('{"a": 1}', "must map findings"),
    ):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=rf"wrong\.json: .*{message}"):
            read_descriptions(tmp_path / "wrong.json")
    with pytest.raises(ValueError, match=r"none\.json: cannot be opened"):
        read_descriptions(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"finding_descriptions": {"nodule": " "}}, "finding_descriptions must map findings to descriptions"),
        ({"report_sections": "all"}, "report_sections must be one of"),
        ({"present_template": "present"}, "present_template must hold"),
        ({"absent_template": "{} {}"}, "absent_template must hold"),
    ],
)
def test_wrong_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_processor(**settings)


def test_swapped_parts_are_refused():
    with pytest.raises(TypeError, match="image_processor"):
        T3DProcessor(make_tokenizer(), T3DImageProcessor())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_report_tokens": 0}, "max_report_tokens must be a whole number, 1 or more, got 0"),
        ({"max_report_tokens": -5}, "max_report_tokens must be"),
        ({"min_report_words": -1}, "min_report_words must be a whole number, 0 or more, got -1"),
    ],
)
def test_limits_of_reports_that_are_none_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_processor(**settings)


def test_no_report_at_all_is_refused():
    with pytest.raises(ValueError, match="there are no reports to encode"):
        make_processor().encode_reports([])
