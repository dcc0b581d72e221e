import unittest

from transformers_tests.test_training_mixin import TrainingTesterMixin

from conformance.model_testers import DiscreteTester
from lavit_hf import LavitForConditionalGeneration


class TrainingTester(DiscreteTester):
    causal_lm_class = LavitForConditionalGeneration

    def get_config(self):
        config = super().get_config()
        config.vocab_size = config.text_config.vocab_size  # the mixin knows language models only
        return config


class LavitTrainingTest(TrainingTesterMixin, unittest.TestCase):
    """Overfits a batch of text; `tests/learning` trains on images."""

    all_model_classes = (LavitForConditionalGeneration,)
    model_tester = None

    def setUp(self):
        self.model_tester = TrainingTester(self)
