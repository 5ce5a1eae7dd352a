# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What a configuration refuses: unknown keywords, shapes that are none, objectives that do not fit together."""

import difflib
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

# What `PreTrainedConfig` accepts beyond its dataclass fields, and the keys that saving, the Hub and, given a processor
# with a tokenizer, `Trainer` add to a config.
_BASE_KEYS = frozenset(
    {
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "custom_pipelines",
        "eos_token_id",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "pad_token_id",
        "quantization_config",
        "tie_word_embeddings",
        "torch_dtype",
        "use_cache",
    }
)

# What `from_pretrained` hands on besides fields; `pipeline` gives the configuration all that loading the model takes.
_LOADING_KEYS = frozenset(
    {
        "_from_auto",
        "_from_pipeline",
        "ignore_mismatched_sizes",
        "low_cpu_mem_usage",
        "max_memory",
        "offload_buffers",
        "offload_folder",
        "return_unused_kwargs",
        "use_safetensors",
        "variant",
        "weights_only",
    }
)


def refuse_unknown(config: PreTrainedConfig | type[PreTrainedConfig], unknown: dict[str, Any]) -> None:
    """Raise on a keyword that is no field: `PreTrainedConfig` would keep a typo silently and train another model."""
    config_class: type[PreTrainedConfig] = config if isinstance(config, type) else type(config)
    known = {field.name for field in fields(config)} | set(config_class.attribute_map)
    for name in unknown:
        if name in _BASE_KEYS or name in known:
            continue
        nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; its fields are {', '.join(sorted(known))}"
        raise ValueError(f"{config_class.__name__} has no field {name!r}{hint}")


def checked_keywords(config_class: type[PreTrainedConfig], keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `from_pretrained`, refused if unknown, unless the caller asked for the unused ones back."""
    if not keywords.get("return_unused_kwargs"):
        known = {field.name for field in fields(config_class)} | _BASE_KEYS | _LOADING_KEYS
        for name in keywords.keys() - known:
            refuse_unknown(config_class, {name: keywords[name]})
    return keywords


def triple(name: str, value: int | list[int] | tuple[int, ...]) -> list[int]:
    """`value` as one positive integer per axis (z, y, x)."""
    entries = [value] * 3 if isinstance(value, int) else list(value)
    if len(entries) != 3 or any(entry < 1 for entry in entries):
        raise ValueError(f"{name} must be one positive integer or three of them in order (z, y, x), got {value!r}")
    return entries


def divides(divisor: int, *numbers: int) -> bool:
    """Whether `divisor` is positive and divides every one of `numbers`."""
    return divisor >= 1 and not any(number % divisor for number in numbers)


def check_local_contrast(config: Any) -> None:
    """The sizes, channels and bins of the encoder of that name."""
    if config.cell_size < 2 or config.cell_size % 2:
        raise ValueError(f"cell_size must be an even number of voxels, got {config.cell_size}")
    for name in ("bright_channels", "dark_channels"):
        channels = getattr(config, name)
        if channels is not None and (
            len(set(channels)) < len(channels) or not set(channels) <= set(range(config.num_channels))
        ):
            raise ValueError(
                f"{name} must be different numbers below num_channels={config.num_channels}, got {list(channels)}"
            )
    edges = list(config.response_edges)
    if len(edges) < 2 or edges != sorted(set(edges)):
        raise ValueError(f"response_edges must be at least two ascending numbers, got {edges}")


def check_terms(config: Any) -> None:
    """Which terms are switched on, and what they ask of each other."""
    names = ("lambda_gca", "lambda_tma", "lambda_tir", "lambda_sentences", "lambda_texts")
    if min(getattr(config, name) for name in names) < 0:
        raise ValueError(f"weights of terms must be 0 or more, got { ({n: getattr(config, n) for n in names}) }")
    if config.gca_views == "local" and config.view_fusion == "attention":
        raise ValueError(
            'gca_views="local" aligns each view by itself, so that the transformer of view_fusion="attention" would '
            'stay untrained: set view_fusion="global" or "mean", or gca_views="volume"'
        )
    if config.tma_query == "mean" and config.tma_negatives != "same_query":
        raise ValueError(
            'tma_query="mean" asks nothing, so that there is no query to be the same or its own; leave '
            "tma_negatives out"
        )
    if config.tma_loss != "supcon" and config.tma_negative_pairs is not None:
        raise ValueError(
            f'tma_negative_pairs={config.tma_negative_pairs} limits the negatives of tma_loss="supcon", and '
            f"{config.tma_loss!r} has none: leave it out"
        )
    counts = (config.num_prototypes - 1, config.num_sinkhorn_iterations, config.num_frozen_prototype_batches + 1)
    if min(counts) < 1 or config.barlow_off_diagonal_weight < 0:
        raise ValueError(
            "num_prototypes must be at least 2, num_sinkhorn_iterations at least 1, num_frozen_prototype_batches "
            f"and barlow_off_diagonal_weight at least 0, got {config.num_prototypes}, "
            f"{config.num_sinkhorn_iterations}, {config.num_frozen_prototype_batches} and "
            f"{config.barlow_off_diagonal_weight}"
        )
    if not config.lambda_tir:
        return
    if not divides(config.num_tir_heads, config.projection_dim):
        raise ValueError(f"num_tir_heads={config.num_tir_heads} must divide projection_dim={config.projection_dim}")
    if not 0 < config.tir_mask_ratio < 1 or config.tir_noise < 0 or config.tir_block_size < 1:
        raise ValueError(
            f"restoration needs 0 < tir_mask_ratio < 1, tir_noise >= 0 and tir_block_size >= 1, got "
            f"{config.tir_mask_ratio}, {config.tir_noise} and {config.tir_block_size}"
        )
    if min([config.tir_norm_groups, *(config.tir_decoder_channels or [1])]) < 1:
        raise ValueError(
            f"tir_norm_groups and tir_decoder_channels must be positive, got {config.tir_norm_groups} and "
            f"{config.tir_decoder_channels}"
        )


__all__ = ["check_local_contrast", "check_terms", "checked_keywords", "divides", "refuse_unknown", "triple"]
