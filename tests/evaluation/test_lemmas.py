"""Answers become lemmas as spaCy has them, whose tags are recorded; annotations are looked at once."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from evaluation.miniatures import use_recorded_tools
from lavit_hf.evaluation import Lemmatizer


def test_nouns_and_verbs_become_lemmas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_recorded_tools(monkeypatch, tmp_path)
    lemmatizer = Lemmatizer.load()
    answers = {
        "dogs": "dog",
        "he is skiing": "he is ski",  # "is" is an auxiliary
        "geese": "geese",  # taken for a name
        "a dog's leash": "a dog 's leash",
        "i don't know": "i do n't know",
        "left-handed": "left - handed",
        "better": "better",
        "": "",
    }
    assert lemmatizer(answers) == list(answers.values())


def test_what_occurs_again_is_looked_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipeline = use_recorded_tools(monkeypatch, tmp_path)
    lemmatizer = Lemmatizer.load()
    assert lemmatizer.cached(["dogs", "women", "dogs"]) == ["dog", "woman", "dog"]
    assert pipeline.num_texts == 2
    assert Lemmatizer.load().cached(["women", "dogs"]) == ["woman", "dog"]
    assert pipeline.num_texts == 2  # from the cache
    assert Lemmatizer.load().cached(["women", "geese"]) == ["woman", "geese"]
    assert pipeline.num_texts == 4
    other = Lemmatizer(pipeline, "another-version")
    assert other.cached(["women", "dogs"]) == ["woman", "dog"] and pipeline.num_texts == 6


@pytest.mark.parametrize("content", ["{", '{"dogs": 1, "women": "woman"}', '{"dogs": "dog"}'])
def test_a_damaged_cache_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str) -> None:
    use_recorded_tools(monkeypatch, tmp_path)
    lemmatizer = Lemmatizer.load()
    lemmatizer.cached(["dogs", "women"])
    (file,) = tmp_path.rglob("*.json")
    assert json.loads(file.read_text(encoding="utf-8")) == {"dogs": "dog", "women": "woman"}
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=file.name):
        lemmatizer.cached(["dogs", "women"])


def test_a_missing_pipeline_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError(f"[E050] Can't find model '{name}'.")

    spacy = ModuleType("spacy")
    spacy.load = load
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    with pytest.raises(ImportError, match="python -m spacy download en_core_web_sm"):
        Lemmatizer.load()
