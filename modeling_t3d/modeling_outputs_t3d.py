# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What the models put out, with the shape of every field."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput


@dataclass
class T3DVisionModelOutput(ModelOutput):
    r"""
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, hidden_size, depth, height, width)`): the token map.
        pooler_output (`torch.FloatTensor` of shape `(batch, hidden_size)`): its mean over the grid; the projected,
            un-normalised embedding `(batch, projection_dim)` where `get_image_features` returns it.
        feature_maps (`tuple[torch.FloatTensor, ...]`): the pyramid, finest map first; left out by
            `get_image_features`.
        hidden_states (`tuple[torch.FloatTensor, ...]`, *optional*): the input of the first block, then each output.
        attentions (`tuple[torch.FloatTensor, ...]`, *optional*): of an encoder with attention, under
            `attn_implementation="eager"`.
        local_hidden_state (`torch.FloatTensor` of shape `(batch, views, hidden_size, d, h, w)`, *optional*):
            Token maps of the local views where they were encoded; zeros for views that the mask leaves out.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    local_hidden_state: torch.Tensor | None = None


@dataclass
class T3DOutput(ModelOutput):
    r"""
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): global alignment, with `return_loss=True`; the mean over
            all ranks' pairs, the same on every rank.
        logits_per_image (`torch.FloatTensor` of shape `(volumes, reports)`): scaled similarities of this rank.
        logits_per_text (`torch.FloatTensor` of shape `(reports, volumes)`): their transpose.
        image_embeds (`torch.FloatTensor` of shape `(volumes, projection_dim)`): of unit norm.
        text_embeds (`torch.FloatTensor` of shape `(reports, projection_dim)`): of unit norm.
        vision_model_output (`T3DVisionModelOutput`): what `get_image_features` returned.
        text_model_output (`BaseModelOutputWithPooling`): what `get_text_features` returned.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    vision_model_output: T3DVisionModelOutput | None = None
    text_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are set, nested outputs as tuples."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


@dataclass
class T3DPairFeatures(ModelOutput):
    r"""
    What the objectives need of pairs of volume and report, from `T3DForPreTraining.encode_pairs`. The first axis of
    every field is the pair; fields of integers and masks have no gradient.

    Args:
        image_features (`torch.FloatTensor` of shape `(batch, projection_dim)`, *optional*): projected, un-normalised;
            left out where no term reads the volumes' embeddings.
        text_features (`torch.FloatTensor` of shape `(batch, projection_dim)`): projected, un-normalised.
        local_tokens (`torch.FloatTensor` of shape `(batch, views, tokens, projection_dim)`, *optional*):
            Projected token maps of the local views, which multi-view alignment needs.
        local_mask (`torch.BoolTensor` of shape `(batch, views)`, *optional*): views that exist.
        report_tokens (`torch.FloatTensor` of shape `(batch, report_tokens, projection_dim)`, *optional*):
            Projected tokens of the reports, without a gradient: `tma_query="vision"`.
        report_mask (`torch.BoolTensor` of shape `(batch, report_tokens)`, *optional*): `False` for padding.
        local_features (`torch.FloatTensor` of shape `(batch, views, projection_dim)`, *optional*):
            Each local view's own projected, un-normalised embedding: `gca_views="local"` and `tma_query="mean"`.
        restoration_errors (`torch.FloatTensor` of shape `(batch, views, 2)`, *optional*):
            Squared errors of restored views, summed over all voxels and over corrupted blocks: `lambda_tir` above 0.
        restoration_voxels (`torch.LongTensor` of shape `(batch, views, 2)`, *optional*): how many voxels those are.
        sentence_features (`torch.FloatTensor` of shape `(batch, sentences, projection_dim)`, *optional*):
            Projected, un-normalised embeddings of the volumes' further texts.
        study_ids, report_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): as they were given.
        sentence_ids (`torch.LongTensor` of shape `(batch, sentences)`, *optional*): as they were given.
    """

    image_features: torch.Tensor | None = None
    text_features: torch.Tensor | None = None
    local_tokens: torch.Tensor | None = None
    local_mask: torch.Tensor | None = None
    report_tokens: torch.Tensor | None = None
    report_mask: torch.Tensor | None = None
    local_features: torch.Tensor | None = None
    restoration_errors: torch.Tensor | None = None
    restoration_voxels: torch.Tensor | None = None
    sentence_features: torch.Tensor | None = None
    study_ids: torch.Tensor | None = None
    report_ids: torch.Tensor | None = None
    sentence_ids: torch.Tensor | None = None

    @classmethod
    def concatenate(cls, parts: Sequence["T3DPairFeatures"]) -> "T3DPairFeatures":
        """
        Pairs of several parts as those of one, in order. Reports and views are padded to the longest and the most, as
        their masks say.

        Example:

        ```python
        >>> import torch
        >>> from modeling_t3d import T3DPairFeatures

        >>> parts = [
        ...     T3DPairFeatures(torch.zeros(1, 4), torch.zeros(1, 4), report_mask=torch.ones(1, length).bool())
        ...     for length in (2, 3)
        ... ]
        >>> T3DPairFeatures.concatenate(parts).report_mask.tolist()
        [[True, True, False], [True, True, True]]

        ```"""
        joined = {}
        for name in parts[0]:
            tensors = [part[name] for part in parts]
            if name.startswith(("local_", "report_tokens", "report_mask", "restoration_")):
                longest = max(tensor.shape[1] for tensor in tensors)
                tensors = [
                    nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, longest - tensor.shape[1]))
                    for tensor in tensors
                ]
            joined[name] = torch.cat(tensors)
        return cls(**joined)


@dataclass
class T3DForPreTrainingOutput(ModelOutput):
    r"""
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            The terms below, each times its `lambda`, with `return_loss=True`. Its value is the same on every rank;
            averaged over ranks, its gradient is that of one process holding all pairs.
        loss_gca (`torch.FloatTensor` of shape `()`, *optional*): global alignment, mean over all ranks' pairs.
        loss_sentences (`torch.FloatTensor` of shape `()`, *optional*):
            Global alignment with sentences of the reports, mean over the sentences of a volume.
        loss_texts (`torch.FloatTensor` of shape `()`, *optional*):
            The same with the reports in the volumes' place.
        loss_tma (`torch.FloatTensor` of shape `()`, *optional*): multi-view alignment, mean over all ranks' views.
        loss_tir (`torch.FloatTensor` of shape `()`, *optional*):
            Restoration: squared error of restored views, mean over all voxels of all ranks' views.
        loss_tir_corrupted (`torch.FloatTensor` of shape `()`, *optional*):
            The same over zeroed blocks alone, without a gradient.
        log_num_candidates (`torch.FloatTensor` of shape `()`, *optional*):
            What `loss_tma` is when views carry no information: the mean log of the number of candidates, or of
            prototypes; of `tma_loss="barlow"`, which counts none, half the number of dimensions.
        num_valid_anchors (`torch.LongTensor` of shape `()`, *optional*): views that were anchors, on all ranks.
        num_skipped_pairs (`torch.LongTensor` of shape `()`, *optional*):
            Pairs with fewer than two valid views, on all ranks: they have no anchors.
        logits_per_image (`torch.FloatTensor` of shape `(batch, batch)`, *optional*): scaled similarities of this rank;
            like `image_embeds` left out with `return_loss=True` where no term reads the volumes' embeddings.
        logits_per_text (`torch.FloatTensor` of shape `(batch, batch)`): their transpose.
        image_embeds (`torch.FloatTensor` of shape `(batch, projection_dim)`): of unit norm.
        text_embeds (`torch.FloatTensor` of shape `(batch, projection_dim)`): of unit norm.
        local_embeds (`torch.FloatTensor` of shape `(batch, views, projection_dim)`, *optional*):
            Each view as its own report asks it, of unit norm, without a gradient; meaningless where masked.
    """

    loss: torch.Tensor | None = None
    loss_gca: torch.Tensor | None = None
    loss_sentences: torch.Tensor | None = None
    loss_texts: torch.Tensor | None = None
    loss_tma: torch.Tensor | None = None
    loss_tir: torch.Tensor | None = None
    loss_tir_corrupted: torch.Tensor | None = None
    log_num_candidates: torch.Tensor | None = None
    num_valid_anchors: torch.Tensor | None = None
    num_skipped_pairs: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    local_embeds: torch.Tensor | None = None


__all__ = ["T3DForPreTrainingOutput", "T3DOutput", "T3DPairFeatures", "T3DVisionModelOutput"]
