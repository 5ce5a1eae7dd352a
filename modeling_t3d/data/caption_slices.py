# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Captions by a Hugging Face image captioner that looks at axial slices."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..geometry_t3d import VolumeError
from .captions import CaptionError
from .manifest import ManifestRow
from .source_hashes import content_hash
from .sources import read_row


class SliceCaptioner:
    """
    What an image-to-text model says about evenly spaced axial slices, one sentence each, repetitions left out. Greedy:
    the same slices give the same caption.

    Slices are shown as radiologists see them: front up, the patient's right on the left of the picture.

    Args:
        model: a model of Transformers that generates text from `pixel_values` (encoder-decoder, BLIP, GIT ...).
        image_processor: its image processor.
        tokenizer: its tokenizer.
        num_slices (`int`, defaults to 3): per volume, at equal distances from bottom to top [choice].
        window (two `float`, *optional*, defaults to -160 and 240): HU that become black and white; `None`, for volumes
            that are no CT, takes the 1st and the 99th percentile of the volume.
        prompt (`str`, *optional*): what the text begins with, for models that take one; left out of the caption.
        max_new_tokens (`int`, defaults to 64): longest text of a slice.
        name (`str`, *optional*): of the model, for the record of settings.
    """

    def __init__(
        self,
        model: Any,
        image_processor: Any,
        tokenizer: Any,
        *,
        num_slices: int = 3,
        window: Sequence[float] | None = (-160.0, 240.0),
        prompt: str | None = None,
        max_new_tokens: int = 64,
        name: str | None = None,
    ) -> None:
        if num_slices < 1 or max_new_tokens < 1:
            raise CaptionError(
                f"num_slices and max_new_tokens must be at least 1, got {num_slices} and {max_new_tokens}"
            )
        if window is not None and (len(window) != 2 or window[0] >= window[1]):
            raise CaptionError(f"window must be two rising numbers of HU or None, got {tuple(window)}")
        self.model = model.eval()
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.num_slices = num_slices
        self.window = None if window is None else tuple(map(float, window))
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.name = name or type(model).__name__

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | PathLike, *, device: str | torch.device = "cpu", **settings: Any
    ) -> "SliceCaptioner":
        """A captioner from a folder or the Hub; `settings` as for the class."""
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        name = str(name_or_path)
        try:
            model = AutoModelForImageTextToText.from_pretrained(name)
            parts = AutoImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CaptionError(
                f"{name}: is no image captioner that can be loaded ({reason}); name a folder or Hub id that holds an "
                "image-to-text model, its image processor and its tokenizer"
            ) from None
        return cls(model.to(device), *parts, **{"name": name, **settings})

    def settings(self) -> dict[str, Any]:
        """See [`CaptionSource`]."""
        names = ("name", "num_slices", "window", "prompt", "max_new_tokens")
        found = {name: getattr(self, name) for name in names}
        folder = Path(self.name)
        if folder.is_dir():  # which may come to hold other weights
            found["content"] = content_hash(folder)
        return {"source": "slices", **found, "window": None if self.window is None else list(self.window)}

    def __call__(self, row: ManifestRow, record: Mapping[str, Any]) -> str:
        """See [`CaptionSource`]."""
        try:
            array = read_row(row).to_canonical().array
        except VolumeError as error:
            raise CaptionError(f"row {row.number}: {error}") from None
        texts = [" ".join(text.split()) for text in self.describe(self.slices(array))]
        sentences = [f"{text[:1].upper()}{text[1:]}" for text in dict.fromkeys(texts) if text.strip(" .")]
        return " ".join(text if text[-1] in ".!?" else f"{text}." for text in sentences)

    def slices(self, array: np.ndarray) -> list[np.ndarray]:
        """Pictures `(height, width, 3)` in uint8 of a canonical volume `(z, y, x)`."""
        low, high = np.percentile(array, (1, 99)) if self.window is None else self.window
        heights = [(place + 1) * array.shape[0] // (self.num_slices + 1) for place in range(self.num_slices)]
        pictures = []
        for height in dict.fromkeys(heights):
            # Rows run from front to back, columns from the patient's right to the left.
            values = array[height, ::-1, ::-1].astype(np.float32)
            grey = np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255
            pictures.append(np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2))
        return pictures

    @torch.no_grad()
    def describe(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """What the model writes about each picture."""
        device = next(self.model.parameters()).device
        inputs = dict(self.image_processor(images=list(pictures), return_tensors="pt"))
        prompt = ""
        if self.prompt is not None:
            prompt = self.prompt
            # Without the end of text that some tokenizers add: the model is to go on.
            ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            inputs["input_ids"] = torch.tensor([ids] * len(pictures))
        inputs = {name: value.to(device) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": self.max_new_tokens}
        ids = self.model.generate(**inputs, **options)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip().removeprefix(prompt).strip() for text in texts]


__all__ = ["SliceCaptioner"]
