# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The T3D models: vision tower, dual encoder, image classification. Pre-training stands in `modeling_pretraining_t3d`,
encoders in `encoders_t3d`, what crosses ranks in `communication_t3d`.
"""

import inspect
from contextlib import nullcontext
from copy import deepcopy
from math import log
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .classification_labels_t3d import infer_problem_type, prepare_labels
from .communication_t3d import all_gather, gather_sizes, global_mean, rank
from .configuration_t3d import T3DConfig, T3DVisionConfig
from .contrastive_loss_t3d import contrastive_sigmoid, contrastive_softmax
from .encoders_t3d import (
    T3DEncoderBlock,
    T3DViTAttention,
    build_encoder,
    frozen_batch_norm_statistics,
    trains_batch_norm,
)
from .layers_t3d import T3DProjectionHead, T3DViewFusion, masked_mean, unit_norm
from .modeling_outputs_t3d import T3DOutput, T3DVisionModelOutput
from .pair_relations_t3d import SoftTargets, gather_identities
from .pretrained_model_t3d import T3DPreTrainedModel


def _auto_class(config: PreTrainedConfig) -> Any:
    """
    The Auto class that makes a text encoder of a configuration: the plain one would give T5 its decoder.

    Raises:
        ValueError: the configuration is not that of a text encoder.
    """
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return AutoModelForTextEncoding
    if config.is_encoder_decoder or not (hasattr(config, "hidden_size") and hasattr(config, "num_hidden_layers")):
        raise ValueError(
            f"{type(config).__name__} describes more than a text encoder, which the text tower has to be; give the "
            "text part of a model of several towers (text_model, text_config), or another encoder, such as BERT or T5"
        )
    return AutoModel


def _build_text_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The text tower, without a pooler where its class can be built without: it would stay untrained."""
    auto_class = _auto_class(config)
    known: Any = auto_class._model_mapping.get(type(config), None)
    model_class = known[0] if isinstance(known, tuple) else known
    has_pooler = model_class is not None and "add_pooling_layer" in inspect.signature(model_class).parameters
    return auto_class.from_config(config, **({"add_pooling_layer": False} if has_pooler else {}))


class T3DVisionModel(T3DPreTrainedModel):
    r"""
    The vision tower: an encoder of `encoders_t3d` and the mean over its token map.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d import T3DConfig, T3DVisionModel

    >>> model = T3DVisionModel(T3DConfig.from_preset("tiny").vision_config)
    >>> output = model(torch.zeros(2, 1, 16, 32, 32))
    >>> tuple(output.last_hidden_state.shape), tuple(output.pooler_output.shape)
    ((2, 128, 2, 4, 4), (2, 128))

    ```"""

    config: T3DVisionConfig  # type: ignore[assignment]
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": T3DEncoderBlock, "attentions": T3DViTAttention}  # noqa: RUF012

    def __init__(self, config: T3DVisionConfig):
        super().__init__(config)
        self.encoder = build_encoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's first layer."""
        return self.encoder.get_input_embeddings()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> T3DVisionModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, depth, height, width)`): views, as the
                processor scales them.
        """
        if pixel_values is None:
            raise ValueError("a volume's embedding needs its global view: pass pixel_values")
        output = self.encoder(pixel_values, **kwargs)
        return T3DVisionModelOutput(
            last_hidden_state=output.last_hidden_state,
            pooler_output=output.last_hidden_state.mean(dim=(2, 3, 4)),
            feature_maps=output.feature_maps,
        )


class T3DModel(T3DPreTrainedModel):
    r"""
    The dual encoder: volumes and reports in one space, with global alignment (GCA) as its loss.

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d import T3DConfig, T3DModel

    >>> model = T3DModel(T3DConfig.from_preset("tiny")).eval()
    >>> output = model(input_ids=torch.tensor([[2, 5, 3], [2, 7, 3]]), pixel_values=torch.zeros(1, 1, 16, 32, 32))
    >>> tuple(output.logits_per_image.shape)
    (1, 2)

    ```"""

    # Bare exponents: in bfloat16 the temperature itself would be off by a fraction of a per cent.
    _keep_in_fp32_modules_strict = ["logit_scale", "logit_bias"]  # noqa: RUF012
    # What pre-training needs beyond the dual encoder is no news to who loads the dual encoder from its folder.
    _keys_to_ignore_on_load_unexpected = [r"^(multi_view_alignment|prototypes|restoration)\."]  # noqa: RUF012

    def __init__(self, config: T3DConfig):
        super().__init__(config)
        self.vision_model = T3DVisionModel._from_config(config.vision_config)
        self.text_model = _build_text_model(config.text_config)
        self.visual_projection = T3DProjectionHead(
            config.vision_config.hidden_size,
            config.projection_hidden_size,
            config.projection_dim,
            config.projection_norm,
        )
        self.text_projection = T3DProjectionHead(
            config.text_config.hidden_size,
            config.projection_hidden_size,
            config.projection_dim,
            config.projection_norm,
        )
        self.view_fusion = T3DViewFusion(config) if config.view_fusion == "attention" else None
        # A log, so that a learnt scale stays positive. Fixed, it is a parameter all the same: the placement of models
        # that do not fit on a device loses a nested module's own buffers.
        # In 32 bits at least where the model is made in 16: small steps of a logarithm would be rounded away.
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.logit_scale = nn.Parameter(torch.zeros((), dtype=dtype), requires_grad=self._learns_scale)
        self._view_chunk_size: int | None = None
        has_bias = config.contrastive_loss == "sigmoid"
        self.logit_bias = nn.Parameter(torch.zeros((), dtype=dtype)) if has_bias else None
        # DistilBERT and others take no segments, and RoBERTa has a single one.
        self._takes_token_types = getattr(config.text_config, "type_vocab_size", 0) > 1
        self.post_init()

    @property
    def _learns_scale(self) -> bool:
        return self.config.learnable_temperature or self.config.contrastive_loss == "sigmoid"

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's word embeddings."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text tower's word embeddings."""
        self.text_model.set_input_embeddings(value)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str | PathLike | PreTrainedModel, text: str | PathLike | PreTrainedModel, **config: Any
    ) -> "T3DModel":
        r"""
        Start from two pretrained towers; everything else is new.

        Args:
            vision (`str`, `PathLike` or `T3DPreTrainedModel`): a folder or Hub id of any T3D model, or the model.
            text (`str`, `PathLike` or `PreTrainedModel`):
                Any text encoder; its pooler or head is dropped, and T5's decoder. One that reads from left to right
                (GPT-2, CLIP) needs `text_pooling="mean"`.
            config: fields of [`T3DConfig`]; `num_frozen_text_layers` is checked against the tower and applied.

        Example:

        ```python
        >>> from transformers import BertConfig, BertModel
        >>> from modeling_t3d import T3DConfig, T3DModel, T3DVisionModel

        >>> preset = T3DConfig.from_preset("tiny")
        >>> text = BertModel(preset.text_config)
        >>> model = T3DModel.from_vision_text_pretrained(
        ...     T3DVisionModel(preset.vision_config), text, num_frozen_text_layers=1, projection_dim=32
        ... )
        >>> [next(layer.parameters()).requires_grad for layer in model.text_model.encoder.layer]
        [False, True]

        ```"""
        return model_from_towers(cls, vision, text, config)

    def freeze_after_loading(self) -> None:
        """Freeze a temperature that is not learnt, and text layers."""
        self.logit_scale.requires_grad_(self._learns_scale)
        self.freeze_text_layers()

    def freeze_text_layers(self) -> None:
        """Freeze the lowest `config.num_frozen_text_layers` text layers, and the embeddings that they rest on."""
        if not self.config.num_frozen_text_layers:
            return
        depth = self.config.text_config.num_hidden_layers
        names = (
            name
            for name, module in self.text_model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == depth
        )
        name = next(names, None)
        if name is None:
            raise ValueError(
                f"no list of {depth} layers found in {type(self.text_model).__name__}; set num_frozen_text_layers=0 "
                "and freeze its parameters yourself"
            )
        stack = self.text_model.get_submodule(name.rpartition(".")[0])
        frozen = [self.get_input_embeddings()]
        frozen += [module for name, module in self.text_model.named_children() if name.startswith("embed")]
        is_before = True
        for module in stack.children():
            # XLM holds the parts of its layers in one list each.
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                frozen += module[: self.config.num_frozen_text_layers]
                is_before = False
            elif is_before:
                frozen.append(module)
        for module in frozen:
            module.requires_grad_(False)
        for parameter in stack.parameters(recurse=False):
            parameter.requires_grad_(False)

    @torch.no_grad()
    def refuse_blind_first_token(self) -> None:
        """
        Check that the first token's state, where it stands for the text, depends on the tokens after it.

        Raises:
            ValueError: it does not; all texts that begin alike would have one embedding.
        """
        if self.config.text_pooling != "first":
            return
        texts = torch.tensor([[0, 1], [0, 2]], device=self.device)
        was_training = self.training
        _, pooled = self.eval().encode_text(texts, torch.ones_like(texts))
        self.train(was_training)
        if torch.equal(pooled[0], pooled[1]):
            raise ValueError(
                f"{type(self.text_model).__name__} reads from left to right: the state of its first token is the same "
                'for every text that begins with it; pass text_pooling="mean"'
            )

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Hold a learnt scale at `config.max_logit_scale` or below; call it after each optimiser step."""
        if self._learns_scale:
            self.logit_scale.clamp_(max=log(self.config.max_logit_scale))

    def set_view_chunk_size(self, size: int | None) -> None:
        """
        Encode this many local views at once, and again in the backward pass: memory then holds the activations of one
        chunk of views. `None` encodes all at once. The gradients are the same.

        Raises:
            ValueError: the size is less than 1.
        """
        if size is not None and size < 1:
            raise ValueError(f"chunks hold at least 1 view, got {size}; None encodes all views at once")
        self._view_chunk_size = size

    def _encode_views(self, views: torch.Tensor) -> torch.Tensor:
        """Token maps of `(views, num_channels, d, h, w)`, as `set_view_chunk_size` says."""
        size = self._view_chunk_size
        if size is None or size >= len(views):
            return self.vision_model(views).last_hidden_state
        if trains_batch_norm(self.vision_model):
            raise ValueError(
                f"chunks of {size} views would change the statistics of batch norm; put it into evaluation mode, "
                'choose norm="group", or encode all views at once'
            )

        def encode(chunk: torch.Tensor) -> torch.Tensor:
            return self.vision_model(chunk).last_hidden_state

        remainder = len(views) % size
        *chunks, last = views.split([remainder] * (remainder > 0) + [size] * (len(views) // size))
        maps = [checkpoint(encode, chunk, use_reentrant=False) for chunk in chunks]
        # The backward pass begins with what came last: that graph is kept, for it is the one that memory holds then.
        return torch.cat([*maps, encode(last)])

    def encode_local_views(
        self, local_pixel_values: torch.Tensor, local_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Token maps of local views; a view that the mask leaves out is not encoded.

        Args:
            local_pixel_values (`torch.Tensor` of shape `(batch, views, num_channels, d, h, w)`): full resolution.
            local_mask (`torch.BoolTensor` of shape `(batch, views)`, *optional*): views that exist; all by default.

        Returns:
            The maps, `(batch, views, hidden_size, d', h', w')`, zeros where masked, and the mask.
        """
        if local_pixel_values.ndim != 6:
            raise ValueError(
                f"local_pixel_values of shape {tuple(local_pixel_values.shape)} do not fit: expected (batch, views, "
                "channels, depth, height, width)"
            )
        shape = local_pixel_values.shape[:2]
        views = local_pixel_values.flatten(0, 1)
        if local_mask is None:
            return (
                self._encode_views(views).unflatten(0, shape),
                torch.ones(shape, dtype=torch.bool, device=views.device),
            )
        if local_mask.shape != shape:
            raise ValueError(
                f"local_mask of shape {tuple(local_mask.shape)} does not fit {shape[0]} volumes of {shape[1]} views"
            )
        local_mask = local_mask.to(views.device, torch.bool)
        kept = local_mask.flatten()
        # Asking costs one host synchronisation; encoding one view of padding would cost far more.
        if kept.all():
            return self._encode_views(views).unflatten(0, shape), local_mask
        if kept.any():
            encoded = self._encode_views(views[kept])
        else:
            # The other ranks wait for maps of the same grid, and for this one's part, zero, of their gradients.
            with frozen_batch_norm_statistics(self.vision_model):
                encoded = self.vision_model(torch.zeros_like(views[:1])).last_hidden_state[:0]
        maps = encoded.new_zeros(len(views), *encoded.shape[1:])
        return maps.masked_scatter(kept.view(-1, 1, 1, 1, 1), encoded).unflatten(0, shape), local_mask

    def fuse_views(
        self,
        global_features: torch.Tensor,
        local_features: torch.Tensor,
        local_mask: torch.Tensor,
        local_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Volume features `(batch, hidden_size)` of pooled views, as `config.view_fusion` says."""
        if self.view_fusion is None:
            views = torch.cat([global_features[:, None], local_features], dim=1)
            return masked_mean(views, nn.functional.pad(local_mask, (1, 0), value=1))
        if local_positions is None or local_positions.shape != (*local_mask.shape, 6):
            given = "none" if local_positions is None else f"shape {tuple(local_positions.shape)}"
            raise ValueError(
                f'view_fusion="attention" needs local_positions of shape {(*local_mask.shape, 6)}, got {given}; the '
                "processor returns them with the views"
            )
        return self.view_fusion(global_features, local_features, local_mask, local_positions)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        local_pixel_values: torch.Tensor | None = None,
        local_mask: torch.Tensor | None = None,
        local_positions: torch.Tensor | None = None,
        output_local_hidden_state: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> T3DVisionModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, depth, height, width)`): global views.
            local_pixel_values (`torch.Tensor` of shape `(batch, views, num_channels, d, h, w)`, *optional*): local
                views; they enter the embedding unless `view_fusion="global"`.
            local_mask (`torch.BoolTensor` of shape `(batch, views)`, *optional*): views that exist.
            local_positions (`torch.Tensor` of shape `(batch, views, 6)`, *optional*): needed by
                `view_fusion="attention"`.
            output_local_hidden_state (`bool`, defaults to `False`): encode the local views in any case and return
                their token maps.

        Returns:
            [`T3DVisionModelOutput`] whose `pooler_output` is the projected, un-normalised embedding.
        """
        output = self.vision_model(pixel_values, **kwargs)
        features, maps = output.pooler_output, None
        fuses = self.config.view_fusion != "global"
        if local_pixel_values is not None and (fuses or output_local_hidden_state):
            # Running batch statistics are those of the views that the embedding rests on: crops would blur them.
            with nullcontext() if fuses else frozen_batch_norm_statistics(self.vision_model):
                maps, local_mask = self.encode_local_views(local_pixel_values, local_mask)
            if len(maps) != len(features):
                raise ValueError(f"{len(features)} global views, but local views of {len(maps)} volumes")
        if fuses:
            if maps is None:  # the global view alone
                local, local_positions = features[:, None][:, :0], features.new_zeros(len(features), 0, 6)
                local_mask = torch.zeros(len(features), 0, dtype=torch.bool, device=features.device)
            else:
                local = maps.mean(dim=(3, 4, 5))
            features = self.fuse_views(features, local, local_mask, local_positions)
        return T3DVisionModelOutput(
            last_hidden_state=output.last_hidden_state,
            pooler_output=self.visual_projection(features),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            local_hidden_state=maps if output_local_hidden_state else None,
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`): reports or prompts.
            attention_mask (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): 0 for padding.
            token_type_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): for towers with segments;
                others are not given them.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`] whose `pooler_output` is the projected,
            un-normalised embedding of the first token that is no padding, or of the tokens' mean, as
            `config.text_pooling` says.
        """
        output, pooled = self.encode_text(input_ids, attention_mask, token_type_ids, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=self.text_projection(pooled),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def encode_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[BaseModelOutput, torch.Tensor]:
        """The text tower's output, and its tokens pooled to `(batch, hidden_size)`, before the projection.

        Arguments as those of [`~T3DModel.get_text_features`].

        Raises:
            ValueError: no texts, or texts that are not `(batch, tokens)`.
        """
        if input_ids is None or input_ids.ndim != 2:
            given = "none" if input_ids is None else f"shape {tuple(input_ids.shape)}"
            raise ValueError(
                f"a report's embedding needs input_ids of shape (batch, tokens), got {given}; pass what the "
                "processor returns for a list of texts"
            )
        segments = {"token_type_ids": token_type_ids} if self._takes_token_types else {}
        output = self.text_model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **segments, **kwargs
        )
        tokens = output.last_hidden_state
        if self.config.text_pooling == "mean":
            return output, masked_mean(tokens, attention_mask)
        if attention_mask is None:
            return output, tokens[:, 0]
        # A tokeniser may pad on the left.
        first = (attention_mask != 0).int().argmax(dim=1).to(tokens.device)
        return output, tokens.gather(1, first[:, None, None].expand(-1, 1, tokens.shape[2])).squeeze(1)

    def global_alignment_loss(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        text_features: torch.Tensor,
        study_ids: torch.Tensor | None = None,
        report_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        GCA over the pairs of all ranks: a scalar, the same on every rank.

        Args:
            image_embeds, text_embeds (`torch.Tensor` of shape `(batch, projection_dim)`): of unit norm, paired.
            text_features (`torch.Tensor` of shape `(batch, projection_dim)`): un-normalised, for soft targets.
            study_ids, report_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): pairs that share one that is
                not negative are not negatives of each other.
        """
        if len(image_embeds) != len(text_embeds):
            raise ValueError(f"the loss needs one report per volume, got {len(text_embeds)} for {len(image_embeds)}")
        sizes = gather_sizes(len(image_embeds), image_embeds.device)
        pairs: dict[str, Any] = {
            "offset": sum(sizes[: rank()]),
            "identities": gather_identities(study_ids, report_ids, sizes, image_embeds.device),
        }
        all_text_embeds = all_gather(text_embeds, sizes)
        scale = self.logit_scale.exp().to(image_embeds.device)
        if self.config.contrastive_loss == "sigmoid":
            bias = self.logit_bias.to(scale.device)
            return global_mean(*contrastive_sigmoid(image_embeds, all_text_embeds, scale, bias, **pairs))
        if sum(sizes) < 2:
            raise ValueError("contrastive learning needs negatives: the global batch holds 1 pair; use at least 2")
        targets = None
        if self.config.soft_targets:
            targets = SoftTargets(
                text_features,
                all_gather(text_features.detach(), sizes),
                temperature=self.config.gca_temperature,
                rate=self.config.soft_target_rate,
            )
        all_image_embeds = all_gather(image_embeds, sizes)
        return global_mean(
            *contrastive_softmax(
                image_embeds,
                text_embeds,
                all_image_embeds,
                all_text_embeds,
                scale,
                soft_targets=targets,
                **pairs,
            )
        )

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
        return_loss: bool | None = None,
        study_ids: torch.Tensor | None = None,
        report_ids: torch.Tensor | None = None,
        output_local_hidden_state: bool = False,
        image_features: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
        output_logits: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> T3DOutput:
        r"""
        Every report against every volume. Arguments as in `get_text_features`, `get_image_features` and, for the loss
        over pairs that `return_loss=True` adds, `global_alignment_loss`.

        Args:
            image_features, text_features (`torch.Tensor` of shape `(batch, projection_dim)`, *optional*): what
                `get_image_features` and `get_text_features` gave, instead of their arguments.
            output_logits (`bool`, defaults to `True`): without them, memory does not grow with the batch's square.
        """
        vision_output, text_output = None, None
        if image_features is None:
            vision_output = self.get_image_features(
                pixel_values,
                local_pixel_values,
                local_mask,
                local_positions,
                output_local_hidden_state=output_local_hidden_state,
                return_dict=True,
                **kwargs,
            )
            image_features = vision_output.pooler_output
        if text_features is None:
            text_output = self.get_text_features(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
            text_features = text_output.pooler_output
        image_embeds = unit_norm(image_features)
        text_features = text_features.to(image_embeds.device)
        text_embeds = unit_norm(text_features)
        logits_per_text = None
        if output_logits:
            with torch.autocast(image_embeds.device.type, enabled=False):
                logits_per_text = text_embeds @ image_embeds.T * self.logit_scale.exp().to(image_embeds.device)
            if self.logit_bias is not None:
                logits_per_text = logits_per_text + self.logit_bias.to(image_embeds.device)
        loss = None
        if return_loss:
            loss = self.global_alignment_loss(image_embeds, text_embeds, text_features, study_ids, report_ids)
        return T3DOutput(
            loss=loss,
            logits_per_image=None if logits_per_text is None else logits_per_text.T,
            logits_per_text=logits_per_text,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            vision_model_output=vision_output,
            text_model_output=text_output,
        )


def model_from_towers(
    model_class: type[T3DPreTrainedModel],
    vision: str | PathLike | PreTrainedModel,
    text: str | PathLike | PreTrainedModel,
    config: dict[str, Any],
) -> Any:
    """A dual encoder, or a model around one, whose towers hold the given weights, in 32 bits however they came."""
    vision_model = (
        vision if isinstance(vision, PreTrainedModel) else T3DVisionModel.from_pretrained(vision)
    ).base_model
    vision_model = getattr(vision_model, "vision_model", vision_model)
    if not isinstance(text, PreTrainedModel):
        text = _auto_class(AutoConfig.from_pretrained(text)).from_pretrained(text)
    text_model = text.base_model
    _auto_class(text_model.config)  # a model that is no text encoder is refused before a configuration is made of it
    towers: dict[str, Any] = {
        "vision_config": deepcopy(vision_model.config),
        "text_config": deepcopy(text_model.config),
    }
    for tower in towers.values():
        # Or the tower would be built as its weights were stored: beside parts of another type, or, in 16 bits, too
        # coarse for small steps.
        tower.dtype = None
        if Path(tower.name_or_path).exists():  # where on this machine it lay is nobody's business
            tower.name_or_path = ""
    model = model_class(T3DConfig(**towers, **config))
    model.base_model.vision_model.load_state_dict(vision_model.state_dict())
    tower = model.base_model.text_model
    names = tower.state_dict().keys()  # no pooler, head or decoder
    tower.load_state_dict({name: weight for name, weight in text_model.state_dict().items() if name in names})
    model.base_model.refuse_blind_first_token()
    model.freeze_after_loading()
    return model


class T3DForImageClassification(T3DPreTrainedModel):
    r"""
    The vision tower with a linear classifier on the mean of its token map; `config.problem_type` chooses the loss
    (cross entropy, binary cross entropy per label, squared error).

    Example:

    ```python
    >>> import torch
    >>> from modeling_t3d import T3DConfig, T3DForImageClassification

    >>> config = T3DConfig.from_preset("tiny").vision_config
    >>> config.num_labels, config.problem_type = 3, "multi_label_classification"
    >>> model = T3DForImageClassification(config)
    >>> tuple(model(torch.zeros(2, 1, 16, 32, 32), labels=torch.zeros(2, 3)).logits.shape)
    (2, 3)

    ```"""

    config: T3DVisionConfig  # type: ignore[assignment]
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    # The loss is the mean over the batch it is given, whatever count a trainer offers.
    accepts_loss_kwargs = False

    def __init__(self, config: T3DVisionConfig):
        super().__init__(config)
        self.vision_model = T3DVisionModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, depth, height, width)`): global views.
            labels (`torch.LongTensor` of shape `(batch,)` or `torch.Tensor` of shape `(batch, num_labels)`,
                *optional*): classes, or one number per label. The loss is the mean over those that are known; see
                [`~classification_labels_t3d.prepare_labels`].
        """
        output = self.vision_model(pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(output.pooler_output))
        loss = None
        if labels is not None:
            if self.config.problem_type is None:
                self.config.problem_type = infer_problem_type(labels, self.config.num_labels)
            labels, known = prepare_labels(labels, logits, self.config.problem_type)
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if not known.all():
                labels, scores = labels[known], scores[known]
            # Of nothing the mean would be NaN.
            loss = self.loss_function(labels, scores, self.config) if len(labels) else 0.0 * logits.sum()
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


__all__ = [
    "T3DForImageClassification",
    "T3DModel",
    "T3DOutput",
    "T3DPreTrainedModel",
    "T3DVisionModel",
    "T3DVisionModelOutput",
    "model_from_towers",
]
