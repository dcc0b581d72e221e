"""The same mixin over other models that read and write images.

What the mixin has to be told about their image encoders is set as in their own test files; tests that these replace or
skip run here as they are.
"""

import unittest

from transformers import (
    ChameleonForConditionalGeneration,
    ChameleonModel,
    Emu3ForConditionalGeneration,
    Emu3Model,
    JanusForConditionalGeneration,
    JanusModel,
)
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin

from conformance.peers.peer_testers import ChameleonTester, Emu3Tester, JanusTester


class PeerTests(ModelTesterMixin, GenerationTesterMixin):
    model_tester_class: type
    additional_model_inputs = ["pixel_values"]

    def setUp(self):
        self.model_tester = self.model_tester_class(self)


class Emu3Test(PeerTests, unittest.TestCase):
    all_model_classes = (Emu3Model, Emu3ForConditionalGeneration)
    model_tester_class = Emu3Tester
    additional_model_inputs = ["pixel_values", "image_sizes"]
    skip_test_image_features_output_shape = True  # channels are not the last dimension

    def _image_features_get_expected_num_attentions(self, model_tester=None):
        return 1  # one block of the image encoder has attention

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        tester = self.model_tester
        return (len(tester.channel_multiplier) + 1) * tester.num_res_blocks + 3


class JanusTest(PeerTests, unittest.TestCase):
    all_model_classes = (JanusModel, JanusForConditionalGeneration)
    model_tester_class = JanusTester
    _is_composite = True
    test_all_params_have_gradient = False


class ChameleonTest(PeerTests, unittest.TestCase):
    all_model_classes = (ChameleonModel, ChameleonForConditionalGeneration)
    model_tester_class = ChameleonTester

    def _image_features_get_expected_num_attentions(self, model_tester=None):
        return 1

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        return 7  # four residual blocks on the way down, two in the middle, and what comes in
