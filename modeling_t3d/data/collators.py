# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The collators of a training run: what an objective reads, and in what order texts, sides and views are changed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .augmentation import AugmentingCollator, BatchAugmentation
from .datasets import PretrainingCollator
from .perturbation import CropPerturbation, PerturbingCollator
from .report_texts import ReportTexts, TextCollator

Batch = dict[str, torch.Tensor]
Collator = Callable[[list[Any]], Batch]


def objective_collator(config: Any, processor: Any) -> PretrainingCollator:
    """
    The collator of what a model's terms read, refusing what they could not be computed from.

    Args:
        config ([`T3DConfig`]): `lambda_gca`, `lambda_tma`, `lambda_tir`, `gca_views` and the settings of restoration.
        processor ([`T3DProcessor`]): its image processor says how many local views of what size there are.
    """
    views = processor.image_processor
    reads_views = config.lambda_tma > 0 or config.lambda_tir > 0 or config.gca_views == "local"
    if reads_views and views.num_local_views < 1:
        raise ValueError("the objective reads local views; set image_processor.num_local_views to 1 or more")
    if config.lambda_tma > 0 and views.num_local_views < 2:
        raise ValueError(
            f"multi-view alignment needs at least 2 views of a volume, got image_processor.num_local_views="
            f"{views.num_local_views}; raise it or set lambda_tma=0"
        )
    if config.lambda_tir > 0 and max(views.local_size) <= config.tir_block_size:
        raise ValueError(
            f"tir_block_size={config.tir_block_size} covers a whole local view of {tuple(views.local_size)} voxels; "
            "choose a smaller tir_block_size or a larger image_processor.local_size"
        )
    return PretrainingCollator(
        processor,
        num_local_views=None if reads_views or config.view_fusion != "global" else 0,
        global_views=(config.lambda_gca > 0 and config.gca_views == "volume") or config.lambda_sentences > 0,
        corruption_seeds=config.lambda_tir > 0,
    )


def changing_collator(
    collator: Collator,
    *,
    augmentation: Mapping[str, Any] | None = None,
    crop_perturbation: Mapping[str, Any] | None = None,
    texts: Mapping[str, Any] | None = None,
    descriptions: Mapping[str, str] | None = None,
) -> tuple[Collator, Callable[[Batch], Batch] | None]:
    """
    A collator of changed samples, and what changes batches on their device.

    Sides are exchanged first, in views and texts; then texts are sampled and described.

    Args:
        collator (callable): samples -> batch.
        augmentation (`dict`, *optional*): of [`BatchAugmentation`]; empty for none.
        crop_perturbation (`dict`, *optional*): of [`CropPerturbation`]; `None` for none.
        texts (`dict`, *optional*): of [`ReportTexts`]; empty for none.
        descriptions (`Mapping[str, str]`, *optional*): finding -> what it is, for `texts`.
    """
    if augmentation and crop_perturbation is not None:
        raise ValueError("augmentation and crop_perturbation both change and flip the views; give one")
    if texts:
        collator = TextCollator(collator, ReportTexts(**texts, descriptions=descriptions or {}))
    if crop_perturbation is not None:
        return PerturbingCollator(collator, CropPerturbation(**crop_perturbation)), None
    if not augmentation:
        return collator, None
    transform = BatchAugmentation(**augmentation)
    return AugmentingCollator(collator, transform), transform


__all__ = ["changing_collator", "objective_collator"]
