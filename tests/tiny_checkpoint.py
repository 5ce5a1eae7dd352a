# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""A tiny processor and a scan that fits it, for tests of whole checkpoints."""

from pathlib import Path

import numpy as np
from body_phantom import body_array, upright_affine
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from modeling_t3d import T3DImageProcessor, T3DProcessor
from modeling_t3d.geometry_t3d import Volume
from modeling_t3d.volume_io_t3d import write_nifti

SPACING = (6.0, 5.0, 5.0)
WORDS = "[PAD] [UNK] [CLS] [SEP] pleural effusion lung nodule emphysema scan shows no is not present absent . ,"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = WORDS.split()
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )


def tiny_processor() -> T3DProcessor:
    """Views so small that a scan of `tiny_volume` makes a grid of eight tiles."""
    image_processor = T3DImageProcessor(spacing=SPACING, global_size=(16, 16, 16), local_size=(16, 16, 16))
    return T3DProcessor(image_processor, tiny_tokenizer())


def tiny_volume(seed: int = 0, shape: tuple[int, int, int] = (30, 28, 32)) -> Volume:
    return Volume(body_array(shape, seed=seed), upright_affine(SPACING))


def tiny_scan(folder: Path, seed: int = 0, shape: tuple[int, int, int] = (30, 28, 32)) -> Path:
    path = folder / f"scan_{seed}.nii.gz"
    write_nifti(tiny_volume(seed, shape), path)
    return path


def storage_order(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels in (x, y, z) order with the affine that belongs to it, as a NIfTI reader would give them."""
    return volume.array.transpose(2, 1, 0), volume.affine[:, [2, 1, 0, 3]]
