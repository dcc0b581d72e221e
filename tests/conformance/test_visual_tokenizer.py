import unittest

from torch import nn
from transformers_tests.test_modeling_common import ModelTesterMixin

from conformance.model_testers import VisualTokenizerTester
from lavit_hf import LavitVisualTokenizer


class LavitVisualTokenizerTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LavitVisualTokenizer,)
    _is_composite = True
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = VisualTokenizerTester(self)

    def test_model_get_set_embeddings(self):
        """As transformers' vision models have it: what embeds patches is no table."""
        model = LavitVisualTokenizer(self.model_tester.get_config())
        assert isinstance(model.get_input_embeddings(), nn.Module) and model.get_output_embeddings() is None
