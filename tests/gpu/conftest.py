"""Tests for a GPU: CUDA or ROCm, else the one of a Mac (mps).

Without one they are skipped; `LAVIT_TEST_DEVICE=cpu` runs what a CPU can run, to try the tests.

On a GPU nothing is rounded to TF32, so that fp32 keeps the tolerances of a CPU.
"""

import copy
import os
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoProcessor

from lavit_hf import LavitForConditionalGeneration

_FOUND = "mps" if torch.backends.mps.is_available() and not torch.cuda.is_available() else "cuda"
DEVICE = torch.device(os.environ.get("LAVIT_TEST_DEVICE", _FOUND))
_REASON = "there is no CUDA device; LAVIT_TEST_DEVICE=cpu runs what a CPU can run"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(folder):
            item.add_marker("gpu")
            if DEVICE.type == "cuda" and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=_REASON))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def cuda(device) -> torch.device:
    """For what no CPU can do."""
    if device.type != "cuda":
        pytest.skip(f"needs CUDA, not {device}")
    return device


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """cuDNN rounds to TF32 by default, which moves fp32 logits by up to 0.14."""
    settings = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = settings


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request) -> torch.dtype:
    return getattr(torch, request.param)


@pytest.fixture(scope="session")
def exact(checkpoint, device) -> LavitForConditionalGeneration:
    """The recorded model in fp32. Do not change it."""
    return LavitForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).to(device)


@pytest.fixture
def model(exact):
    """The same, a copy of one's own."""
    return copy.deepcopy(exact)


@pytest.fixture
def rounded(checkpoint, device, dtype) -> LavitForConditionalGeneration:
    """The recorded model in every dtype."""
    return LavitForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).to(device)


@pytest.fixture(scope="session")
def recorded_processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture
def prepare(recorded_processor, images, device):
    """Inputs of prompts for the recorded pictures, on the device."""

    def prepare(text: list[str], **options):
        inputs = recorded_processor(images=images, text=text, padding=True, return_tensors="pt", **options)
        return inputs.to(device)

    return prepare
