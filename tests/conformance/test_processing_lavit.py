import unittest

from transformers_tests.test_processing_common import ProcessorTesterMixin

from lavit_hf import ImageTextProcessor
from tiny_parts import CHECKPOINT


class ImageTextProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = ImageTextProcessor
    model_id = str(CHECKPOINT)

    @staticmethod
    def prepare_processor_dict():
        return {"image_seq_length": 16}  # the checkpoint's
