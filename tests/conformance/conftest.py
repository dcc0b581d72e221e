import sys

import pytest

from conformance.sources import CACHE, PACKAGE, VERSION
from conformance import stand_ins

if not (CACHE / PACKAGE).is_dir():
    raise pytest.UsageError(
        f"The tests of transformers {VERSION} are not in {CACHE}. `make conformance` downloads them and runs these."
    )
sys.path.insert(0, str(CACHE))
stand_ins.install()

from transformers.models.auto import modeling_auto

modeling_auto.MODEL_MAPPING_NAMES["lavit"] = "LavitModel"
modeling_auto.MODEL_MAPPING_NAMES["lavit_visual_tokenizer"] = "LavitVisualTokenizer"
modeling_auto.MODEL_MAPPING_NAMES["lavit_token_decoder"] = "LavitTokenDecoder"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["lavit"] = "LavitForConditionalGeneration"

MARKERS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test")


def pytest_configure(config: pytest.Config) -> None:
    for marker in (*MARKERS, "is_training_test", "slow"):
        config.addinivalue_line("markers", f"{marker}: of transformers' own tests")
