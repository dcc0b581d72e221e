import unittest

from transformers_tests.test_modeling_common import ModelTesterMixin

from conformance.model_testers import TokenDecoderTester
from lavit_hf import LavitTokenDecoder


class LavitTokenDecoderTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LavitTokenDecoder,)
    has_attentions = False
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = TokenDecoderTester(self)
