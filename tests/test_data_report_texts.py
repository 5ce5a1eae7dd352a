# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Training texts: sampled sentences, findings that explain themselves, and identities that follow the text."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_t3d.data.datasets import PretrainingSample, stable_id
from modeling_t3d.data.report_texts import ReportTexts, TextCollator, explain_findings
from modeling_t3d.data.texts import split_sentences

REPORT = "Small left pleural effusion. No consolidation. The heart is normal. No pericardial effusion."
DESCRIPTIONS = {"effusion": "fluid", "pleural effusion": "fluid around a lung", "Consolidation": "airless lung"}


def sample(index: int = 0, epoch: int = 0, text: str = REPORT) -> PretrainingSample:
    return PretrainingSample(
        prepared=None,
        text=text,
        study_id=index,
        report_id=stable_id(text),
        view_seed=(7, 0, epoch, index),
        batch_seed=(7, 1, epoch, 0),
        sentences=("The heart is normal.",),
    )


def test_findings_are_explained_where_they_are_named_first():
    assert explain_findings(REPORT, DESCRIPTIONS) == (
        "Small left pleural effusion (fluid around a lung). No consolidation (airless lung). The heart is normal. "
        "No pericardial effusion (fluid)."
    )
    assert explain_findings("PLEURAL EFFUSION, pleural effusion", DESCRIPTIONS) == (
        "PLEURAL EFFUSION (fluid around a lung), pleural effusion"
    )
    assert explain_findings("effusions and transeffusion", DESCRIPTIONS) == "effusions and transeffusion"
    assert (
        explain_findings("Small pleural\neffusion.", DESCRIPTIONS) == "Small pleural\neffusion (fluid around a lung)."
    )
    assert explain_findings("PLEURAL EFFUSİON", DESCRIPTIONS) == "PLEURAL EFFUSİON (fluid around a lung)"
    assert explain_findings(REPORT, {}) == REPORT


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from(["effusion", "pleural effusion", "consolidation", "heart", "no", "(", "."]), max_size=9)
)
def test_explaining_only_adds_brackets(words):
    text = " ".join(words)
    explained = explain_findings(text, DESCRIPTIONS)
    for description in sorted(DESCRIPTIONS.values(), key=len, reverse=True):
        explained = explained.replace(f" ({description})", "")
    assert explained == text


def test_sampled_sentences_are_others_in_every_epoch_and_equal_for_equal_reports():
    texts = ReportTexts(sample_sentences=True)
    drawn = [texts(sample(epoch=epoch)) for epoch in range(20)]
    assert len({one.text for one in drawn}) > 4
    for one in drawn:
        assert set(split_sentences(one.text)) <= set(split_sentences(REPORT))
        assert one.report_id == stable_id(one.text)
        assert one.sentences == ("The heart is normal.",)
    assert texts(sample(index=1)).text == texts(sample(index=2)).text
    other_run = replace(sample(), view_seed=(8, 0, 0, 0))
    assert any(
        texts(replace(other_run, view_seed=(8, 0, epoch, 0))).text != one.text for epoch, one in enumerate(drawn)
    )


def test_a_share_of_the_texts_is_explained():
    texts = ReportTexts(descriptions=DESCRIPTIONS, description_probability=0.3)
    explained = [texts(sample(epoch=epoch)) for epoch in range(200)]
    whole = explain_findings(REPORT, DESCRIPTIONS)
    assert {one.text for one in explained} == {REPORT, whole}
    assert 35 < sum(one.text == whole for one in explained) < 85
    assert all(one.report_id == stable_id(one.text) for one in explained)


def test_without_settings_nothing_changes():
    one = sample()
    assert ReportTexts()(one) == one


def test_the_collator_is_given_the_changed_samples():
    collated = TextCollator(list, ReportTexts(descriptions=DESCRIPTIONS, description_probability=1.0))([sample()])
    assert [one.text for one in collated] == [explain_findings(REPORT, DESCRIPTIONS)]


def test_a_wrong_probability_is_refused():
    with pytest.raises(ValueError, match=r"texts\.description_probability must lie in \[0, 1\], got 2"):
        ReportTexts(description_probability=2)
