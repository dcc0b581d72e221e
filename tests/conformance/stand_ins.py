"""The least of what transformers' tests import but its source distribution lacks, so that they can be imported."""

import sys
from types import ModuleType

from conformance.sources import PACKAGE

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
    """Tests of exporting; ours are in `tests/modeling/test_export.py`."""


class GenerationTesterMixin:
    """Tests of generation; ours are in `tests/modeling/`."""


def no_hub_files(url: str) -> str:
    """The library's CI keeps files of the Hub beside its tests. Here a test that opens one has nothing to open."""
    return url


def install() -> None:
    """Makes the stand-ins importable under the names that the tests use."""
    _add_module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=ExportTesterMixin)
    _add_module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
    _add_module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=CONFIG_VALUES)
    _add_module("fetch_hub_objects_for_ci", url_to_local_path=no_hub_files)


def _add_module(name: str, **contents: object) -> None:
    parent, _, last = name.rpartition(".")
    if parent and parent != PACKAGE and parent not in sys.modules:
        _add_module(parent)
        sys.modules[parent].__path__ = []  # a package
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(contents)
