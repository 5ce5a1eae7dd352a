# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Transformers' own common tests, run over the T3D classes; skipped where their sources are absent.

`TRANSFORMERS_SOURCE=folder pytest tests/test_transformers_common.py`, see `transformers_source`. A test that cannot
apply is replaced by one that skips with the reason; `transformers_common.md` lists them, and what a run said.
"""

import copy
import unittest
from dataclasses import fields

import pytest
import torch
from body_phantom import body_array, upright_affine
from tiny_checkpoint import tiny_tokenizer
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers_source import common_tests
from transformers_testers import (
    SPACING,
    DualEncoderTester,
    ImageProcessorTester,
    VisionTester,
    ViTDualEncoderTester,
    ViTTester,
    scans,
)

from modeling_t3d import (
    T3DConfig,
    T3DForImageClassification,
    T3DForPreTraining,
    T3DImageProcessor,
    T3DModel,
    T3DProcessor,
    T3DVisionConfig,
    T3DVisionModel,
)

modeling = common_tests("test_modeling_common")
configuration = common_tests("test_configuration_common")
image_processing = common_tests("test_image_processing_common")
processing = common_tests("test_processing_common")


_set_large_epsilons = modeling.set_config_for_less_flaky_test


def _set_large_epsilons_that_exist(config):
    """The library's helper sets the fields of all models on any configuration; ours do not load unknown ones."""
    _set_large_epsilons(config)
    for part in filter(None, (config, getattr(config, "text_config", None), getattr(config, "vision_config", None))):
        for name in set(vars(part)) - {field.name for field in fields(part)}:
            if name.endswith(("_eps", "_epsilon")):
                delattr(part, name)


modeling.set_config_for_less_flaky_test = _set_large_epsilons_that_exist


@pytest.fixture(autouse=True)
def known_as_base_models(monkeypatch):
    """The tests ask these names, which list the library's own models alone, what a class is."""
    monkeypatch.setitem(MODEL_MAPPING_NAMES, "t3d", "T3DModel")
    monkeypatch.setitem(MODEL_MAPPING_NAMES, "t3d_vision_model", "T3DVisionModel")


def not_applicable(reason):
    def test(self, *args, **kwargs):
        self.skipTest(reason)

    return test


class VisionModelTest(modeling.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (T3DVisionModel, T3DForImageClassification)
    has_attentions = False
    test_resize_embeddings = False
    model_tester_class = VisionTester

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.config_tester = configuration.ConfigTester(self, config_class=T3DVisionConfig, has_text_modality=False)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is T3DForImageClassification:
            inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        """As there, but what takes in voxels is a convolution or a linear layer and no embedding of tokens."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            assert isinstance(model.get_input_embeddings(), (nn.Conv3d, nn.Linear))
            assert model.get_output_embeddings() is None

    def test_hidden_states_output(self):
        """As there, but a hidden state is a map (channels, depth, height, width) and not a sequence."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            for by_argument in (True, False):
                config = copy.deepcopy(config)
                config.output_hidden_states = not by_argument
                asked = {"output_hidden_states": True} if by_argument else {}
                with torch.no_grad():
                    output = model_class(config).eval()(**inputs, **asked)
                assert len(output.hidden_states) == self.model_tester.num_hidden_layers + 1
                assert output.hidden_states[0].shape[1:] == (8, 4, 8, 8)
                assert output.hidden_states[-1].shape[1:] == (16, 2, 4, 4)


class ViTModelTest(VisionModelTest):
    has_attentions = True
    model_tester_class = ViTTester
    test_hidden_states_output = modeling.ModelTesterMixin.test_hidden_states_output


class DualEncoderTest(modeling.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (T3DModel, T3DForPreTraining)
    _is_composite = True
    has_attentions = False
    # The token map keeps its three axes.
    skip_test_image_features_output_shape = True
    additional_model_inputs = ("pixel_values", "local_pixel_values", "local_positions")
    model_tester_class = DualEncoderTester

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.config_tester = configuration.ConfigTester(self, config_class=T3DConfig, has_text_modality=False)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels:
            inputs["return_loss"] = True
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_batching_equivalence(self):
        """As there, but without the loss: a batch of one pair has no negatives, which is an error."""
        self.model_tester.return_loss = False
        super().test_batching_equivalence()

    towers = not_applicable("the outputs of both towers hold hidden states and attentions; see their own tests")
    test_hidden_states_output = towers
    test_retain_grad_hidden_states_attentions = towers
    test_attention_outputs = towers
    del towers


class ViTDualEncoderTest(DualEncoderTest):
    has_attentions = True
    model_tester_class = ViTDualEncoderTester


class ImageProcessorTest(image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageProcessorTester
    test_cast_dtype = True

    def test_call_numpy(self):
        """As there, but an array comes with its affine: without it nothing says what its axes are."""
        for processor_class in self.image_processing_classes.values():
            processor = processor_class(**self.image_processor_dict)
            arrays, affine = [body_array((30, 28, 32), seed=seed) for seed in range(3)], upright_affine(SPACING)
            single = processor(arrays[0], affine=affine, return_tensors="pt").pixel_values
            assert single.shape == (1, 1, 16, 16, 16)
            batch = processor(arrays, affine=affine, return_tensors="pt").pixel_values
            assert batch.shape == (3, *single[0].shape)

    two_dimensional = not_applicable("photos have two axes and colours; a volume has three and windows")
    test_backends_equivalence = two_dimensional
    test_call_pil = two_dimensional
    test_call_numpy_4_channels = two_dimensional
    test_image_processor_from_dict_with_kwargs_has_attributes = two_dimensional
    del two_dimensional
    test_pil_can_run_without_torchvision = not_applicable("the code of a folder is not trusted unasked")


class ProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = T3DProcessor

    @classmethod
    def _setup_image_processor(cls):
        # Air, most of a scan, is brighter than the middle of this window: what the tests turn over must be positive.
        settings = ImageProcessorTester(None).prepare_image_processor_dict()
        return T3DImageProcessor(**settings, windows=[[-4000, 1000]])

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer()

    def prepare_images_inputs(self, batch_size=None, nested=False):
        images = scans(batch_size or 1)
        if batch_size is None:
            return images[0]
        return [[image] for image in images] if nested else images

    def test_model_input_names(self):
        """As there, but with local views, without which their names are absent."""
        processor = self.get_processor()
        inputs = processor(text=self.prepare_text_inputs(), images=self.prepare_images_inputs(), views=2)
        assert set(inputs) == set(processor.model_input_names)

    test_args_overlap_kwargs = not_applicable("an image processor refuses to load a field that it does not have")
