# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""
T3D: 3D medical vision-language pre-training for Hugging Face Transformers.

Importing the package makes its classes known to the Auto classes and to `transformers.pipeline`, and marks them so
that every plain `save_pretrained` carries their code. A re-implementation from the public description; not a medical
device.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_t3d import T3DConfig, T3DVisionConfig
from .encoders_t3d import ENCODERS, T3DEncoder, T3DEncoderOutput
from .geometry_t3d import Volume, VolumeError, VolumeGeometryError, VolumeIntensityError
from .image_processing_t3d import PreparedVolume, T3DImageProcessor
from .modeling_outputs_t3d import T3DForPreTrainingOutput, T3DOutput, T3DPairFeatures
from .modeling_pretraining_t3d import T3DForPreTraining
from .modeling_t3d import T3DForImageClassification, T3DModel, T3DPreTrainedModel, T3DVisionModel
from .pipelines_t3d import ZeroShotVolumeClassificationPipeline
from .processing_t3d import T3DProcessor
from .volume_io_t3d import VolumeReadError, list_series, read_volume

__version__ = "0.1.0"


def _register() -> None:
    """Make the Auto classes and `pipeline` find the package, and saved folders carry its code."""
    for config in (T3DConfig, T3DVisionConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoImageProcessor.register(
            config, image_processor_classes={"pil": T3DImageProcessor, "torchvision": T3DImageProcessor}, exist_ok=True
        )
        config.register_for_auto_class()
    AutoProcessor.register(T3DConfig, T3DProcessor, exist_ok=True)
    T3DImageProcessor.register_for_auto_class()
    T3DProcessor.register_for_auto_class()

    AutoModel.register(T3DVisionConfig, T3DVisionModel, exist_ok=True)
    AutoModel.register(T3DConfig, T3DModel, exist_ok=True)
    AutoModelForZeroShotImageClassification.register(T3DConfig, T3DModel, exist_ok=True)
    AutoModelForPreTraining.register(T3DConfig, T3DForPreTraining, exist_ok=True)
    AutoModelForImageClassification.register(T3DVisionConfig, T3DForImageClassification, exist_ok=True)
    # A dual encoder's folder too starts a classifier, which takes the vision tower's part of its configuration;
    # `register` itself knows one configuration per class.
    AutoModelForImageClassification._model_mapping.register(T3DConfig, T3DForImageClassification, exist_ok=True)
    T3DVisionModel.register_for_auto_class("AutoModel")
    T3DModel.register_for_auto_class("AutoModel")
    T3DForPreTraining.register_for_auto_class("AutoModelForPreTraining")
    T3DForImageClassification.register_for_auto_class("AutoModelForImageClassification")

    PIPELINE_REGISTRY.register_pipeline(
        "zero-shot-volume-classification",
        pipeline_class=ZeroShotVolumeClassificationPipeline,
        pt_model=AutoModelForZeroShotImageClassification,
        type="multimodal",
    )


_register()

__all__ = [
    "ENCODERS",
    "PreparedVolume",
    "T3DConfig",
    "T3DEncoder",
    "T3DEncoderOutput",
    "T3DForImageClassification",
    "T3DForPreTraining",
    "T3DForPreTrainingOutput",
    "T3DImageProcessor",
    "T3DModel",
    "T3DOutput",
    "T3DPairFeatures",
    "T3DPreTrainedModel",
    "T3DProcessor",
    "T3DVisionConfig",
    "T3DVisionModel",
    "Volume",
    "VolumeError",
    "VolumeGeometryError",
    "VolumeIntensityError",
    "VolumeReadError",
    "ZeroShotVolumeClassificationPipeline",
    "list_series",
    "read_volume",
]
