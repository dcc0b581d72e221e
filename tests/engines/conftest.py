"""What all engines are compared with, and what they are given."""

from pathlib import Path

import pytest

from engines.reference import Reference, make_reference
from lavit_hf.hub import export_llama


@pytest.fixture(scope="session")
def reference() -> Reference:
    return make_reference()


@pytest.fixture(scope="session")
def llama_dir(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language model as a plain Llama, with a file for llama.cpp."""
    return export_llama(reference.checkpoint, tmp_path_factory.mktemp("llama") / "llama", gguf=True, progress=False)
