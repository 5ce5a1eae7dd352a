# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Named settings of a configuration: sizes of the towers, and objectives of the publications. Values alone.

Each value of an objective is marked: [paper] stated by a publication or its code, [habit] done by the same authors'
code for sister methods, [choice] of this re-implementation.
"""

from typing import Any

# RoBERTa-base, which RadBERT-RoBERTa has too.
ROBERTA_LAYOUT: dict[str, Any] = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision_config": {
            "embedding_size": 16,
            "hidden_sizes": [16, 32, 64, 128],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
            "stem_kernel_size": 3,
            "stem_pool": False,
            "num_norm_groups": 8,
        },
        "text_config": {
            "model_type": "bert",
            "vocab_size": 1024,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 256,
        },
        "projection_dim": 64,
        "projection_hidden_size": 128,
        "num_tma_heads": 4,
        "num_tir_heads": 4,
        "num_fusion_layers": 1,
        "num_fusion_heads": 4,
    },
    "base": {
        "vision_config": {},
        "text_config": {"model_type": "roberta", **ROBERTA_LAYOUT},
    },
    "base-batchnorm": {
        "vision_config": {"norm": "batch"},
        "text_config": {"model_type": "roberta", **ROBERTA_LAYOUT},
    },
}

OBJECTIVES: dict[str, dict[str, Any]] = {
    # arXiv 2312.01529v3: global alignment and text-informed multi-view alignment, both [paper].
    "v3": {
        "lambda_gca": 1.0,  # [choice]
        "lambda_tma": 1.0,  # [choice]
        "lambda_tir": 0.0,  # [paper]: v3 restores nothing
        "tma_query": "text",  # [choice]: the direction is not published
    },
    # arXiv 2312.01529v1: text-informed contrast of two views, and text-informed restoration; both [paper].
    "v1": {
        "lambda_gca": 0.0,  # [paper]: no global alignment
        "lambda_sentences": 0.0,  # [choice]: sentences are aligned globally too
        "lambda_tma": 1.0,  # [choice]
        "lambda_tir": 1.0,  # [choice]
        "tma_query": "vision",  # [paper]: the view is informed by the text
        "tma_loss": "supcon",  # [paper]: contrastive
    },
    # arXiv 2306.04811 and its code: clip(Z1, T) + clip(Z2, T) + 0.01 barlow(Z1, Z2).
    "gtgm": {
        "gca_views": "local",  # [paper]: each perturbed crop is aligned with the text
        "lambda_gca": 1.0,  # [paper]: weight 1 for each of the crops
        "lambda_sentences": 0.0,  # [choice]
        "lambda_tma": 0.01,  # [paper]: its code's weight of the negative-free part
        "lambda_tir": 0.0,  # [paper]
        "tma_query": "mean",  # [paper]: on the crops' embeddings themselves, without text
        "tma_loss": "barlow",  # [paper]: negative-free
    },
}

# Local views per volume that an objective was published with; a setting of the image processor.
NUM_LOCAL_VIEWS: dict[str, int] = {"v3": 4, "v1": 2, "gtgm": 2}  # [choice], [paper], [paper]

__all__ = ["NUM_LOCAL_VIEWS", "OBJECTIVES", "PRESETS", "ROBERTA_LAYOUT"]
