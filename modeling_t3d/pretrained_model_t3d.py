# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What all T3D models share: how weights begin, how folders are saved and load into each other, and checkpointing."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from math import log
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .configuration_t3d import T3DConfig
from .encoders_t3d import checkpoint_counting_once, initialize_encoder_module
from .layers_t3d import T3DMultiViewAlignment, T3DPrototypes, T3DViewFusion
from .restoration_t3d import T3DRestoration

if TYPE_CHECKING:
    # Never executed: the exporter of custom code follows the text of imports, and what is named below needs these
    # files in a folder whichever model was saved.
    from .modeling_pretraining_t3d import T3DForPreTraining  # noqa: F401
    from .pipelines_t3d import ZeroShotVolumeClassificationPipeline  # noqa: F401

# Transformers would name the saved class's own Auto class alone; a folder serves every model that can load from it.
# Not a classifier from a dual encoder's: Auto classes take no class of another configuration from a folder.
_AUTO_MAPS = {
    "t3d": {
        "AutoModel": "modeling_t3d.T3DModel",
        "AutoModelForPreTraining": "modeling_pretraining_t3d.T3DForPreTraining",
        "AutoModelForZeroShotImageClassification": "modeling_t3d.T3DModel",
    },
    "t3d_vision_model": {
        "AutoModel": "modeling_t3d.T3DVisionModel",
        "AutoModelForImageClassification": "modeling_t3d.T3DForImageClassification",
    },
}

_CUSTOM_PIPELINES = {
    "zero-shot-volume-classification": {
        "impl": "pipelines_t3d.ZeroShotVolumeClassificationPipeline",
        "pt": ["AutoModelForZeroShotImageClassification"],
        "type": "multimodal",
    }
}

# Keys of a pre-training checkpoint carry one prefix more than those of the dual encoder.
_PRETRAINING_PREFIX = r"^t3d\."


class T3DPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and checkpointing shared by the T3D models."""

    config: T3DConfig
    base_model_prefix = "t3d"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    model_tags = ["medical", "3d", "volume", "t3d"]  # noqa: RUF012 - Transformers' own way to declare them
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = [  # noqa: RUF012
        "T3DResNetBasicBlock",
        "T3DResNetBottleneckBlock",
        "T3DViTLayer",
        "T3DPlaceProjection",
        "T3DProjectionHead",
        "T3DViewFusionLayer",
    ]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Transformers treats classes outside its own tree as unsafe and would skip modules without direct parameters.
        super()._initialize_weights(module, is_custom_code=False)

    def _init_weights(self, module: nn.Module) -> None:
        initialize_encoder_module(module, self.config.initializer_range)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=1.0)
        elif isinstance(getattr(module, "logit_scale", None), nn.Parameter):
            init.constant_(module.logit_scale, -log(self.config.gca_temperature))
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, self.config.initial_logit_bias)
        elif isinstance(module, T3DPrototypes):
            init.zeros_(module.num_batches)
        elif isinstance(module, T3DViewFusion):
            init.xavier_uniform_(module.position_projection.weight)
        elif isinstance(module, (T3DMultiViewAlignment, T3DRestoration)):
            for projection in (
                module.query_projection,
                module.key_projection,
                module.value_projection,
                module.output_projection,
            ):
                init.xavier_uniform_(projection.weight)
            if isinstance(module, T3DRestoration):
                # A restored view begins near 0, the mean of what views are scaled to.
                init.normal_(module.output_convolution.weight, mean=0.0, std=self.config.initializer_range)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights; the exponents, which stay in float32, do not speak for the model."""
        exponents = self._keep_in_fp32_modules_strict
        names = (name for name, _ in self.named_parameters() if name.rpartition(".")[2] not in exponents)
        return self.get_parameter(next(names)).dtype

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; the folder then answers to `pipeline` and every Auto class that have a use for it."""
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **_AUTO_MAPS[self.config.model_type]}
        if isinstance(self.config, T3DConfig):
            self.config.custom_pipelines = _CUSTOM_PIPELINES
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """As in Transformers, where Auto classes come by; a vision model takes its part of a dual encoder's."""
        if cls.base_model_prefix == "vision_model" and isinstance(config, T3DConfig):
            config = config.to_vision_config()
        return super()._from_config(config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike | None, *model_args, **kwargs):
        r"""
        As [`~transformers.PreTrainedModel.from_pretrained`], of the folder of any T3D model that holds this one's
        parts. The lowest `num_frozen_text_layers` are frozen afterwards; a `gca_temperature` among the keywords takes
        the place of the folder's.
        """
        nests_vision_model = cls.base_model_prefix == "vision_model"
        if nests_vision_model:
            if isinstance(kwargs.get("config"), T3DConfig):  # what an Auto class reads in a dual encoder's folder
                config = kwargs["config"].to_vision_config()
                changes = {
                    name: kwargs.pop(name)
                    for name in kwargs.keys() & ({field.name for field in fields(config)} - {"dtype"})
                }
                if changes:
                    attention = config._attn_implementation
                    config = type(config).from_dict(config.to_dict(), attn_implementation=attention, **changes)
                kwargs["config"] = config
            kwargs["key_mapping"] = {**(kwargs.get("key_mapping") or {}), _PRETRAINING_PREFIX: ""}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if nests_vision_model:
            # Or saving this model would write the pre-training prefix back.
            model._weight_conversions = [
                conversion
                for conversion in getattr(model, "_weight_conversions", None) or []
                if _PRETRAINING_PREFIX not in conversion.source_patterns
            ]
        if vars(model.config).pop("_replaces_temperature", False):
            # The folder holds the scale as a weight, which loading has just put in place of the keyword's.
            _set_logit_scale(model.base_model, -log(model.config.gca_temperature))
        model.freeze_after_loading()
        return loaded

    def freeze_after_loading(self) -> None:
        """Freeze what the configuration says does not train: loading makes every parameter trainable."""

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):

        def activation_checkpointing_enable(
            self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            """What Transformers before 5.23 calls gradient checkpointing, without re-entrance unless asked for."""
            self.gradient_checkpointing_enable(activation_checkpointing_kwargs or {"use_reentrant": False}, **kwargs)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        # Without it, batch norms in a recomputed block would count the same batch twice.
        function = partial(checkpoint_counting_once, self, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, function, every_n_layers)


@torch.no_grad()
def _set_logit_scale(model: nn.Module, value: float) -> None:
    """Set the scale of a dual encoder, also of one that lies on disk, which reads its weights anew in each forward."""
    hook = getattr(model, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        weights = getattr(one, "weights_map", None)
        if weights is not None:
            weights.dataset.state_dict[f"{weights.prefix}logit_scale"] = torch.tensor(value)
    model.logit_scale.fill_(value)


__all__ = ["T3DPreTrainedModel"]
