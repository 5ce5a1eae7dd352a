# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The phantoms' reports: true, varied, free of the evaluation's sentences; and the tokenizer trained on them."""

import re

import numpy as np
import pytest

from modeling_t3d.data.phantom_canvas import RandomDraws
from modeling_t3d.data.phantom_reports import describe
from modeling_t3d.data.phantom_wordings import WORDINGS
from modeling_t3d.data.phantoms import (
    EVALUATION_PROMPTS,
    FINDINGS,
    generate_phantom,
    phantom_seeds,
    train_phantom_tokenizer,
)

COARSE = (12, 12, 12)  # reports do not depend on the grid


@pytest.fixture(scope="module")
def coarse():
    """A thousand studies without a fine grid."""
    return [generate_phantom(seed, shape=COARSE) for seed in phantom_seeds("test", 1000)]


@pytest.fixture(scope="module")
def reports(coarse):
    return [f"{phantom.findings_text}\n{phantom.impression_text}" for phantom in coarse]


# What a report must mention, one of them, for each finding that is there.
MARKS = {
    "emphysema": "emphysem",
    "pleural effusion": "pleural (effusion|fluid|space)",
    "cardiomegaly": "cardiomegaly|enlarge",
    "consolidation": "consolidation|opacity",
    "ascites": "ascites|fluid",
    "hepatic steatosis": "steatosis|fatty",
    "lung nodule": "nodule",
    "liver cyst": "cyst",
    "liver metastasis": "metasta",
    "kidney cyst": "cyst",
    "kidney stone": "stone|calcul|nephrolithiasis",
    "coronary calcification": "coronary|artery",
    "aortic calcification": "aort",
    "lymphadenopathy": "lymph node|lymphadenopathy",
}


def test_reports_state_what_is_there_and_never_deny_it(coarse):
    for phantom in coarse:
        text = f"{phantom.findings_text} {phantom.impression_text}".lower()
        sentences = re.split(r"[.\n:](?=\s|$)|;", phantom.findings_text.lower())
        for name, label in phantom.labels.items():
            lesions = [lesion for lesion in phantom.findings if lesion.finding == name]
            if label:
                key = MARKS[name]
                assert re.search(key, text), (name, phantom.findings_text)
                for denied in WORDINGS[name].absent:
                    for sentence in sentences:
                        if re.match(r"\s*(no|without|absent|not|there is no)\b", sentence):
                            assert not re.search(rf"\b{re.escape(denied)}\b", sentence), (name, sentence)
            else:
                assert not lesions


def test_reports_vary(coarse, reports):
    assert len(set(reports)) > 0.99 * len(reports)
    words = [len(report.split()) for report in reports]
    assert min(words) >= 15
    assert max(words) <= 300
    # Absent findings are denied in some reports and left out in others.
    for name in FINDINGS:
        absent = [r.lower() for r, p in zip(reports, coarse, strict=True) if not p.labels[name]]
        named = np.mean([any(noun in report for noun in WORDINGS[name].absent) for report in absent])
        assert 0.2 < named < 0.95, (name, named)
    assert 0.2 < np.mean(["\n" in phantom.findings_text for phantom in coarse]) < 0.5
    openings = {report.split(".")[0] for report in reports}
    assert len(openings) > 500


def test_sizes_and_sides_in_the_text_are_those_of_the_lesions(coarse):
    draws = RandomDraws(77)
    checked = 0
    for phantom in coarse[:600]:
        lesions = [lesion for lesion in phantom.findings if lesion.finding == "kidney stone"]
        if len(lesions) == 1:
            text = describe("kidney stone", lesions, draws)
            size = round(lesions[0].size_mm)
            assert f"{size} mm" in text or f"{size / 10:.1f} cm" in text
            assert lesions[0].side in text.lower()
            assert ("left" if lesions[0].side == "right" else "right") not in text.lower()
            checked += 1
    assert checked >= 10


def test_prompts_come_in_pairs_for_every_finding():
    assert set(EVALUATION_PROMPTS) == set(FINDINGS)
    for name, pairs in EVALUATION_PROMPTS.items():
        assert len(pairs) >= 3
        for positive, negative in pairs:
            assert name in positive.lower()
            assert name in negative.lower()
            assert positive != negative


def test_prompt_wordings_never_occur_in_reports(reports):
    """Neither the sentences nor their frames around any of the finding's names, though every word is known."""
    check_wordings(reports)


@pytest.mark.slow
def test_prompt_wordings_never_occur_in_many_reports():
    phantoms = (generate_phantom(seed, shape=COARSE) for seed in phantom_seeds("validation", 6000))
    check_wordings([f"{phantom.findings_text}\n{phantom.impression_text}" for phantom in phantoms])


def check_wordings(reports):
    spoken = " ".join(reports).lower()
    spoken = " ".join(re.findall(r"[a-z]+", spoken))
    words = set(spoken.split())
    names = sorted({noun for wording in WORDINGS.values() for noun in wording.absent} | set(FINDINGS), key=len)
    for name, pairs in EVALUATION_PROMPTS.items():
        for prompt in (prompt for pair in pairs for prompt in pair):
            plain = " ".join(re.findall(r"[a-z]+", prompt.lower()))
            assert set(plain.split()) <= words, (prompt, set(plain.split()) - words)
            for other in names:
                assert plain.replace(name, other) not in spoken
    for frame in (" is present", " is not present", "is positive for", "is negative for", "there are signs of"):
        assert frame not in spoken


def test_tokenizer_is_deterministic_small_and_lossless(reports, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_phantom_tokenizer(reports[:800], vocab_size=1200)
    again = train_phantom_tokenizer(reports[:800], vocab_size=1200)
    assert tokenizer.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    assert len(tokenizer) <= 1200
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "No Pleural effusion; 1.5 cm nodule (right upper lobe)."
    encoded = loaded(text, "Second.", return_tensors="np")
    assert encoded["input_ids"].tolist() == tokenizer(text, "Second.", return_tensors="np")["input_ids"].tolist()
    assert set(encoded) == {"input_ids", "token_type_ids", "attention_mask"}
    assert loaded.convert_ids_to_tokens(encoded["input_ids"][0])[0] == "[CLS]"
    assert encoded["input_ids"][0, -1] == loaded.sep_token_id
    assert encoded["token_type_ids"].max() == 1
    assert loaded.unk_token_id not in loaded(reports).input_ids[0]
    prompts = [prompt for pairs in EVALUATION_PROMPTS.values() for pair in pairs for prompt in pair]
    assert not any(loaded.unk_token_id in ids for ids in loaded(reports[800:] + prompts).input_ids)
    assert max(len(ids) for ids in loaded(reports).input_ids) <= 512
    assert loaded.decode(loaded(reports[0]).input_ids, skip_special_tokens=True).split() == reports[0].lower().split()
    batch = loaded(["a", "no effusion"], padding=True)
    assert batch["input_ids"][0][-1] == loaded.pad_token_id
