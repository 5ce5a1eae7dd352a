# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Configurations of T3D and its vision tower. Validation only: no torch, no files; presets stand in `presets_t3d`."""

import difflib
from copy import deepcopy
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec

from .configuration_checks_t3d import (
    check_local_contrast,
    check_terms,
    checked_keywords,
    divides,
    refuse_unknown,
    triple,
)
from .presets_t3d import OBJECTIVES, PRESETS, ROBERTA_LAYOUT

_BOTTLENECK_EXPANSION = 4
# Fields of the vision tower that others decide where they are not given; the sizes, for a ResNet alone.
_SIZE_FIELDS = frozenset({"hidden_size", "num_hidden_layers"})
_DERIVED_FIELDS = frozenset({"intermediate_size", "feature_layers"})
_SHAPING_FIELDS = _SIZE_FIELDS | {"encoder_type", "hidden_sizes", "depths"}
_LABEL_FIELDS = ("id2label", "label2id", "problem_type")


@strict
class T3DVisionConfig(PreTrainedConfig):
    r"""
    Configuration of [`T3DVisionModel`]: which 3D encoder, and its sizes.

    The defaults are the 3D ResNet-50 that the T3D publication names, in MONAI's layout, with group instead of batch
    normalisation (our choice: a sample's features then do not depend on its batch). Triples are in order (z, y, x).

    Args:
        encoder_type (`str`, defaults to `"resnet"`):
            A name in `modeling_t3d.encoders_t3d.ENCODERS`: `"resnet"`, `"vit"`, `"local_contrast"` (our own, for
            small lesions at little compute), or one that you registered.
        num_channels (`int`, defaults to 1): intensity windows per view.
        hidden_size (`int`, *optional*):
            Channels of the token map. Derived for the ResNet (`hidden_sizes[-1]`); 48 for local contrast, 768 for the
            ViT.
        num_hidden_layers (`int`, *optional*):
            Derived for the ResNet (`sum(depths)`) and local contrast (1); 12 for the ViT.
        embedding_size (`int`, defaults to 64): ResNet: channels of the stem.
        hidden_sizes (`list[int]`, defaults to `(256, 512, 1024, 2048)`): ResNet: channels that each stage puts out.
        depths (`list[int]`, defaults to `(3, 4, 6, 3)`): ResNet: residual blocks per stage.
        layer_type (`"bottleneck"` or `"basic"`, defaults to `"bottleneck"`): ResNet: the residual block.
        stem_kernel_size, stem_stride (`int` or triple, defaults to 7 and 1): ResNet: first convolution (MONAI's).
        stem_pool (`bool`, defaults to `True`): ResNet: 3^3 max-pooling of stride 2 after the stem (MONAI's).
        shortcut_type (`"A"` or `"B"`, defaults to `"B"`):
            ResNet: parameter-free (average-pooled, zero-padded) or convolutional shortcuts, as in MONAI.
        downsample_bias (`bool`, defaults to `True`): ResNet: bias of the shortcut convolution; MedicalNet has none.
        norm (`"group"`, `"batch"` or `"instance"`, defaults to `"group"`): ResNet: normalisation in *every* block.
        num_norm_groups (`int`, defaults to 32), norm_eps (`float`, defaults to 1e-5): ResNet: their settings.
        patch_size (`int` or triple, defaults to 16): ViT: voxels per token and axis.
        num_attention_heads (`int`, defaults to 12), intermediate_size (`int`, *optional*, `4 * hidden_size`),
        hidden_act (`str`, defaults to `"gelu"`), layer_norm_eps (`float`, defaults to 1e-6),
        hidden_dropout_prob, attention_probs_dropout_prob (`float`, defaults to 0.0): ViT: as in Transformers.
        feature_layers (`list[int]`, *optional*):
            ViT: after which layers (1-based, ascending) a feature map is taken; by default each quarter of the depth.
        cell_size (`int`, defaults to 6): local contrast: edge of a token's cell in voxels, an even number [choice].
        grid_size (`int` or triple, defaults to `(18, 12, 16)`):
            Local contrast: cells of the views whose places are learnt, `ceil(view size / cell_size)`; the global view
            of the configuration that comes with it is 104 x 72 x 96 [choice].
        bright_channels, dark_channels (`list[int]`, *optional*, all channels by default):
            Local contrast: in which intensity windows to look for bright and for dark spots; for dark ones a window
            whose lower end is just below the tissue around them serves best, [-20, 140] HU for cysts [choice].
        response_edges (`list[float]`, defaults to `(-1.0, 0.3, 1.2, 2.5, 5.0)`):
            Local contrast: bins of the largest response in a cell, in standard deviations from its mean [choice].
        encoder_options (`dict`, *optional*): settings of an encoder that you registered.
        provenance (`dict`, *optional*): where the weights come from: source file and its hash, licence.
        classifier_dropout (`float`, defaults to 0.3): before the linear layer of [`T3DForImageClassification`].
        initializer_range (`float`, defaults to 0.02): standard deviation of linear layers' initial weights.

    Example:

    ```python
    >>> from modeling_t3d import T3DVisionConfig, T3DVisionModel

    >>> config = T3DVisionConfig(
    ...     embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_norm_groups=8
    ... )
    >>> T3DVisionModel(config).config.hidden_size
    32

    ```"""

    model_type = "t3d_vision_model"
    base_config_key = "vision_config"

    encoder_type: str = "resnet"
    num_channels: int = 1
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    embedding_size: int = 64
    hidden_sizes: list[int] | tuple[int, ...] = (256, 512, 1024, 2048)
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    layer_type: Literal["bottleneck", "basic"] = "bottleneck"
    stem_kernel_size: int | list[int] | tuple[int, ...] = 7
    stem_stride: int | list[int] | tuple[int, ...] = 1
    stem_pool: bool = True
    shortcut_type: Literal["A", "B"] = "B"
    downsample_bias: bool = True
    norm: Literal["group", "batch", "instance"] = "group"
    num_norm_groups: int = 32
    norm_eps: float = 1e-5
    patch_size: int | list[int] | tuple[int, ...] = 16
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    feature_layers: list[int] | tuple[int, ...] | None = None
    cell_size: int = 6
    grid_size: int | list[int] | tuple[int, ...] = (18, 12, 16)
    bright_channels: list[int] | tuple[int, ...] | None = None
    dark_channels: list[int] | tuple[int, ...] | None = None
    response_edges: list[float | int] | tuple[float | int, ...] = (-1.0, 0.3, 1.2, 2.5, 5.0)
    encoder_options: dict | None = None
    classifier_dropout: float | int = 0.3
    provenance: dict | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        refuse_unknown(self, kwargs)
        self.stem_kernel_size = triple("stem_kernel_size", self.stem_kernel_size)
        self.stem_stride = triple("stem_stride", self.stem_stride)
        self.patch_size = triple("patch_size", self.patch_size)
        self.grid_size = triple("grid_size", self.grid_size)
        if self.encoder_type == "resnet":
            if not self.hidden_sizes:
                raise ValueError("hidden_sizes must name at least one stage")
            derived = {"hidden_size": self.hidden_sizes[-1], "num_hidden_layers": sum(self.depths)}
            for name, value in derived.items():
                if getattr(self, name) not in (None, value):
                    raise ValueError(
                        f"{name}={getattr(self, name)} contradicts hidden_sizes and depths of the ResNet, which give "
                        f"{value}; leave {name} out"
                    )
                setattr(self, name, value)
        elif self.encoder_type == "local_contrast":
            self.hidden_size = 48 if self.hidden_size is None else self.hidden_size
            if self.num_hidden_layers not in (None, 1):
                raise ValueError(f"local contrast has one layer, not num_hidden_layers={self.num_hidden_layers}")
            self.num_hidden_layers = 1
        else:
            self.hidden_size = 768 if self.hidden_size is None else self.hidden_size
            self.num_hidden_layers = 12 if self.num_hidden_layers is None else self.num_hidden_layers
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.feature_layers is None:
            quarters = {max(1, round(self.num_hidden_layers * part / 4)) for part in (1, 2, 3, 4)}
            self.feature_layers = sorted(quarters)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in Transformers; labels that a dual encoder's folder has for the whole model are the tower's."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if cls.base_config_key in config_dict:
            labels = {name: config_dict[name] for name in _LABEL_FIELDS if config_dict.get(name) is not None}
            config_dict[cls.base_config_key] = {**config_dict[cls.base_config_key], **labels}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "T3DVisionConfig":
        """As in Transformers; a field among the keywords is set before others are derived from it."""
        names = {field.name for field in fields(cls)}
        changes = {name: kwargs.pop(name) for name in list(kwargs) if name in names and name != "dtype"}
        if changes.keys() & _SHAPING_FIELDS:
            config_dict = _without_derived(cls, config_dict, changes.get("encoder_type"))
        return super().from_dict({**config_dict, **changes}, **checked_keywords(cls, kwargs))

    def validate_architecture(self):
        """Checks that span several fields."""
        if self.num_channels < 1:
            raise ValueError(f"num_channels must be at least 1, got {self.num_channels}")
        if self.encoder_type == "resnet":
            self._validate_resnet()
        elif self.encoder_type == "vit":
            self._validate_vit()
        elif self.encoder_type == "local_contrast":
            check_local_contrast(self)

    def _validate_resnet(self):
        if len(self.depths) != len(self.hidden_sizes) or not self.depths or min(self.depths) < 1:
            raise ValueError(
                f"depths {list(self.depths)} and hidden_sizes {list(self.hidden_sizes)} must name the same stages, "
                "each of at least one block"
            )
        divisor = _BOTTLENECK_EXPANSION if self.layer_type == "bottleneck" else 1
        if any(size % divisor for size in self.hidden_sizes):
            raise ValueError(f"hidden_sizes {list(self.hidden_sizes)} of bottleneck stages must be multiples of 4")
        inner = [self.embedding_size, *(size // divisor for size in self.hidden_sizes)]
        if self.norm == "group" and not divides(self.num_norm_groups, *inner):
            raise ValueError(
                f"num_norm_groups={self.num_norm_groups} does not divide every width of the encoder {inner}; "
                "choose a common divisor"
            )

    def _validate_vit(self):
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"unknown hidden_act {self.hidden_act!r}; Transformers has {', '.join(ACT2FN)}")
        if not divides(self.num_attention_heads, self.hidden_size):
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        layers = list(self.feature_layers)
        if layers != sorted(set(layers)) or not layers or layers[0] < 1 or layers[-1] != self.num_hidden_layers:
            raise ValueError(
                f"feature_layers {layers} must ascend within 1..{self.num_hidden_layers} and end with the last layer"
            )


@strict
class T3DConfig(PreTrainedConfig):
    r"""
    Configuration of [`T3DModel`] and [`T3DForPreTraining`]: two towers and the objectives between them.

    The publications state the two objectives and the ResNet-50; nearly every number below is a choice of this
    re-implementation or a habit of the same authors' sister code, marked [choice] or [habit].

    Args:
        vision_config (`T3DVisionConfig` or `dict`, *optional*): the vision tower.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of any Hugging Face text encoder; the layout of RoBERTa-base (RadBERT-RoBERTa) by default,
            also for what a `dict` without `model_type` leaves out.
        projection_dim (`int`, defaults to 512): joint dimension [habit].
        projection_hidden_size (`int`, defaults to 2048): inner width of the projection heads [habit].
        text_pooling (`"first"` or `"mean"`, defaults to `"first"`):
            The text tower's first hidden state, as published, or the mean over its tokens, which a tower that starts
            from scratch learns with sooner [choice].
        projection_norm (`"layer"` or `"batch"`, defaults to `"layer"`): normalisation inside the heads [choice].
        contrastive_loss (`"softmax"` or `"sigmoid"`, defaults to `"softmax"`): global alignment; sigmoid as SigLIP.
        gca_temperature (`float`, defaults to 0.07): (initial) temperature of global alignment [habit].
        learnable_temperature (`bool`, defaults to `False`): softmax only; the sigmoid form always learns its scale.
        max_logit_scale (`float`, defaults to 100.0): a learnt scale is clamped to it after each optimiser step.
        initial_logit_bias (`float`, defaults to -10.0): sigmoid only, as in SigLIP.
        soft_targets (`bool`, defaults to `False`), soft_target_rate (`float`, defaults to 0.2):
            Softens off-diagonal targets of the softmax form by the reports' correlation [habit: IMITATE].
        lambda_gca, lambda_tma, lambda_tir (`float`, default to 1.0, 1.0 and 0.0):
            Weights of global alignment, multi-view alignment and text-informed restoration [choice]. A term of
            weight 0 is not computed, and the model has no parameters for it.
        gca_views (`"volume"` or `"local"`, defaults to `"volume"`):
            What is aligned with the report: the volume's embedding, or that of each local view, summed over the
            views, as GTGM does with its two crops [paper].
        lambda_sentences (`float`, defaults to 1.0):
            Weight of the volumes' alignment with sentences of their reports, where a batch holds any [choice].
        lambda_texts (`float`, defaults to 0.0):
            Weight of the reports' own alignment with these sentences, for a text tower that starts from scratch: from
            volumes alone it learns what they show already, and forgets small findings before they are seen [choice].
        tma_loss (`"supcon"`, `"swav"` or `"barlow"`, defaults to `"supcon"`): clustering loss of the multi-view
            alignment: contrast between pairs, swapped assignments to prototypes, or decorrelation without negatives
            [choice].
        tma_temperature (`float`, defaults to 0.2): temperature of `"supcon"` [habit: IMITATE].
        num_prototypes (`int`, defaults to 64): of `"swav"`; no more than a global batch has local views [choice].
        num_frozen_prototype_batches (`int`, defaults to 313):
            Training batches for which prototypes hold still [habit: SwAV's code].
        swav_temperature (`float`, defaults to 0.1): of the prediction of assignments [habit: SwAV].
        sinkhorn_epsilon (`float`, defaults to 0.05), num_sinkhorn_iterations (`int`, defaults to 3):
            How hard the assignments are, and how evenly they share the prototypes [habit: SwAV].
        barlow_off_diagonal_weight (`float`, defaults to 0.0051):
            Weight of `"barlow"`'s decorrelation [paper: GTGM's code].
        tma_query (`"text"`, `"none"`, `"vision"` or `"mean"`, defaults to `"text"`): what asks the views; `"none"` is
            the control with a learnt query, `"mean"` takes each view's own embedding and asks nothing [choice].
        tma_negatives (`"same_query"` or `"own_query"`, defaults to `"same_query"`): whether a candidate view is pooled
            with the anchor's query, which closes the leak, or with its own pair's. `"supcon"` alone has negatives:
            the others pool each view with its own pair's query, and have no cure for the leak [choice].
        tma_negative_pairs (`int`, *optional*): score every anchor pair against this many other pairs only, drawn anew
            in every step of training and always the same in evaluation; `"supcon"`.
        num_tma_heads (`int`, defaults to 8): attention heads of the text-informed pooling [choice].
        tir_block_size (`int`, defaults to 16), tir_mask_ratio (`float`, defaults to 0.5), tir_noise (`float`, 0.1):
            Corruption that restoration undoes: edge of the zeroed blocks in voxels, the share of them, and the
            standard deviation of the noise in the unit of the scaled views [choice].
        tir_report (`"own"` or `"other"`, defaults to `"own"`): whose report helps to restore a view; `"other"` takes
            the next pair's of the batch that is encoded, the control that tells whether text helps [choice].
        num_tir_heads (`int`, defaults to 8): attention heads of the restoration's look at the report [choice].
        tir_decoder_channels (`list[int]`, *optional*): channels after each doubling, coarsest first; half as many as
            before, and at least 16, by default [choice].
        tir_norm_groups (`int`, defaults to 8): most groups of the decoder's norms [choice].
        view_fusion (`"global"`, `"mean"` or `"attention"`, defaults to `"global"`): what the volume embedding sees:
            the global view, the mean over all views, or a small transformer over them [choice].
        num_fusion_layers, num_fusion_heads (`int`, default to 2 and 8): that transformer.
        num_frozen_text_layers (`int`, defaults to 0):
            Lowest text layers that do not train, applied after loading. The training configuration for a pretrained
            RadBERT freezes 9 of 12 [choice]; a tower that starts from scratch needs 0.
        provenance (`dict`, *optional*): where the weights come from: parent checkpoint, stage, data, licence.
        initializer_range (`float`, defaults to 0.02): standard deviation of linear layers' initial weights.

    Example:

    ```python
    >>> from modeling_t3d import T3DConfig, T3DModel

    >>> config = T3DConfig.from_preset("tiny", view_fusion="mean")
    >>> T3DModel(config).config.projection_dim
    64

    ```"""

    model_type = "t3d"
    sub_configs_defaults = {  # noqa: RUF012 - Transformers' own way to declare sub-configurations
        "vision_config": SubConfigSpec(config_class=T3DVisionConfig),
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="roberta",
            init_kwargs=ROBERTA_LAYOUT,
        ),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    projection_hidden_size: int = 2048
    text_pooling: Literal["first", "mean"] = "first"
    projection_norm: Literal["layer", "batch"] = "layer"
    contrastive_loss: Literal["softmax", "sigmoid"] = "softmax"
    gca_temperature: float | int = 0.07
    learnable_temperature: bool = False
    max_logit_scale: float | int = 100.0
    initial_logit_bias: float | int = -10.0
    soft_targets: bool = False
    soft_target_rate: float = 0.2
    lambda_gca: float | int = 1.0
    lambda_tma: float | int = 1.0
    lambda_tir: float | int = 0.0
    gca_views: Literal["volume", "local"] = "volume"
    lambda_sentences: float | int = 1.0
    lambda_texts: float | int = 0.0
    tma_loss: Literal["supcon", "swav", "barlow"] = "supcon"
    tma_temperature: float | int = 0.2
    num_prototypes: int = 64
    num_frozen_prototype_batches: int = 313
    swav_temperature: float | int = 0.1
    sinkhorn_epsilon: float | int = 0.05
    num_sinkhorn_iterations: int = 3
    barlow_off_diagonal_weight: float | int = 0.0051
    tma_query: Literal["text", "none", "vision", "mean"] = "text"
    tma_negatives: Literal["same_query", "own_query"] = "same_query"
    tma_negative_pairs: int | None = None
    num_tma_heads: int = 8
    tir_block_size: int = 16
    tir_mask_ratio: float = 0.5
    tir_noise: float | int = 0.1
    tir_report: Literal["own", "other"] = "own"
    num_tir_heads: int = 8
    tir_decoder_channels: list[int] | tuple[int, ...] | None = None
    tir_norm_groups: int = 8
    view_fusion: Literal["global", "mean", "attention"] = "global"
    num_fusion_layers: int = 2
    num_fusion_heads: int = 8
    num_frozen_text_layers: int = 0
    provenance: dict | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        refuse_unknown(self, kwargs)
        if not type(self).__module__.startswith("transformers_modules."):
            # Where the package is imported its own pipeline serves, and nobody is asked to trust the folder's code.
            kwargs.pop("custom_pipelines", None)
        if isinstance(self.text_config, dict) and "model_type" not in self.text_config:
            # Transformers fills the layout in where no text tower is given, but not where single fields of it are.
            self.text_config = {**ROBERTA_LAYOUT, **self.text_config}
        has_labels = self.id2label is not None or kwargs.get("num_labels") is not None
        super().__post_init__(**kwargs)
        if not has_labels:
            # Transformers' two labels would hide those of the vision tower.
            for name in ("id2label", "label2id"):
                setattr(self, name, None)

    def validate_architecture(self):
        """Checks that span several fields."""
        names = ("gca_temperature", "tma_temperature", "swav_temperature", "sinkhorn_epsilon")
        if min(getattr(self, name) for name in names) <= 0:
            given = ", ".join(f"{name}={getattr(self, name)}" for name in names)
            raise ValueError(f"temperatures must be positive, got {given}")
        if self.max_logit_scale <= 0:
            raise ValueError(f"max_logit_scale must be positive, got {self.max_logit_scale}")
        channels = self.vision_config.hidden_size
        if not divides(self.num_tma_heads, self.projection_dim) or not divides(self.num_fusion_heads, channels):
            raise ValueError(
                f"num_tma_heads={self.num_tma_heads} must divide projection_dim={self.projection_dim} and "
                f"num_fusion_heads={self.num_fusion_heads} the vision tower's {channels} channels"
            )
        if self.soft_targets and self.contrastive_loss == "sigmoid":
            raise ValueError('soft_targets belong to contrastive_loss="softmax"; the sigmoid form has none')
        if self.tma_negative_pairs is not None and self.tma_negative_pairs < 1:
            raise ValueError(f"tma_negative_pairs must be at least 1 or None, got {self.tma_negative_pairs}")
        check_terms(self)
        depth = getattr(self.text_config, "num_hidden_layers", None)
        if depth is None:
            raise ValueError(
                f"text_config of type {self.text_config.model_type!r} has no num_hidden_layers: give that of a text "
                "encoder; of a model of several towers, that of its text tower"
            )
        if not 0 <= self.num_frozen_text_layers <= depth:
            raise ValueError(
                f"num_frozen_text_layers={self.num_frozen_text_layers}, but the text tower has {depth} layers"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "T3DConfig":
        """As in Transformers, but an unknown keyword raises, and so do fields that do not fit together."""
        replaces_temperature = "gca_temperature" in kwargs
        loaded = super().from_dict(config_dict, **checked_keywords(cls, kwargs))
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.validate()
        if replaces_temperature:
            # Auto classes keep the keyword from the model, which has to know it: the folder has a scale as a weight.
            config._replaces_temperature = True
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers, without the note that loading takes of a keyword."""
        return {name: value for name, value in super().to_dict().items() if name != "_replaces_temperature"}

    def to_vision_config(self) -> T3DVisionConfig:
        """The vision tower's configuration, with the labels and the problem type that were set for the whole model."""
        config: Any = deepcopy(self.vision_config)
        for name in _LABEL_FIELDS:
            if getattr(self, name) is not None:
                setattr(config, name, getattr(self, name))
        return config

    @classmethod
    def from_preset(cls, name: str, objective: str | None = None, **overrides: Any) -> "T3DConfig":
        """
        A named configuration: `"tiny"` (tests, CPUs), `"base"` (ResNet-50 with group norm, RoBERTa-base) or
        `"base-batchnorm"` (the published encoder, which loads MedicalNet and MONAI weights).

        Args:
            name (`str`): the preset.
            objective (`"v3"`, `"v1"` or `"gtgm"`, *optional*): what is trained: global and multi-view alignment (the
                default of every field), contrast of views and restoration, or alignment of generated text with two
                crops; see `presets_t3d`.
            overrides: fields to change; a `dict` for `vision_config` or `text_config` changes single fields of it.

        Example:

        ```python
        >>> from modeling_t3d import T3DConfig

        >>> config = T3DConfig.from_preset("tiny", objective="v1")
        >>> config.lambda_gca, config.lambda_tir, config.tma_query
        (0.0, 1.0, 'vision')

        ```"""
        settings = deepcopy(_named(PRESETS, "preset", name))
        if objective is not None:
            settings.update(_named(OBJECTIVES, "objective", objective))
        for key in ("vision_config", "text_config"):
            change = overrides.pop(key, None)
            if isinstance(change, PreTrainedConfig):
                settings[key] = change
            elif change is not None:
                same_model = change.get("model_type", settings[key].get("model_type")) == settings[key].get(
                    "model_type"
                )
                settings[key] = {**settings[key], **change} if same_model else change
        return cls(**{**settings, **overrides})


def _without_derived(
    config_class: type[T3DVisionConfig], config_dict: dict[str, Any], encoder_type: str | None
) -> dict[str, Any]:
    """What was given rather than derived, as far as an encoder of the new type has a use for it."""
    kept = {name: value for name, value in config_dict.items() if name not in _DERIVED_FIELDS}
    before = config_class(**kept)
    for name in _DERIVED_FIELDS & config_dict.keys():
        if config_dict[name] != getattr(before, name):
            kept[name] = config_dict[name]
    if before.encoder_type == "resnet" or encoder_type not in (None, before.encoder_type):
        kept = {name: value for name, value in kept.items() if name not in _SIZE_FIELDS}
    return kept


def _named(table: dict[str, dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    if name not in table:
        nearest = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown {kind} {name!r}; the {kind}s are {', '.join(map(repr, table))}{hint}")
    return table[name]


__all__ = ["T3DConfig", "T3DVisionConfig"]
