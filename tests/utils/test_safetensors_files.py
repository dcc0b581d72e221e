"""Headers and indices of weights, as they are and broken."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lavit_hf.utils.safetensors_files import TensorHeader, read_headers, read_index


class RoomError(ValueError):
    """Stands for the error of a room."""


def test_headers_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    expected = {"a": TensorHeader([2, 3], "F32"), "b": TensorHeader([], "BF16")}
    assert read_headers(tmp_path / "model.safetensors") == expected


@pytest.mark.parametrize("error", [OSError, RoomError])
@pytest.mark.parametrize("content", [None, b"", b"broken", 60])
def test_broken_files_are_named(tmp_path: Path, content: bytes | int | None, error: type[Exception]) -> None:
    path = tmp_path / "model.safetensors"
    if isinstance(content, int):  # truncated
        save_file({"a": torch.zeros(2, 3)}, path)
        content = path.read_bytes()[:content]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=r"model\.safetensors is not a readable safetensors file .*Download") as caught:
        read_headers(path, error)
    assert type(caught.value) is error


def test_an_index_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2", "c": "1.safetensors"}}))
    assert read_index(path) == {"1.safetensors": ["a", "c"], "2": ["b"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not readable as JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "it lists none"),
        ('{"weight_map": {}}', "it lists none"),
        ('{"weight_map": ["a"]}', "it lists none"),
        ('{"weight_map": {"a": 7}}', "7 is not the name of a file beside it"),
        ('{"weight_map": {"a": ""}}', "'' is not the name of a file beside it"),
        ('{"weight_map": {"a": "../b"}}', "'../b' is not the name of a file beside it"),
        ('{"weight_map": {"a": ".."}}', "'..' is not the name of a file beside it"),
    ],
)
def test_what_is_no_index_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(RoomError, match=rf"index\.json is no index of weights: {message}"):
        read_index(path, RoomError)
