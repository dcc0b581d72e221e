"""GGUF files of the exported language model; tests/engines runs llama.cpp on them."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import pre_tokenizers

from lavit_hf import default_checkpoint
from lavit_hf.hub.llama_gguf import tokenizer_kind

ROOT = Path(__file__).parents[2]


def read_spec(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "lavit_scenes")
        yield importlib.import_module("make_language_model")


def test_llama_cpp_knows_the_kinds_of_tokenizers(recipe: ModuleType) -> None:
    assert tokenizer_kind(read_spec(Path(default_checkpoint()))) == "gpt-2"
    assert tokenizer_kind(read_spec(ROOT / "checkpoints" / "lavit-tiny-random")) == "llama"
    backend = recipe.make_tokenizer("scenes", 300).backend_tokenizer
    assert tokenizer_kind(json.loads(backend.to_str())) == "gpt-2"
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    assert tokenizer_kind(json.loads(backend.to_str())) is None
