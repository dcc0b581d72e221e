import unittest

from transformers.utils import is_torchvision_available
from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

from lavit_hf import LavitImageProcessor, LavitImageProcessorPil


class LavitImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        defaults = {"size": {"height": 18, "width": 18}, "do_normalize": True, "image_mean": [0.5] * 3}
        super().__init__(parent, **{**defaults, "image_std": [0.5] * 3, "do_convert_rgb": True, **kwargs})

    def _get_image_processing_classes(self):
        """The mixin finds them by the name of this folder."""
        classes = {"pil": LavitImageProcessorPil}
        return classes | ({"torchvision": LavitImageProcessor} if is_torchvision_available() else {})


class LavitImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = LavitImageProcessingTester
