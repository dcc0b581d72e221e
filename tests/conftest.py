"""Fixtures shared by all tests: the reference checkpoint, its conversion and the original's recorded outputs."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
# Code of checkpoints is not that of an earlier run, nor does it stay.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")
os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)  # tests look at bars
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each use all cores slow one another down several times over.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import atexit
import copy
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from zygote import Zygote

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

if importlib.util.find_spec("hypothesis"):  # engines have environments of their own, without it
    from hypothesis import HealthCheck, settings

    settings.register_profile("any pace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any pace")

DATA = Path(__file__).parent / "data"
ORIGINAL = DATA / "tiny-original"


@pytest.fixture(autouse=True)
def own_accelerate_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps the precision of a process: a test that trains in bf16 would decide for all after it."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"].AcceleratorState
        if state._shared_state.get("_mixed_precision", "no") != "no":  # trainers of a whole module go on with theirs
            state._reset_state()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Runs Python programs in processes of their own that have imported torch and the like already."""
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def python(zygote: Zygote) -> str:
    """Stands for `sys.executable` where nothing depends on how libraries are imported."""
    return zygote.python


@pytest.fixture(scope="session")
def original_dir() -> Path:
    """A tiny LaVIT in the original's layout, random weights."""
    return ORIGINAL


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Inputs and outputs recorded from the original implementation on that checkpoint."""
    return load_file(ORIGINAL / "golden.safetensors")


@pytest.fixture(scope="session")
def golden_merger() -> dict[str, torch.Tensor]:
    """The merger's outputs at the edges: all patches kept, none kept, wide logits."""
    return load_file(ORIGINAL / "golden_merger.safetensors")


@pytest.fixture(scope="session")
def golden_meta() -> dict:
    """Prompts and settings of the recording."""
    return json.loads((ORIGINAL / "golden_meta.json").read_text())


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """The three pictures of the recording."""
    return [Image.open(ORIGINAL / "images" / f"{index}.png") for index in range(3)]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference checkpoint, converted. Do not write into it.

    The recordings were made with patches selected by argmax, and converted checkpoints do otherwise.
    """
    from lavit_hf.conversion import convert

    destination = tmp_path_factory.mktemp("converted") / "lavit"
    convert(ORIGINAL, destination, heads={"vision": 4, "merger": 4, "decoder": 4}, progress=False)
    config = json.loads((destination / "config.json").read_text())
    assert config["visual_tokenizer_config"]["selection"] == "expected"
    config["visual_tokenizer_config"]["selection"] = "argmax"
    (destination / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return destination


@pytest.fixture(scope="session")
def loaded_model(checkpoint: Path):
    """The converted model. Do not change it."""
    from lavit_hf import LavitForConditionalGeneration

    return LavitForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture
def model(loaded_model):
    """The converted model, a copy of one's own."""
    return copy.deepcopy(loaded_model)


@pytest.fixture
def processor(checkpoint: Path):
    """The converted processor."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(checkpoint)
