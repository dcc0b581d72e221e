"""What a checkpoint is loaded for: dtypes of devices, and compiling."""

from pathlib import Path

import pytest
import torch

from lavit_cli import loading
from lavit_hf.modeling import compiled_steps


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("mps", None, "auto"),
        ("cuda", (6, 1), "float32"),
        ("cuda", (7, 5), "float16"),
        ("cuda", (8, 0), "bfloat16"),
        ("cuda:1", (9, 0), "bfloat16"),
    ],
)
def test_dtypes_of_devices(device: str, capability: tuple, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert loading.running_dtype(torch.device(device)) == dtype


def test_models_run_in_the_dtype_of_the_device_and_tokenizers_as_stored(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "running_dtype", lambda device: "bfloat16")
    assert loading.load(str(random_checkpoint)).model.dtype == torch.bfloat16
    assert loading.load(str(random_checkpoint), dtype="float16").model.dtype == torch.float16
    visual_tokenizer = loading.load_processor(str(random_checkpoint)).visual_tokenizer
    assert visual_tokenizer is not None and visual_tokenizer.dtype == torch.float32


@pytest.mark.parametrize(
    ("asked", "on_gpu", "compiles"), [(None, True, True), (None, False, False), (False, True, False)]
)
def test_what_compiles(
    random_checkpoint: Path, asked: bool | None, on_gpu: bool, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (loading, compiled_steps):
        monkeypatch.setattr(module, "compiles_on", lambda device: on_gpu)
    optimized = []
    lavit = loading.load(str(random_checkpoint), compile=asked)
    pipelines = pytest.importorskip("lavit_hf.pipelines")
    kind = pipelines.LavitTextToImagePipeline
    monkeypatch.setattr(kind, "optimize", lambda pipeline, **options: optimized.append(options) or pipeline)
    loading.load_pipeline(lavit)
    assert optimized == [{"warm_up": False}] * compiles
    assert bool(lavit.model.generation_config.disable_compile) is not compiles
