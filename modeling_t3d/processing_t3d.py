# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""T3DProcessor: the image processor and a tokenizer as one, with the report's sections and the prompt templates.

Which part of a report is text, how long it may be and how a label becomes a prompt are saved with the checkpoint, so
that training and evaluation cannot disagree.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.tokenization_utils_base import BatchEncoding

from .image_processing_t3d import LocalViews, PreparedVolume, T3DImageProcessorKwargs
from .image_settings_t3d import refuse_unknown
from .reassembly_t3d import Reassembled

REPORT_SECTIONS = ("both", "findings", "impression")
PRESENT_TEMPLATE = "{} is present."
ABSENT_TEMPLATE = "{} is not present."


def compose_report(
    findings: str | None, impression: str | None, sections: str = "both", min_report_words: int = 5
) -> str | None:
    """The text of one report: findings, then impression where both exist.

    Args:
        findings, impression (`str`): the two sections; `None` or blank where the report lacks one.
        sections (`"both"`, `"findings"` or `"impression"`): which of them make the text. Under `"both"` one is enough.
        min_report_words (`int`, defaults to 5): a shorter text is no report.

    Returns:
        `str`, white space collapsed; `None` when too little is left, which the caller drops and counts.

    Example:

    ```python
    >>> from modeling_t3d.processing_t3d import compose_report

    >>> compose_report("Small left effusion.", "Effusion, no pneumothorax.")
    'Small left effusion. Effusion, no pneumothorax.'
    >>> compose_report("Normal.", None) is None
    True

    ```
    """
    if sections not in REPORT_SECTIONS:
        raise ValueError(f"sections must be one of {', '.join(REPORT_SECTIONS)}, got {sections!r}")
    chosen = {"both": (findings, impression), "findings": (findings,), "impression": (impression,)}[sections]
    words = " ".join(text for text in chosen if text).split()
    return " ".join(words) if len(words) >= max(1, min_report_words) else None


def described(label: str, descriptions: Mapping[str, str] | None) -> str:
    """
    A finding's name, with its description in brackets where there is one; case does not matter.

    Example:

    ```python
    >>> from modeling_t3d.processing_t3d import described

    >>> described("Ascites", {"ascites": "free fluid in the abdomen"})
    'Ascites (free fluid in the abdomen)'
    >>> described("gallstones", {"ascites": "free fluid in the abdomen"})
    'gallstones'

    ```"""
    known = {name.casefold(): text for name, text in (descriptions or {}).items()}
    description = known.get(label.casefold())
    return label if description is None else f"{label} ({description})"


def check_descriptions(descriptions: Any, where: str) -> dict[str, str]:
    """Finding -> description, or an error that begins with `where`."""
    if not isinstance(descriptions, Mapping) or not all(
        isinstance(text, str) and text.strip() for pair in descriptions.items() for text in pair
    ):
        raise ValueError(
            f'{where} must map findings to descriptions, such as {{"ascites": "free fluid in the abdomen"}}'
        )
    return dict(descriptions)


def read_descriptions(path: str | os.PathLike) -> dict[str, str]:
    """Finding -> description, from a JSON file of your own: an object of texts."""
    try:
        with open(path, encoding="utf-8") as file:
            return check_descriptions(json.load(file), f"{path}: the file")
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened ({error.strerror})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not JSON ({error.msg})") from None


_TEXT_DEFAULTS = {"padding": True, "return_tensors": "pt"}
_IMAGE_DEFAULTS = {"return_tensors": "pt"}


class T3DProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict, unread by mypy
    """Arguments of a call, by modality."""

    images_kwargs: T3DImageProcessorKwargs

    # Read here by Transformers before 5.23, and from the processor's class since.
    _defaults = {"text_kwargs": _TEXT_DEFAULTS, "images_kwargs": _IMAGE_DEFAULTS}  # noqa: RUF012


class T3DProcessor(ProcessorMixin):
    r"""
    One object for both modalities: `processor(images=..., text=..., views=...)`.

    Args:
        image_processor ([`T3DImageProcessor`]): volumes to views; its call arguments (`affine`, `views`, `seed` ...)
            are taken by this processor's call too.
        tokenizer (any Hugging Face tokenizer): text to `input_ids`; it pads to the longest and returns tensors.
        report_sections (`"both"`, `"findings"` or `"impression"`): which sections of a report are its text.
        min_report_words (`int`, defaults to 5): shorter reports are dropped and counted.
        max_report_tokens (`int`, defaults to 512): longer reports are truncated and counted.
        present_template, absent_template (`str`): how a label becomes a pair of prompts.
        finding_descriptions (`dict[str, str]`, *optional*): finding -> what it is. Prompts of such a label carry it in
            brackets, both of the pair; see `read_descriptions`.

    Example:

    ```python
    >>> import modeling_t3d
    >>> from transformers import AutoProcessor

    >>> processor = AutoProcessor.from_pretrained("path/to/checkpoint")  # doctest: +SKIP
    >>> inputs = processor(images="chest.nii.gz", text=["Emphysema is present."], views="grid")  # doctest: +SKIP

    ```
    """

    valid_processor_kwargs = T3DProcessorKwargs
    skip_tensor_conversion = (*ProcessorMixin.skip_tensor_conversion, "geometry")
    text_kwargs = _TEXT_DEFAULTS
    images_kwargs = _IMAGE_DEFAULTS

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        report_sections: str = "both",
        min_report_words: int = 5,
        max_report_tokens: int = 512,
        present_template: str = PRESENT_TEMPLATE,
        absent_template: str = ABSENT_TEMPLATE,
        finding_descriptions: dict[str, str] | None = None,
        **kwargs: Any,
    ):
        if report_sections not in REPORT_SECTIONS:
            raise ValueError(f"report_sections must be one of {', '.join(REPORT_SECTIONS)}, got {report_sections!r}")
        limits = (("min_report_words", min_report_words, 0), ("max_report_tokens", max_report_tokens, 1))
        for name, number, least in limits:
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{name} must be a whole number, {least} or more, got {number!r}")
        for name, template in (("present_template", present_template), ("absent_template", absent_template)):
            if template.count("{}") != 1:
                raise ValueError(f"{name} must hold {{}} exactly once, got {template!r}")
        self.report_sections = report_sections
        self.min_report_words = min_report_words
        self.max_report_tokens = max_report_tokens
        self.present_template = present_template
        self.absent_template = absent_template
        self.finding_descriptions = (
            None if finding_descriptions is None else check_descriptions(finding_descriptions, "finding_descriptions")
        )
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(  # type: ignore[override]
        self, images: Any = None, text: str | list[str] | None = None, **kwargs: Unpack[T3DProcessorKwargs]
    ) -> BatchFeature:
        """Volumes, texts or both, as tensors.

        Args:
            images: as [`T3DImageProcessor`] takes them.
            text (`str` or `list[str]`): reports or prompts.
            kwargs: arguments of the image processor's call and of the tokenizer's, or of one of them in
                `images_kwargs` and `text_kwargs`. Transformers would ignore an unknown one; here it is a `TypeError`.

        Raises:
            ValueError: for a text of more tokens than the text tower has positions for; `truncation=True` cuts it, and
                `encode_reports` cuts and counts.
        """
        known = (T3DProcessorKwargs, T3DImageProcessorKwargs, TextKwargs)
        names = [name for arguments in known for name in arguments.__annotations__]
        # A habit of Transformers' callers, of which its later versions take no notice.
        names.append("common_kwargs")
        refuse_unknown(kwargs, names, "argument", owner="T3DProcessor")
        inputs = super().__call__(images, text, **kwargs)
        limit = self.tokenizer.model_max_length
        # Without padding, which a caller may want as long as it is.
        longest = max((int(np.asarray(mask).sum()) for mask in inputs.get("attention_mask", ())), default=0)
        if longest > limit:
            raise ValueError(
                f"a text has {longest} tokens, and the text tower takes {limit}; pass truncation=True and "
                f"max_length={limit}, or call encode_reports, which cuts reports and counts those that it cut"
            )
        return inputs

    def prepare(self, *args: Any, **kwargs: Any) -> PreparedVolume:
        """What does not change between views of a volume; arguments as of [`T3DImageProcessor.prepare`]."""
        return self.image_processor.prepare(*args, **kwargs)

    def iterate_views(self, *args: Any, **kwargs: Any) -> Iterator[LocalViews]:
        """Local views of a prepared volume, a few at a time; arguments as of [`T3DImageProcessor.iterate_views`]."""
        return self.image_processor.iterate_views(*args, **kwargs)

    def reassemble(self, *args: Any, **kwargs: Any) -> Reassembled:
        """The outputs of tiles as one array on the scan's grid; arguments as of [`T3DImageProcessor.reassemble`]."""
        return self.image_processor.reassemble(*args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Writes the image processor's and this processor's settings, the tokenizer and the code; see Transformers."""
        saved = super().save_pretrained(save_directory, push_to_hub, **kwargs)
        # Saving leaves the code map behind as an attribute, though it describes the folder and not this object.
        self.__dict__.pop("auto_map", None)
        return saved

    @property
    def _report_limit(self) -> int:
        return min(self.max_report_tokens, self.tokenizer.model_max_length)

    def compose_report(self, findings: str | None, impression: str | None) -> str | None:
        """The text of a report under this processor's settings; `None` if it is too short."""
        return compose_report(findings, impression, self.report_sections, self.min_report_words)

    def encode_reports(self, reports: Sequence[str]) -> tuple[BatchEncoding, int]:
        """Tokenizes reports, truncated to `max_report_tokens` (or to what the tokenizer's model takes, if less).

        Returns:
            The padded encoding, as tensors, and the number of reports that were truncated.
        """
        if not reports:
            raise ValueError("there are no reports to encode: pass at least one")
        limit = self._report_limit
        lengths = [len(ids) for ids in self.tokenizer(list(reports), verbose=False)["input_ids"]]
        encoding = self.tokenizer(
            list(reports), padding=True, truncation=True, max_length=limit, return_tensors="pt", verbose=False
        )
        return encoding, sum(length > limit for length in lengths)

    def described_labels(self, labels: Sequence[str]) -> list[str]:
        """Labels as prompts name them: with the description that this processor has for them."""
        return [described(label, self.finding_descriptions) for label in labels]

    def make_prompts(self, labels: Sequence[str]) -> tuple[list[str], list[str]]:
        """One prompt that says a label is present and one that says it is not, for each label and its description."""
        names = [] if isinstance(labels, str) else list(labels)
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"labels must be a non-empty list of names, got {labels!r}")
        labels = self.described_labels(names)
        present = [self.present_template.replace("{}", label) for label in labels]
        absent = [self.absent_template.replace("{}", label) for label in labels]
        return present, absent

    def describe(self) -> str:
        """The whole contract of inputs in plain words: volumes, reports and prompts."""
        sections = {"both": "findings then impression", "findings": "findings", "impression": "impression"}
        return "\n".join(
            [
                self.image_processor.describe(),
                f"reports       {sections[self.report_sections]}; fewer than {self.min_report_words} words: dropped; "
                f"more than {self._report_limit} tokens: truncated",
                f"prompts       {self.present_template!r} against {self.absent_template!r}"
                + (f"; {len(self.finding_descriptions)} findings described" if self.finding_descriptions else ""),
            ]
        )


__all__ = [
    "ABSENT_TEMPLATE",
    "PRESENT_TEMPLATE",
    "T3DProcessor",
    "T3DProcessorKwargs",
    "compose_report",
    "described",
    "read_descriptions",
]
