"""Puts transformers' own tests on the path, and holds what they say against `expectations.py`."""

import os
import sys

import pytest

# Processors with AVX-512 FP16 add up in half precision, which turns the choice of a patch here and there: attentions
# then see other tokens. The tests compare numbers, for which all processors should compute alike.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ["RUN_SLOW"] = "1"  # some tests are marked slow, which with tiny models they are not

from conformance import stand_ins
from conformance.expectations import EXPECTED_FAILURES
from conformance.outcomes import Outcomes
from conformance.sources import CACHE, PACKAGE, VERSION

if not (CACHE / PACKAGE).is_dir():
    raise pytest.UsageError(
        f"The tests of transformers {VERSION} are not in {CACHE}. `make conformance` downloads them and runs these."
    )
sys.path.insert(0, str(CACHE))
stand_ins.install()

_MARKERS = "slow is_training_test accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test"


def pytest_configure(config: pytest.Config) -> None:
    for marker in (*_MARKERS.split(), "torch_compile_test"):
        config.addinivalue_line("markers", f"{marker}: of transformers' own tests")
    config.pluginmanager.register(Outcomes())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = EXPECTED_FAILURES.get((item.cls.__name__, item.name))
        if reason is not None:
            # Not strict: each subtest would have to fail. `Outcomes` sees to it that one does.
            item.add_marker(pytest.mark.xfail(reason=reason, strict=False))
