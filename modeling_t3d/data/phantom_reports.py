# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Writes a phantom's report from what was painted, and trains the tokenizer that reads such reports."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .phantom_canvas import RandomDraws
from .phantom_findings import FINDINGS, Lesion
from .phantom_wordings import (
    AFFIRMATIONS,
    COMPARISONS,
    NEGATIONS,
    NORMAL_ENDINGS,
    NORMAL_IMPRESSIONS,
    REGIONS,
    TECHNIQUES,
    WORDINGS,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_report(
    lesions: Sequence[Lesion], phase: str, draws: RandomDraws, *, follow_up: bool = False
) -> tuple[str, str]:
    """Findings and impression in words.

    Every finding that is there is stated in the findings; one that is not is denied in about half of the reports and
    otherwise left out.

    Args:
        lesions (`Sequence[Lesion]`): what was painted.
        phase (`str`): contrast phase.
        draws (`RandomDraws`): decides the wording.
        follow_up (`bool`): whether the patient has an earlier study.
    """
    found = {name: [lesion for lesion in lesions if lesion.finding == name] for name in FINDINGS}
    regions = list(REGIONS)
    if draws.chance(0.35):
        regions = draws.shuffled(regions)
    elif draws.chance(0.3):
        regions = regions[5:] + regions[:5]
    headed, wordy = draws.chance(0.35), draws.uniform(0.15, 0.6)
    parts = []
    if draws.chance(0.25):
        parts.append(draws.choice(TECHNIQUES[phase]))
    if follow_up and draws.chance(0.6):
        parts.append(draws.choice(COMPARISONS))
    denied = draws.uniform(0.3, 0.75)
    for region in regions:
        sentences = region_sentences(region, found, draws, denied, wordy)
        if sentences and headed:
            parts.append(f"{draws.choice(REGIONS[region][0])}: " + " ".join(sentences))
        else:
            parts.extend(sentences)
    return ("\n" if headed else " ").join(parts), impression(found, draws)


def region_sentences(
    region: str, found: dict[str, list[Lesion]], draws: RandomDraws, denied: float, wordy: float
) -> list[str]:
    """What one part of the findings says: what is there, what is not, what is normal."""
    names = [name for name, wording in WORDINGS.items() if wording.region == region]
    present = draws.shuffled([name for name in names if found[name]])
    sentences = [describe(name, found[name], draws) for name in present]
    if present and draws.chance(0.04):
        sentences.append(sentence(draws.choice(AFFIRMATIONS).format(name=present[0])))
    absent = [name for name in names if not found[name] and draws.chance(denied)]
    if absent:
        words = [draws.choice(WORDINGS[name].absent) for name in draws.shuffled(absent)]
        if draws.chance(0.6):
            words = [join_words(words, "or" if draws.chance(0.7) else "and")]
        sentences += [sentence(draws.choice(NEGATIONS).format(names=word)) for word in words]
    for statement in REGIONS[region][1]:
        if draws.chance(0.5 * wordy) and (statement.startswith("+") or not present):
            sentences.append(statement.removeprefix("+"))
    return draws.shuffled(sentences) if draws.chance(0.3) else sentences


def describe(name: str, lesions: Sequence[Lesion], draws: RandomDraws, *, short: bool = False) -> str:
    """One sentence about all occurrences of a finding."""
    wording = WORDINGS[name]
    largest = max(lesions, key=lambda lesion: lesion.size_mm)
    sides = {lesion.side for lesion in lesions}
    side = largest.side if len(sides) == 1 else "bilateral"
    places = draws.shuffled(list(dict.fromkeys(lesion.place for lesion in lesions)))
    several = len(lesions) > 1 and bool(wording.many)
    template = draws.choice(wording.summary if short else wording.many if several else wording.one)
    degree = wording.degrees[min(int(3 * largest.severity), 2)]
    if name == "cardiomegaly" and "{degree} enlarged" not in template:
        degree = {"mildly": "mild", "moderately": "moderate", "markedly": "marked"}[degree]
    return sentence(
        template.format(
            degree=degree,
            side=side,
            sides="on both sides" if side == "bilateral" else f"on the {side}",
            size=measure(largest.size_mm, draws),
            place=largest.place,
            places=join_words(places, "and"),
            count=NUMBER_WORDS.get(len(lesions), "multiple"),
        )
    )


def measure(size: float, draws: RandomDraws) -> str:
    """A length in mm or cm, rounded to whole mm as radiologists do."""
    millimetres = round(size)
    return f"{millimetres / 10:.1f} cm" if draws.chance(0.3) else f"{millimetres} mm"


def impression(found: dict[str, list[Lesion]], draws: RandomDraws) -> str:
    """The conclusion: nearly all findings in short, or a statement of normality."""
    present = [name for name in FINDINGS if found[name]]
    if not present:
        return draws.choice(NORMAL_IMPRESSIONS)
    kept = [name for name in draws.shuffled(present) if draws.chance(0.92)] or present[:1]
    lines = [describe(name, found[name], draws, short=True) for name in kept]
    if draws.chance(0.2):
        lines.append(draws.choice(NORMAL_ENDINGS))
    if len(lines) > 1 and draws.chance(0.4):
        return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))
    return " ".join(lines)


def join_words(words: Sequence[str], last: str) -> str:
    """ "a", "a or b", "a, b or c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def train_phantom_tokenizer(reports: Iterable[str], vocab_size: int = 2000) -> "PreTrainedTokenizerFast":
    """Train a lower-casing byte-pair tokenizer on reports, for a BERT text model.

    The same reports in the same order give the same tokenizer. `len(tokenizer)` is at most `vocab_size`.

    Example:
        >>> tokenizer = train_phantom_tokenizer(["No pleural effusion.", "Small pleural effusion."], vocab_size=100)
        >>> tokenizer.decode(tokenizer("No effusion.").input_ids, skip_special_tokens=True)
        'no effusion.'
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789.,:;()-/'▁"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(reports, trainer=trainer)
    begin, end = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", begin), ("[SEP]", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


__all__ = ["describe", "train_phantom_tokenizer", "write_report"]
