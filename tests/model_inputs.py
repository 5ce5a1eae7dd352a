# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Tiny configurations and batches of the model tests."""

from typing import Any

import torch

from modeling_t3d.configuration_t3d import T3DConfig

TINY_VISION = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "stem_stride": 2}
TINY_TEXT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99}
TINY_VIT = {
    "encoder_type": "vit",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
}
TINY_CONTRAST = {"encoder_type": "local_contrast", "hidden_size": 16, "cell_size": 4, "grid_size": [2, 4, 4]}


def tiny_config(**overrides: Any) -> T3DConfig:
    """The preset `"tiny"`, smaller: a two-stage encoder of stride 4 and 16 channels, 16 joint dimensions."""
    vision = {**TINY_VISION, **overrides.pop("vision_config", {})}
    text = {**TINY_TEXT, **overrides.pop("text_config", {})}
    settings = {"projection_dim": 16, "projection_hidden_size": 32, "num_tma_heads": 2, "num_fusion_heads": 2}
    return T3DConfig.from_preset("tiny", vision_config=vision, text_config=text, **{**settings, **overrides})


def tiny_vit_config(**overrides: Any) -> T3DConfig:
    """The same around a two-layer vision transformer."""
    return _with_encoder(TINY_VIT, **overrides)


def tiny_contrast_config(**overrides: Any) -> T3DConfig:
    """The same around the encoder of local contrast, whose grid is that of the batch's global views."""
    return _with_encoder(TINY_CONTRAST, **overrides)


def _with_encoder(vision_config: dict[str, Any], **overrides: Any) -> T3DConfig:
    return T3DConfig(
        vision_config=vision_config,
        text_config=tiny_config().text_config,
        **{"projection_dim": 16, "projection_hidden_size": 32, "num_tma_heads": 2, "num_fusion_heads": 2, **overrides},
    )


def tiny_batch(num_pairs: int = 3, num_views: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pairs with uneven reports, global views of 8 x 16 x 16 voxels (z, y, x) and local ones of 8 x 8 x 8."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (num_pairs,), generator=generator)
    attention_mask = (torch.arange(8) < lengths[:, None]).long()
    return {
        "input_ids": torch.randint(3, 99, (num_pairs, 8), generator=generator) * attention_mask,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(num_pairs, 1, 8, 16, 16, generator=generator),
        "local_pixel_values": torch.randn(num_pairs, num_views, 1, 8, 8, 8, generator=generator),
        "local_mask": torch.ones(num_pairs, num_views, dtype=torch.bool),
        "local_positions": torch.rand(num_pairs, num_views, 6, generator=generator) * 2 - 1,
    }
