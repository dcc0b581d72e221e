"""Conversion holds one shard, not the model."""

import json
import subprocess

import pytest
import torch

from conversion.original_variants import HEADS, LANGUAGE_MODEL, copy_original, load

_WIDTH = 400_000  # makes matrices of 77 MB

_MEASURE = """
import sys, threading, time
import psutil
from lavit_hf.conversion import convert

process, peak, stop = psutil.Process(), 0, threading.Event()

def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, process.memory_info().rss)

tiny, source, destination, heads = sys.argv[1:]
convert(tiny, destination + "-warm", heads=heads, progress=False)  # imports and caches
start = process.memory_info().rss
thread = threading.Thread(target=watch)
thread.start()
for dtype in (None, "bfloat16"):
    peak = 0
    convert(source, f"{destination}-{dtype}", heads=heads, max_shard_size="40MB", dtype=dtype, progress=False)
    print(peak - start)
stop.set()
thread.join()
"""


def test_peak_memory_stays_near_one_shard(python, original_dir, tmp_path):
    pytest.importorskip("psutil")
    large = copy_original(original_dir, tmp_path / "original")
    tensors = {n: t for n, t in load(large / LANGUAGE_MODEL).items() if ".mlp." not in n and ".layers.1." not in n}
    for part, shape in (("gate_proj", (_WIDTH, 48)), ("up_proj", (_WIDTH, 48)), ("down_proj", (48, _WIDTH))):
        tensors[f"model.layers.0.mlp.{part}.weight"] = torch.full(shape, 0.5)
    torch.save(tensors, large / LANGUAGE_MODEL)
    assert (large / LANGUAGE_MODEL).stat().st_size > 230e6
    config = large / "language_model/config.json"
    changes = {"intermediate_size": _WIDTH, "num_hidden_layers": 1}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))

    command = [python, "-c", _MEASURE, str(original_dir), str(large), str(tmp_path / "converted"), HEADS]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    # A matrix is larger than a shard may be and becomes one of its own; casting it takes half of it again.
    assert max(int(line) for line in result.stdout.split()) < 150e6, result.stdout
