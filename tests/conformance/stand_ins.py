"""The least of what transformers' tests import but its source distribution lacks, so that they can be imported."""

import sys
from pathlib import Path
from types import ModuleType

from transformers.models.auto import modeling_auto

from conformance.sources import PACKAGE

PICTURE = Path(__file__).resolve().parents[2] / "examples" / "images" / "chelsea.jpg"

# What `ConfigTester` sets in every configuration without parts: each value differs from its default.
CONFIG_VALUES = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}


class ExportTesterMixin:
    """Tests of exporting; ours are in `tests/modeling/test_modeling_lavit.py`."""


class GenerationTesterMixin:
    """Tests of generation; ours are in `tests/modeling/`."""


def local_picture(url: str) -> str:
    """The library's CI keeps files of the Hub beside its tests. Tests of pictures do not ask for a certain one."""
    return str(PICTURE) if url.endswith((".png", ".jpg")) else url


def install() -> None:
    """Makes the stand-ins importable under the names that the tests use, and our classes known by name."""
    _add_module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=ExportTesterMixin)
    _add_module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
    _add_module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=CONFIG_VALUES)
    _add_module("fetch_hub_objects_for_ci", url_to_local_path=local_picture)
    # Some tests ask these tables which class is a base model and which takes labels; Auto classes do not read them.
    modeling_auto.MODEL_MAPPING_NAMES.update(
        lavit="LavitModel", lavit_visual_tokenizer="LavitVisualTokenizer", lavit_token_decoder="LavitTokenDecoder"
    )
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["lavit"] = "LavitForConditionalGeneration"


def _add_module(name: str, **contents: object) -> None:
    parent = name.rpartition(".")[0]
    if parent and parent != PACKAGE and parent not in sys.modules:
        _add_module(parent)
        sys.modules[parent].__path__ = []  # a package
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(contents)
