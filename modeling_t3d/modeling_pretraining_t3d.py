# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Pre-training: the towers encode pairs of volume and report, the objectives align them across pairs and ranks."""

from collections.abc import Callable
from contextlib import nullcontext
from os import PathLike
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing

from .clustering_loss_t3d import (
    chunked_multi_view_contrastive,
    draw_candidate_pairs,
    redundancy_reduction,
    swapped_prediction,
)
from .communication_t3d import all_gather, all_reduce_sum, gather_sizes, global_mean, rank
from .configuration_t3d import T3DConfig
from .encoders_t3d import frozen_batch_norm_statistics
from .layers_t3d import T3DMultiViewAlignment, T3DPrototypes, T3DReports, groups_of_like_length, has_content, unit_norm
from .modeling_outputs_t3d import T3DForPreTrainingOutput, T3DOutput, T3DPairFeatures
from .modeling_t3d import T3DModel, model_from_towers
from .pair_relations_t3d import gather_identities
from .pretrained_model_t3d import T3DPreTrainedModel
from .restoration_t3d import T3DRestoration, corrupt_views, restoration_errors, restoration_loss, view_seeds

# Queries of the multi-view loss are pooled in chunks that hold about this many numbers at once (256 MiB of float32).
_MAX_POOLED_ELEMENTS = 2**26

# Sentences are encoded in so many groups of like length, each padded to its own longest. Always as many, however few
# the texts are: processes that share a sharded text tower make the same number of passes, or wait for each other.
_SENTENCE_GROUPS = 4

# Parameters whose gradient comes from `align` alone, by the beginning of their names.
_LOSS_STAGE = ("multi_view_alignment.", "prototypes.", "t3d.logit_scale", "t3d.logit_bias")


class T3DForPreTraining(T3DPreTrainedModel):
    r"""
    Pre-training by global alignment (GCA), text-informed multi-view alignment (TMA) and text-informed restoration
    (TIR). What has weight 0 is not computed and has no parameters; without TMA, TIR and `gca_views="local"` no local
    views are needed, and where no term reads the volume's embedding, global views are not encoded.

    A step has two stages. [`~T3DForPreTraining.encode_pairs`] runs the towers and whatever else knows one pair at a
    time; [`~T3DForPreTraining.align`] runs the objectives, which know all pairs of all ranks:

    - `model(**batch)` is `model.align(model.encode_pairs(**batch))`;
    - `model(**batch, stage="encode")` and `model(features=features, stage="align")` are the stages for callers that
      must go through `forward`, such as data-parallel wrappers;
    - pairs may be encoded in parts and joined by [`T3DPairFeatures.concatenate`]: the parts do not interact, unless a
      batch norm makes them;
    - gradients of `align` reach [`~T3DForPreTraining.loss_stage_parameters`] directly, and every other parameter
      through the features alone.

    So a batch larger than memory is encoded in parts without a graph, aligned once, and encoded again with the
    features' gradients handed down.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d import T3DConfig, T3DForPreTraining

    >>> model = T3DForPreTraining(T3DConfig.from_preset("tiny"))
    >>> output = model(
    ...     input_ids=torch.tensor([[2, 5, 3], [2, 7, 3]]),
    ...     pixel_values=torch.randn(2, 1, 16, 32, 32),
    ...     local_pixel_values=torch.randn(2, 3, 1, 16, 16, 16),
    ... )
    >>> output.num_valid_anchors.item(), bool(output.loss.isclose(output.loss_gca + output.loss_tma))
    (6, True)

    ```"""

    # The losses are means over all pairs of a step, and none over a count that a trainer could know.
    accepts_loss_kwargs = False

    def __init__(self, config: T3DConfig):
        super().__init__(config)
        self.t3d = T3DModel(config)
        pools_views = config.lambda_tma > 0 and config.tma_query != "mean"
        self.multi_view_alignment = T3DMultiViewAlignment(config) if pools_views else None
        has_prototypes = config.lambda_tma > 0 and config.tma_loss == "swav"
        self.prototypes: Any = T3DPrototypes(config) if has_prototypes else None
        self.restoration: Any = None
        if config.lambda_tir > 0:
            self.restoration = T3DRestoration(config, self.t3d.vision_model.encoder.feature_strides[-1])
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str | PathLike | PreTrainedModel, text: str | PathLike | PreTrainedModel, **config: Any
    ) -> "T3DForPreTraining":
        """See [`T3DModel.from_vision_text_pretrained`]."""
        return model_from_towers(cls, vision, text, config)

    def freeze_after_loading(self) -> None:
        """See [`T3DModel.freeze_after_loading`]."""
        self.t3d.freeze_after_loading()

    def clamp_logit_scale(self) -> None:
        """See [`T3DModel.clamp_logit_scale`]."""
        self.t3d.clamp_logit_scale()

    def set_view_chunk_size(self, size: int | None) -> None:
        """See [`T3DModel.set_view_chunk_size`]."""
        self.t3d.set_view_chunk_size(size)
        if self.restoration is not None:
            self.restoration.chunk_size = size

    def loss_stage_parameters(self) -> list[nn.Parameter]:
        """
        Parameters that `align` uses and `encode_pairs` does not: the pooling of views and its head, prototypes, the
        temperature, the bias. A backward pass through `encode_pairs` alone leaves them without a gradient.
        """
        return [parameter for name, parameter in self.named_parameters() if name.startswith(_LOSS_STAGE)]

    # --- the first stage: what knows one pair at a time --------------------------------------------------------------

    @property
    def _aligns_views(self) -> bool:
        return self.config.lambda_tma > 0

    @property
    def _reads_views(self) -> bool:
        """Whether a term reads the local views as they are."""
        return self._aligns_views or (self.config.lambda_gca > 0 and self.config.gca_views == "local")

    @property
    def _reads_volumes(self) -> bool:
        """Whether a term other than that of sentences reads the volumes' embeddings."""
        return self.config.lambda_gca > 0 and self.config.gca_views == "volume"

    def project_tokens(
        self,
        local_hidden_state: torch.Tensor,
        local_mask: torch.Tensor | None = None,
        projects_others: bool = True,
    ) -> torch.Tensor:
        """
        Token maps `(batch, views, hidden_size, d, h, w)` to `(batch, views, tokens, projection_dim)`; the mask,
        `(batch, views)`, names the views that exist. Running batch statistics are those of pooled volumes or views,
        where these are projected too.
        """
        projection, tokens = self.t3d.visual_projection, local_hidden_state.flatten(3).transpose(2, 3)
        exists = None if local_mask is None else local_mask[..., None].expand(tokens.shape[:-1])
        with frozen_batch_norm_statistics(projection) if projects_others else nullcontext():
            return projection(tokens, exists)

    def encode_sentences(
        self,
        sentence_input_ids: torch.Tensor,
        sentence_attention_mask: torch.Tensor | None = None,
        sentence_token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Texts `(batch, sentences, tokens)` to un-normalised embeddings `(batch, sentences, projection_dim)`."""
        tokens = (sentence_input_ids, sentence_attention_mask, sentence_token_type_ids)
        texts = [None if values is None else values.flatten(0, 1) for values in tokens]
        if sentence_attention_mask is None or is_tracing(sentence_attention_mask):  # a traced mask has no values
            _, pooled = self.t3d.encode_text(*texts)
        else:
            parts, places = [], []
            for members, width in groups_of_like_length(sentence_attention_mask.flatten(0, 1), _SENTENCE_GROUPS):
                group = (None if values is None else values[members, :width] for values in texts)
                parts.append(self.t3d.encode_text(*group)[1])
                places.append(members)
            # Back in their order, without the repeated ones, which get gradients of 0.
            num_texts = sentence_input_ids.shape[:2].numel()
            pooled = torch.cat(parts)[torch.cat(places)[:num_texts].argsort()]
        # All at once: the projection may hold a batch norm.
        return self.t3d.text_projection(pooled).unflatten(0, sentence_input_ids.shape[:2])

    def restore_views(
        self,
        local_pixel_values: torch.Tensor,
        local_mask: torch.Tensor | None,
        report_tokens: torch.Tensor,
        report_mask: torch.Tensor | None = None,
        corruption_seeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Corrupt the views, restore them with the report's help, and compare.

        Args:
            local_pixel_values (`torch.Tensor` of shape `(batch, views, num_channels, d, h, w)`), local_mask: views;
                without a mask all of them exist.
            report_tokens (`torch.Tensor` of shape `(batch, report_tokens, projection_dim)`), report_mask: projected.
            corruption_seeds (`torch.LongTensor` of shape `(batch,)`, *optional*): as in `forward`.

        Returns:
            Sums of squared errors and numbers of voxels of each view, both `(batch, views, 2)`; see
            [`~restoration_t3d.restoration_errors`].
        """
        batch, num_views = local_pixel_values.shape[:2]
        if corruption_seeds is None:
            # Drawn on the host, where gradient caching replays it; evaluation draws nothing.
            drawn = torch.randint(1 << 62, (batch,)) if self.training else torch.arange(batch)
            corruption_seeds = drawn.to(local_pixel_values.device)
        corrupted, zeroed = corrupt_views(
            local_pixel_values.flatten(0, 1),
            view_seeds(corruption_seeds, num_views).flatten(),
            block_size=self.config.tir_block_size,
            ratio=self.config.tir_mask_ratio,
            noise=self.config.tir_noise,
        )
        # Running batch statistics are those of whole views, where any are encoded.
        encodes_whole = self._reads_views or self._reads_volumes
        with frozen_batch_norm_statistics(self.t3d.vision_model) if encodes_whole else nullcontext():
            maps, _ = self.t3d.encode_local_views(corrupted.unflatten(0, (batch, num_views)), local_mask)
        restored = self.restoration(maps, report_tokens, report_mask, local_pixel_values.shape[3:])
        views = local_pixel_values
        if local_mask is not None:
            # Whatever stands in the place of a missing view, NaN too, would reach the gradients times zero.
            missing = ~local_mask.to(views.device, torch.bool)
            views = views.masked_fill(missing[..., None, None, None, None], 0.0)
        sums, counts = restoration_errors(restored, views.flatten(0, 1), zeroed)
        return sums.unflatten(0, (batch, num_views)), counts.unflatten(0, (batch, num_views))

    def _report_features(
        self,
        last_hidden_state: torch.Tensor,
        attention_mask: torch.Tensor | None,
        device: torch.device,
        local_pixel_values: torch.Tensor,
        local_mask: torch.Tensor | None,
        corruption_seeds: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """What views learn from the tokens of their reports."""
        features = {}
        if attention_mask is None:
            attention_mask = torch.ones_like(last_hidden_state[..., 0])
        mask = attention_mask.to(device, torch.bool)
        # Views that ask teach the text branch nothing; restoration does. Batch statistics are those of whole texts.
        learns = torch.is_grad_enabled() and self.restoration is not None
        with torch.set_grad_enabled(learns), frozen_batch_norm_statistics(self.t3d.text_projection):
            tokens = self.t3d.text_projection(last_hidden_state, attention_mask.to(last_hidden_state.device)).to(
                device
            )
        if self._aligns_views and self.config.tma_query == "vision":
            features["report_tokens"], features["report_mask"] = tokens.detach(), mask
        if self.restoration is not None:
            if self.config.tir_report == "other":
                if len(tokens) < 2:
                    raise ValueError('tir_report="other" needs another report: encode at least 2 pairs at a time')
                tokens, mask = tokens.roll(1, dims=0), mask.roll(1, dims=0)
            errors, voxels = self.restore_views(local_pixel_values, local_mask, tokens, mask, corruption_seeds)
            features["restoration_errors"], features["restoration_voxels"] = errors, voxels
        return features

    def encode_pairs(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        local_pixel_values: torch.Tensor | None = None,
        local_mask: torch.Tensor | None = None,
        local_positions: torch.Tensor | None = None,
        return_loss: bool = True,
        study_ids: torch.Tensor | None = None,
        report_ids: torch.Tensor | None = None,
        sentence_input_ids: torch.Tensor | None = None,
        sentence_attention_mask: torch.Tensor | None = None,
        sentence_token_type_ids: torch.Tensor | None = None,
        sentence_ids: torch.Tensor | None = None,
        corruption_seeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> T3DPairFeatures:
        """
        Everything that the objectives need of these pairs. No field of a pair depends on another pair, except through
        a batch norm in training mode, and in the control `tir_report="other"`.

        Args:
            return_loss (`bool`, defaults to `True`): also what the embeddings alone do not need.
            others: as in `forward`.
        """
        if input_ids is None:
            raise ValueError(
                "pre-training needs a report per volume: pass input_ids, if need be of generated captions"
            )
        reads_views = return_loss and self._reads_views
        restores = return_loss and self.restoration is not None
        if (reads_views or restores) and local_pixel_values is None:
            names = [name for name in ("lambda_tma", "lambda_tir") if getattr(self.config, name)] or ["lambda_gca"]
            raise ValueError(
                f"{names[0]}={getattr(self.config, names[0])} needs local views: pass local_pixel_values or set "
                f"{names[0]}=0"
            )
        has_sentences = return_loss and sentence_input_ids is not None
        shows_sentences = has_sentences and self.config.lambda_sentences > 0
        features = T3DPairFeatures(study_ids=study_ids, report_ids=report_ids)
        maps = None
        if not return_loss or self._reads_volumes or shows_sentences:
            if pixel_values is None:
                raise ValueError("the volumes' embeddings need global views: pass pixel_values")
            vision_output = self.t3d.get_image_features(
                pixel_values,
                local_pixel_values,
                local_mask,
                local_positions,
                output_local_hidden_state=reads_views,
                return_dict=True,
                **kwargs,
            )
            features["image_features"], maps = vision_output.pooler_output, vision_output.local_hidden_state
        elif reads_views:
            maps, _ = self.t3d.encode_local_views(local_pixel_values, local_mask)
        text_output = self.t3d.get_text_features(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
        visual = next(tensor for tensor in (features.image_features, maps, local_pixel_values) if tensor is not None)
        device = visual.device
        features["text_features"] = text_output.pooler_output.to(device)
        if reads_views or restores:
            # Restoration is told that no mask was given: it then need not look whether all views exist.
            exists = torch.ones(local_pixel_values.shape[:2], dtype=torch.bool) if local_mask is None else local_mask
            features["local_mask"] = exists.to(device, torch.bool)
        if reads_views and self.multi_view_alignment is not None:
            projects_views = self.config.gca_views == "local" and self.config.lambda_gca > 0
            projects_others = projects_views or features.image_features is not None
            features["local_tokens"] = self.project_tokens(maps, features.local_mask, projects_others)
        if reads_views and (self.config.gca_views == "local" or self.config.tma_query == "mean"):
            features["local_features"] = self.t3d.visual_projection(maps.mean(dim=(3, 4, 5)), features.local_mask)
        if restores or (return_loss and self._aligns_views and self.config.tma_query == "vision"):
            report = self._report_features(
                text_output.last_hidden_state, attention_mask, device, local_pixel_values, local_mask, corruption_seeds
            )
            for name, value in report.items():
                features[name] = value
        if shows_sentences or (has_sentences and self.config.lambda_texts > 0):
            sentences = self.encode_sentences(sentence_input_ids, sentence_attention_mask, sentence_token_type_ids)
            features["sentence_features"] = sentences.to(device)
            if sentence_ids is not None:
                features["sentence_ids"] = sentence_ids
        return features

    # --- the second stage: what knows all pairs of all ranks ---------------------------------------------------------

    def align(self, features: T3DPairFeatures, return_loss: bool = True) -> T3DForPreTrainingOutput:
        """
        The objectives over the pairs of all ranks: a collective call, which every rank makes with its own pairs.

        Args:
            features (`T3DPairFeatures`): from `encode_pairs`, called with the same `return_loss`.
            return_loss (`bool`, defaults to `True`): compute the losses.
        """
        scored = T3DOutput(text_embeds=unit_norm(features.text_features))
        if features.image_features is not None:
            scored = self.t3d(
                image_features=features.image_features,
                text_features=features.text_features,
                return_loss=return_loss and self._reads_volumes,
                study_ids=features.study_ids,
                report_ids=features.report_ids,
                # No term reads them, and they grow with the batch's square.
                output_logits=not (return_loss and self.training),
                return_dict=True,
            )
        loss_gca, loss_sentences, loss_texts = scored.loss, None, None
        views: dict[str, Any] = {}
        restoration: dict[str, Any] = {}
        if return_loss and self.config.lambda_gca > 0 and self.config.gca_views == "local":
            loss_gca = self.view_alignment_loss(features)
        if return_loss and self._aligns_views:
            views = self.multi_view_alignment_loss(features)
        if return_loss and self.restoration is not None:
            losses = restoration_loss(features.restoration_errors, features.restoration_voxels, features.local_mask)
            restoration = dict(zip(("loss_tir", "loss_tir_corrupted"), losses, strict=True))
        if return_loss and features.sentence_features is not None:
            if self.config.lambda_sentences > 0:
                loss_sentences = self.sentence_alignment_loss(features, features.image_features)
            if self.config.lambda_texts > 0:
                loss_texts = self.sentence_alignment_loss(features, features.text_features)
        terms = [
            (self.config.lambda_gca, loss_gca),
            (self.config.lambda_sentences, loss_sentences),
            (self.config.lambda_texts, loss_texts),
            (self.config.lambda_tma, views.get("loss_tma")),
            (self.config.lambda_tir, restoration.get("loss_tir")),
        ]
        weighted = [weight * term for weight, term in terms if term is not None]
        if return_loss and not weighted:
            raise ValueError(
                "no term has a weight, so that there is no loss: set lambda_gca, lambda_tma or lambda_tir, or pass "
                "sentences"
            )
        return T3DForPreTrainingOutput(
            loss=torch.stack(weighted).sum() if weighted else None,
            loss_gca=loss_gca,
            loss_sentences=loss_sentences,
            loss_texts=loss_texts,
            **views,
            **restoration,
            logits_per_image=scored.logits_per_image,
            logits_per_text=scored.logits_per_text,
            image_embeds=scored.image_embeds,
            text_embeds=scored.text_embeds,
        )

    def sentence_alignment_loss(self, features: T3DPairFeatures, anchors: torch.Tensor) -> torch.Tensor:
        """
        GCA once for each of the `sentences` texts that a volume comes with, then the mean. The anchors are the
        volumes, or their reports: from volumes alone, a text tower that starts from scratch learns what they show
        already and forgets the rest, which they then cannot learn.
        """
        losses = [
            self.t3d(
                image_features=anchors,
                text_features=sentence,
                return_loss=True,
                study_ids=features.study_ids,
                report_ids=None if features.sentence_ids is None else features.sentence_ids[:, index],
                output_logits=False,
                return_dict=True,
            ).loss
            for index, sentence in enumerate(features.sentence_features.unbind(dim=1))
        ]
        return torch.stack(losses).mean()

    def view_alignment_loss(self, features: T3DPairFeatures) -> torch.Tensor:
        """
        GCA once for each view slot, among the volumes that have that view, then the sum: GTGM's `clip(Z, T)`. A slot
        that fewer than two volumes of the global batch have has no anchors, and adds nothing.
        """
        losses = []
        text_features: torch.Tensor = features.text_features
        local_mask: torch.Tensor = features.local_mask
        has_pairs = sum(gather_sizes(len(local_mask), local_mask.device)) > 1
        if not has_content(local_mask):  # every volume has every view
            everyone = torch.arange(len(local_mask), device=local_mask.device)
            volumes, volumes_with_view = [everyone] * local_mask.shape[1], [len(local_mask)] * local_mask.shape[1]
        else:
            volumes, volumes_with_view = local_mask.unbind(dim=1), all_reduce_sum(local_mask.sum(dim=0)).tolist()
        slots = zip(features.local_features.unbind(dim=1), volumes, volumes_with_view, strict=True)
        for view, exists, num_volumes in slots:
            if has_pairs and num_volumes < 2:
                losses.append(0.0 * (view.sum() + text_features.sum()))
                continue
            ids = (features.study_ids, features.report_ids)
            study_ids, report_ids = (None if values is None else values.to(exists.device)[exists] for values in ids)
            scored = self.t3d(
                image_features=view[exists],
                text_features=text_features[exists],
                return_loss=True,
                study_ids=study_ids,
                report_ids=report_ids,
                output_logits=False,
                return_dict=True,
            )
            losses.append(scored.loss)
        return torch.stack(losses).sum()

    def multi_view_alignment_loss(self, features: T3DPairFeatures) -> T3DForPreTrainingOutput:
        """TMA over the views of all ranks: `loss_tma`, its counts and `local_embeds`."""
        local_mask: torch.Tensor = features.local_mask
        sizes = gather_sizes(len(local_mask), local_mask.device)
        num_pairs, num_views = sum(sizes), local_mask.shape[1]
        if self.config.tma_loss == "swav":
            if self.config.num_prototypes > num_pairs * num_views:
                raise ValueError(
                    f"num_prototypes={self.config.num_prototypes} prototypes cannot share the {num_pairs * num_views} "
                    f"views of a global batch of {num_pairs} pairs: use more pairs or fewer prototypes"
                )
        elif num_pairs < 2:
            what = "other pairs to correlate over" if self.config.tma_loss == "barlow" else "negatives"
            raise ValueError(f"multi-view alignment needs {what}: the global batch holds 1 pair; use at least 2")
        if self.config.tma_loss == "supcon":
            own_views, (total, count, log_candidates) = self._contrast_views(features, sizes)
        else:
            own_views = self._pool_own_views(features)
        if self.config.tma_loss == "swav":
            total, count, log_candidates = swapped_prediction(
                own_views,
                local_mask,
                self.prototypes(local_mask.device),
                temperature=self.config.swav_temperature,
                epsilon=self.config.sinkhorn_epsilon,
                num_iterations=self.config.num_sinkhorn_iterations,
            )
        if self.config.tma_loss == "barlow":
            loss, num_anchors = redundancy_reduction(
                own_views, local_mask, off_diagonal_weight=self.config.barlow_off_diagonal_weight
            )
            num_skipped = all_reduce_sum((local_mask.sum(dim=1) < 2).sum())
            chance = torch.full_like(loss.detach(), own_views.shape[-1] / 2)
        else:
            num_skipped = (local_mask.sum(dim=1) < 2).sum()
            sums = all_reduce_sum(torch.stack([count.to(total), num_skipped.to(total), log_candidates.to(total)]))
            loss, num_anchors, num_skipped = global_mean(total, count), sums[0].long(), sums[1].long()
            chance = sums[2] / sums[0].clamp(min=1)
        return T3DForPreTrainingOutput(
            loss_tma=loss,
            log_num_candidates=chance,
            num_valid_anchors=num_anchors,
            num_skipped_pairs=num_skipped,
            local_embeds=own_views.detach(),
        )

    def _pool_own_views(self, features: T3DPairFeatures) -> torch.Tensor:
        """Each view as its own pair's query asks: `(batch, views, projection_dim)`, of unit norm."""
        if self.config.tma_query == "mean":
            return unit_norm(features.local_features)
        reports = T3DReports(features.text_features, features.report_tokens, features.report_mask)
        return self.multi_view_alignment.pool_own_views(features.local_tokens, reports)

    def _contrast_views(
        self, features: T3DPairFeatures, sizes: list[int]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The views as their own queries pool them, and the sums of [`multi_view_contrastive`]."""
        device, batch = features.local_mask.device, sizes[rank()]
        num_pairs, offset = sum(sizes), sum(sizes[: rank()])
        identities = gather_identities(features.study_ids, features.report_ids, sizes, device)
        all_masks = all_gather(features.local_mask, sizes)
        num_negative_pairs = self.config.tma_negative_pairs
        candidates = None
        if num_negative_pairs is None or num_negative_pairs >= num_pairs - 1:
            own_pair = offset + torch.arange(batch, device=device)
            view_mask = all_masks.expand(batch, -1, -1)
        else:
            # Evaluation draws the same at every call, so that its losses can be compared.
            generator = None if self.training else torch.Generator().manual_seed(0)
            candidates = draw_candidate_pairs(
                batch, num_pairs, offset, num_negative_pairs, device=device, generator=generator
            )
            own_pair = torch.zeros(batch, dtype=torch.int64, device=device)
            view_mask = all_masks[candidates]

        def excluded(start: int, stop: int) -> torch.Tensor | None:
            return identities.mask(start, stop, None if candidates is None else candidates[start:stop])

        # A learnt query is the same for every pair, and the mean asks none: whose query it is makes no difference.
        if self.config.tma_query in ("none", "mean") or self.config.tma_negatives == "own_query":
            own_views = self._pool_own_views(features)
            every = all_gather(own_views, sizes)
            num_slots, size = every.shape[1:]
            size_per_query = view_mask.shape[1] * num_slots * (4 * num_slots + (0 if candidates is None else size))

            def own_pool(start: int, stop: int) -> torch.Tensor:
                return every[None] if candidates is None else every[candidates[start:stop]]

            pool: Callable[[int, int], torch.Tensor] = own_pool
        else:
            with torch.no_grad():
                own_views = self._pool_own_views(features)
            reports = T3DReports(features.text_features, features.report_tokens, features.report_mask)
            tokens = all_gather(features.local_tokens, sizes)
            pool, size_per_query = self.multi_view_alignment.pooler(tokens, reports, candidates)
        return own_views, chunked_multi_view_contrastive(
            pool,
            own_pair,
            view_mask,
            excluded,
            temperature=self.config.tma_temperature,
            chunk_size=max(1, _MAX_POOLED_ELEMENTS // size_per_query),
        )

    # --- both --------------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        local_pixel_values: torch.Tensor | None = None,
        local_mask: torch.Tensor | None = None,
        local_positions: torch.Tensor | None = None,
        return_loss: bool = True,
        study_ids: torch.Tensor | None = None,
        report_ids: torch.Tensor | None = None,
        sentence_input_ids: torch.Tensor | None = None,
        sentence_attention_mask: torch.Tensor | None = None,
        sentence_token_type_ids: torch.Tensor | None = None,
        sentence_ids: torch.Tensor | None = None,
        corruption_seeds: torch.Tensor | None = None,
        stage: Literal["encode", "align"] | None = None,
        features: T3DPairFeatures | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> T3DForPreTrainingOutput | T3DPairFeatures:
        r"""
        Args:
            input_ids, attention_mask, token_type_ids: the reports, as in [`T3DModel.get_text_features`].
            pixel_values, local_pixel_values, local_mask, local_positions: the volumes, as in
                [`T3DModel.get_image_features`].
            return_loss (`bool`, defaults to `True`): compute the losses, over the pairs of all ranks.
            study_ids, report_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): pairs that share one that is
                not negative are not negatives of each other. All ranks give them, or none.
            sentence_input_ids, sentence_attention_mask, sentence_token_type_ids (`torch.LongTensor` of shape `(batch,
                sentences, tokens)`, *optional*): further texts of each volume, such as sentences of its report; all
                ranks give as many.
            sentence_ids (`torch.LongTensor` of shape `(batch, sentences)`, *optional*): as `report_ids`.
            corruption_seeds (`torch.LongTensor` of shape `(batch,)`, *optional*): what decides how restoration
                corrupts each pair's views; drawn anew in training and the pairs' places in evaluation by default.
            stage (`"encode"` or `"align"`, *optional*): run one stage alone; `"encode"` returns [`T3DPairFeatures`].
            features (`T3DPairFeatures`, *optional*): what `stage="align"` takes instead of everything above it.
        """
        if stage == "align":
            if features is None:
                raise ValueError('stage="align" needs features: pass what stage="encode" returned')
            return self.align(features, return_loss)
        encoded = self.encode_pairs(
            input_ids,
            pixel_values,
            attention_mask,
            token_type_ids,
            local_pixel_values,
            local_mask,
            local_positions,
            return_loss,
            study_ids,
            report_ids,
            sentence_input_ids,
            sentence_attention_mask,
            sentence_token_type_ids,
            sentence_ids,
            corruption_seeds,
            **kwargs,
        )
        return encoded if stage == "encode" else self.align(encoded, return_loss)

    @torch.no_grad()
    def get_text_attention(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        local_pixel_values: torch.Tensor | None = None,
        local_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        local_hidden_state: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Where in each view a text looks, for localisation: a report, or the prompt of a class.

        `tma_query="text"`: the attention of the text's query, mean over heads; `"none"`: of the learnt query,
        whatever the text. Otherwise (`"vision"`, whose attention runs over the report, `"mean"`, models without TMA):
        softmax over the view's tokens of their similarity to the text, at the temperature of global alignment.

        Args:
            input_ids, attention_mask, token_type_ids (`torch.LongTensor` of shape `(texts, tokens)`): one text per
                volume, or any number of texts for one volume.
            local_pixel_values (`torch.Tensor` of shape `(volumes, views, num_channels, d, h, w)`), local_mask: the
                views.
            local_hidden_state (`torch.Tensor` of shape `(volumes, views, hidden_size, d', h', w')`, *optional*):
                instead of the views, their maps from [`T3DModel.encode_local_views`], for use with many texts.

        Returns:
            `torch.FloatTensor` of shape `(texts, views, d', h', w')`: sums to 1 over each view's grid; zeros for views
            that the mask leaves out.
        """
        if local_hidden_state is None:
            if local_pixel_values is None:
                raise ValueError("get_text_attention needs views: pass local_pixel_values or local_hidden_state")
            local_hidden_state, local_mask = self.t3d.encode_local_views(local_pixel_values, local_mask)
        queries = self.t3d.get_text_features(input_ids, attention_mask, token_type_ids, return_dict=True).pooler_output
        if len(local_hidden_state) not in (1, len(queries)):
            raise ValueError(f"{len(queries)} texts for {len(local_hidden_state)} volumes: give one text per volume")
        tokens = self.project_tokens(local_hidden_state)
        alignment = self.multi_view_alignment
        if alignment is None or self.config.tma_query == "vision":
            # By its forward pass, which is where an offloaded model has its temperature.
            texts = [queries] if len(tokens) == 1 else queries.split(1)
            logits = [
                self.t3d(image_features=views, text_features=text, return_dict=True).logits_per_text
                for views, text in zip(tokens.flatten(1, 2), texts, strict=True)
            ]
            weights = torch.cat(logits).unflatten(1, tokens.shape[1:3]).softmax(dim=-1)
        else:
            if self.config.tma_query == "none":
                queries = alignment.learned_queries(queries.device).expand(len(queries), -1)
            weights = alignment.attention_map(queries, tokens)
        weights = weights.unflatten(2, local_hidden_state.shape[3:])
        return weights if local_mask is None else weights * local_mask[..., None, None, None].to(weights)


__all__ = ["T3DForPreTraining"]
