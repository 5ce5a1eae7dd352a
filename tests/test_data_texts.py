# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Sentences of reports, random few of them, and their identities."""

import pytest

from modeling_t3d.data.texts import sample_sentences, split_sentences, stable_id

REPORT = "Small left effusion. No consolidation. The heart is normal. Liver cyst of 1.5 cm."


def test_sentences():
    text = "Nodule of 5.2 mm. No effusion!\nIMPRESSION: 1. Nodule. 2. Follow-up?"
    assert split_sentences(text) == [
        "Nodule of 5.2 mm.",
        "No effusion!",
        "IMPRESSION: 1. Nodule.",
        "2. Follow-up?",
    ]
    assert split_sentences("") == []
    assert split_sentences("10. Normal liver. Cyst in segment 5. No stone.") == [
        "10. Normal liver.",
        "Cyst in segment 5.",
        "No stone.",
    ]


def test_a_line_that_was_broken_for_its_length_ends_no_sentence():
    """Else half of a denial would be taken for a finding."""
    text = (
        "FINDINGS: The lungs are clear. There is no\npleural effusion. No evidence of acute pulmonary embolism or of\n"
        "Pancoast's tumour.\n\nIMPRESSION\nNo nodule"
    )
    assert split_sentences(text) == [
        "FINDINGS: The lungs are clear.",
        "There is no pleural effusion.",
        "No evidence of acute pulmonary embolism or of Pancoast's tumour.",
        "IMPRESSION",
        "No nodule",
    ]
    assert split_sentences("Clear lungs\nNo effusion\n- a cyst\n2) a stone") == [
        "Clear lungs",
        "No effusion",
        "- a cyst",
        "2) a stone",
    ]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("No evidence of pulm. embolism. Heart normal.", ["No evidence of pulm. embolism.", "Heart normal."]),
        ("No pleural effusion, e.g. empyema. Clear.", ["No pleural effusion, e.g. empyema.", "Clear."]),
        ("Nodule of approx. 5 mm. No change vs. Prior CT.", ["Nodule of approx. 5 mm.", "No change vs. Prior CT."]),
        ("Seen by Dr. Who (Fig. 3, im. 12). Stable.", ["Seen by Dr. Who (Fig. 3, im. 12).", "Stable."]),
        ("Z. n. Appendektomie. Kein Erguss.", ["Z. n. Appendektomie.", "Kein Erguss."]),
        ("Any stone? No. Cyst of 12 mm.", ["Any stone?", "No.", "Cyst of 12 mm."]),
        ("Hepatitis B. No ascites.", ["Hepatitis B.", "No ascites."]),
        ("no effusion . heart normal .", ["no effusion .", "heart normal ."]),  # reports without a capital
    ],
)
def test_an_abbreviation_ends_no_sentence(text, sentences):
    assert split_sentences(text) == sentences


def test_a_sample_holds_one_to_three_sentences_in_their_order():
    sentences = split_sentences(REPORT)
    texts = [sample_sentences(REPORT, (seed,)) for seed in range(90)]
    for text in texts:
        places = [sentences.index(sentence) for sentence in split_sentences(text)]
        assert places
        assert places == sorted(set(places))
    counts = [len(split_sentences(text)) for text in texts]
    assert min(counts.count(size) for size in (1, 2, 3)) > 15
    assert {sentence for text in texts for sentence in split_sentences(text)} == set(sentences)


def test_a_sample_depends_on_its_seed_alone():
    assert sample_sentences(REPORT, (1, 2)) == sample_sentences(REPORT, (1, 2))
    assert len({sample_sentences(REPORT, (1, seed)) for seed in range(20)}) > 5
    assert sample_sentences("One sentence only", (0,)) == "One sentence only"


def test_ids_are_stable():
    assert stable_id("No effusion.") == stable_id(" no  EFFUSION.\n") == 885827686028336322
    assert stable_id("a") != stable_id("b")
