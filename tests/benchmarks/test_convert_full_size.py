"""The benchmark of conversion, narrow and shallow."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from lavit_hf.conversion import plan

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "tests/data/published-7b-manifest.json"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("convert_full_size")


def test_a_conversion_that_is_killed_and_started_again(example, python, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(example, "COMMAND", [python, "-m", "lavit_cli"])
    example.main([str(tmp_path / "work"), "--scale", "32", "--layers", "1", "--kill", "--keep"])
    printed = capfd.readouterr().out
    for line in (r"wrote 0\.0\d GB", r"lavit verify: \d", r"killed in the middle; 0\.0\d GB", r"lavit convert: \d"):
        assert re.search(line, printed), printed
    original = tmp_path / "work/original"
    assert len(list((original / "language_model").glob("pytorch_model-*-of-*.bin"))) >= 2
    assert (original / "language_model/visual_weight.bin").is_file()
    assert (tmp_path / "work/converted/lowres/unet").is_dir()


def test_all_that_is_published_is_written(example):
    shapes = example.published_shapes(scale=1, layers=None)
    tensors = {(tensor.name, tensor.shape) for tensor in plan(MANIFEST).tensors}
    assert {(name, shape) for file in shapes.values() for name, shape in file.items()} == tensors


def test_old_pickles(example, tmp_path):
    example.save({"one": torch.ones(2)}, tmp_path / "file.bin", is_zip=False)
    assert (tmp_path / "file.bin").read_bytes()[:2] != b"PK"
    assert torch.equal(torch.load(tmp_path / "file.bin", weights_only=True)["one"], torch.ones(2))
