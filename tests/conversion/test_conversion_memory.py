"""Conversion holds one shard, not the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conversion.original_variants import HEADS, LANGUAGE_MODEL, copy_original, load

_MEASURE = """
import sys, threading, time
import psutil
from lavit_hf.conversion import convert

peak, stop = 0, threading.Event()
process = psutil.Process()
def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)

tiny, source, destination, dtype = sys.argv[1:]
convert(tiny, destination + "-warm", heads="{heads}", progress=False)  # imports and caches
start = process.memory_info().rss
thread = threading.Thread(target=watch)
thread.start()
convert(source, destination, heads="{heads}", max_shard_size="40MB", dtype=dtype or None, progress=False)
stop.set()
thread.join()
print(peak - start)
"""


@pytest.fixture(scope="module")
def large(original_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a language model of 460 MB in one file."""
    root = copy_original(original_dir, tmp_path_factory.mktemp("large") / "original")
    tensors = {name: tensor for name, tensor in load(root / LANGUAGE_MODEL).items() if ".mlp." not in name}
    for layer in range(2):
        for part, shape in (("gate_proj", (400_000, 48)), ("up_proj", (400_000, 48)), ("down_proj", (48, 400_000))):
            tensors[f"model.layers.{layer}.mlp.{part}.weight"] = torch.randn(shape)
    torch.save(tensors, root / LANGUAGE_MODEL)
    config = root / "language_model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 400_000}))
    return root


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_peak_memory_stays_near_one_shard(large, original_dir, tmp_path, dtype):
    pytest.importorskip("psutil")
    assert (large / LANGUAGE_MODEL).stat().st_size > 460e6
    code = _MEASURE.replace("{heads}", HEADS)
    command = [sys.executable, "-c", code, str(original_dir), str(large), str(tmp_path / "converted"), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    # The largest tensor, 77 MB, is a shard of its own; what was read before it may still be mapped.
    assert int(result.stdout) < 180e6
