# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What Transformers' common tests ask of a class: tiny configurations, inputs, and the numbers they expect back."""

from typing import Any

import torch
from body_phantom import body_array, upright_affine
from model_inputs import TINY_TEXT, TINY_VIT, tiny_config

from modeling_t3d import T3DConfig, T3DImageProcessor, T3DVisionConfig, Volume

SPACING = (6.0, 5.0, 5.0)


class VisionTester:
    """Global views of 8 x 16 x 16 voxels, through the residual network."""

    batch_size = 3
    is_training = True
    num_hidden_layers = 2
    hidden_size = 16
    num_labels = 4

    def __init__(self, parent: Any):
        self.parent = parent

    def get_config(self) -> T3DVisionConfig:
        config = tiny_config().vision_config
        config.num_labels = self.num_labels
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[T3DVisionConfig, dict[str, Any]]:
        return self.get_config(), {"pixel_values": torch.randn(self.batch_size, 1, 8, 16, 16)}


class ViTTester(VisionTester):
    """The same through the vision transformer: 2 x 4 x 4 patches of 4 voxels."""

    hidden_size = TINY_VIT["hidden_size"]
    num_attention_heads = TINY_VIT["num_attention_heads"]
    seq_length = 32

    def get_config(self) -> T3DVisionConfig:
        return T3DVisionConfig(**TINY_VIT, num_labels=self.num_labels)


class TextTester:
    """What the common tests want to know about a text tower."""

    num_hidden_layers = 2
    hidden_size = TINY_TEXT["hidden_size"]
    seq_length = encoder_seq_length = key_length = 8

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        input_ids = torch.randint(3, TINY_TEXT["vocab_size"], (VisionTester.batch_size, self.seq_length))
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        return tiny_config().text_config, inputs


class DualEncoderTester:
    """Reports of eight tokens, global views, and two local views that attention fuses."""

    batch_size = VisionTester.batch_size
    is_training = True
    vision_tester = VisionTester
    num_local_views = 2
    return_loss: bool | None = None  # what the models do by default

    def __init__(self, parent: Any):
        self.parent = parent
        self.text_model_tester = TextTester()
        self.vision_model_tester = self.vision_tester(parent)
        self.num_hidden_layers = self.text_model_tester.num_hidden_layers
        self.seq_length = self.text_model_tester.seq_length

    def get_config(self) -> T3DConfig:
        vision = self.vision_model_tester.get_config().to_dict()
        return T3DConfig(
            vision_config=vision,
            text_config=tiny_config().text_config.to_dict(),
            projection_dim=16,
            projection_hidden_size=32,
            num_tma_heads=2,
            num_fusion_heads=2,
            num_fusion_layers=1,
            view_fusion="attention",
            contrastive_loss="sigmoid",
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[T3DConfig, dict[str, Any]]:
        inputs = {
            **self.text_model_tester.prepare_config_and_inputs_for_common()[1],
            **self.vision_model_tester.prepare_config_and_inputs_for_common()[1],
            "local_pixel_values": torch.randn(self.batch_size, self.num_local_views, 1, 8, 8, 8),
            "local_mask": torch.ones(self.batch_size, self.num_local_views, dtype=torch.bool),
            "local_positions": torch.rand(self.batch_size, self.num_local_views, 6) * 2 - 1,
        }
        if self.return_loss is not None:
            inputs["return_loss"] = self.return_loss
        return self.get_config(), inputs


class ViTDualEncoderTester(DualEncoderTester):
    """The same around the vision transformer, so that both towers have attention."""

    vision_tester = ViTTester


def scans(count: int, torchify: bool = False, equal_resolution: bool = False) -> list[Any]:
    """Scans of unequal shape, as `Volume`s or as MONAI's tensors, which carry their affine."""
    from monai.data import MetaTensor  # slow to import, and the file is collected where none of its tests run

    affine, volumes = upright_affine(SPACING), []
    for seed in range(count):
        array = body_array((30, 28, 32 if equal_resolution else 32 + 2 * seed), seed=seed)
        volumes.append(MetaTensor(torch.from_numpy(array), affine=affine) if torchify else Volume(array, affine))
    return volumes


class ImageProcessorTester:
    """The image processor's settings in these tests, and scans to call it with."""

    batch_size = 3
    num_channels = 1
    image_processing_classes = {"torchvision": T3DImageProcessor, "pil": T3DImageProcessor}  # noqa: RUF012

    def __init__(self, parent: Any):
        self.parent = parent

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        return {"spacing": list(SPACING), "global_size": [16, 16, 16], "local_size": [8, 8, 8], "do_rescale": True}

    def prepare_image_inputs(self, **kinds: Any) -> list[Any]:
        return scans(self.batch_size, **kinds)

    def prepare_processor_inputs(self, **kinds: Any) -> dict[str, Any]:
        return {"images": self.prepare_image_inputs(**kinds)}

    def expected_output_image_shape(self, images: list[Any]) -> tuple[int, ...]:
        return (self.num_channels, 16, 16, 16)
