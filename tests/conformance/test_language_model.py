"""`LavitModel` and `LavitForConditionalGeneration`, with images in each of the three forms."""

import tempfile
import unittest

from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin

from conformance.model_testers import AttachedTester, DiscreteTester, LightTester
from lavit_hf import LavitForConditionalGeneration, LavitModel
from tiny_models import random_pixels


class LanguageModelTests(ModelTesterMixin, GenerationTesterMixin):
    all_model_classes = (LavitModel, LavitForConditionalGeneration)
    model_tester_class: type
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True
    # The branch that a prompt does not use gets none, nor do selectors, whose choice has no gradient here.
    test_all_params_have_gradient = False

    def setUp(self):
        self.model_tester = self.model_tester_class(self)

    def _image_features_prepare_config_and_inputs(self):
        return self.model_tester.get_config(), {"pixel_values": random_pixels(self.model_tester.batch_size)}

    def test_sdpa_can_dispatch_composite_models(self):
        """The mixin's asks models with parts of other names to bring their own."""
        for model_class in self.all_model_classes:
            with tempfile.TemporaryDirectory() as folder:
                model_class(self.model_tester.get_config()).save_pretrained(folder)
                for implementation in ("sdpa", "eager"):
                    model = model_class.from_pretrained(folder, attn_implementation=implementation).base_model
                    for part in (model.language_model, model.visual_tokenizer, model.visual_tokenizer.vision_model):
                        assert part.config._attn_implementation == implementation


class LavitLightTest(LanguageModelTests, unittest.TestCase):
    model_tester_class = LightTester
    additional_model_inputs = ["pixel_values"]


class LavitAttachedTest(LanguageModelTests, unittest.TestCase):
    model_tester_class = AttachedTester
    additional_model_inputs = ["image_features"]


class LavitDiscreteTest(LanguageModelTests, unittest.TestCase):
    model_tester_class = DiscreteTester
