"""`ConfigTester` on every configuration."""

import unittest
from types import SimpleNamespace

from transformers_tests.test_configuration_common import ConfigTester

from lavit_hf import LavitConfig, LavitPreTrainingConfig, LavitTokenDecoderConfig, LavitVisualTokenizerConfig
from tiny_models import lavit_config, visual_tokenizer_config


class LavitConfigTest(unittest.TestCase):
    def run_tester(self, config_class, config, has_text=False, **kwargs):
        self.model_tester = SimpleNamespace(get_config=lambda: config)
        ConfigTester(self, config_class=config_class, has_text_modality=has_text, **kwargs).run_common_tests()

    def test_lavit(self):
        self.run_tester(LavitConfig, lavit_config(), lm_head_bias=True)

    def test_visual_tokenizer(self):
        self.run_tester(LavitVisualTokenizerConfig, visual_tokenizer_config(), merger_num_layers=2)

    def test_token_decoder(self):
        self.run_tester(LavitTokenDecoderConfig, LavitTokenDecoderConfig(), hidden_size=64)

    def test_pretraining(self):
        self.run_tester(LavitPreTrainingConfig, LavitPreTrainingConfig(), keep_rate=0.5)
