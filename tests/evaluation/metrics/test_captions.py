"""CIDEr-D, BLEU and the tokenizer give what pycocoevalcap gave; record_pycocoevalcap.py says how it was recorded."""

import json
from pathlib import Path

import pytest

from evaluation.miniatures import use_recorded_tools
from lavit_hf.evaluation.metrics import load_metric
from lavit_hf.evaluation.metrics.captions import tokenize_caption

FOLDER = Path(__file__).parent
RECORDED = json.loads((FOLDER / "pycocoevalcap.json").read_text(encoding="utf-8"))
HARD = json.loads((FOLDER / "hard_captions.json").read_text(encoding="utf-8"))
CAPTIONS = (FOLDER / "captions.txt").read_text(encoding="utf-8").splitlines()
SAMPLES = {
    "predictions": [sample["prediction"] for sample in RECORDED["samples"]],
    "references": [sample["references"] for sample in RECORDED["samples"]],
}


def test_cider() -> None:
    result = load_metric("cider").compute(**SAMPLES)
    assert result["scores"] == pytest.approx(RECORDED["cider_scores"], abs=1e-9)
    assert result["cider"] == pytest.approx(RECORDED["cider"], abs=1e-9)
    assert max(RECORDED["cider_scores"]) > 4 and 0.0 in RECORDED["cider_scores"]


def test_bleu() -> None:
    result = load_metric("bleu").compute(**SAMPLES)
    assert [result[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx(RECORDED["bleu"], abs=1e-9)


def test_bleu_of_short_captions_is_penalized() -> None:
    # The one word is right; exp(1 - 4 / 1) is the penalty for three missing ones.
    result = load_metric("bleu").compute(predictions=["a"], references=[["a red bird sits", "a dog sleeps on grass"]])
    assert result["bleu_1"] == pytest.approx(0.049787, abs=1e-6)
    assert result["bleu_4"] < 1e-4


@pytest.mark.parametrize(("caption", "tokens"), list(zip(CAPTIONS, RECORDED["tokenized"], strict=True)))
def test_tokens(caption: str, tokens: str) -> None:
    assert " ".join(tokenize_caption(caption)) == tokens


def test_most_hard_captions_have_the_tokens_of_java() -> None:
    different = [caption for caption, tokens in HARD["captions"] if " ".join(tokenize_caption(caption)) != tokens]
    assert len(HARD["captions"]) == 560 and len(different) <= 46


def test_scores_by_the_java_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the protocol of published numbers takes: tokens of pycocoevalcap, recorded here, give its scores."""
    recorded = dict(HARD["captions"])

    class Recorded:
        def tokenize(self, captions: dict) -> dict:
            return {number: [recorded[one["caption"]] for one in texts] for number, texts in captions.items()}

    monkeypatch.setattr("lavit_hf.evaluation.metrics.captions._load_ptb", Recorded)
    captions = [caption for caption, _ in HARD["captions"]]
    count = len(captions)
    references = [[captions[(index + step) % count] for step in range(1, 6)] for index in range(count)]
    result = load_metric("cider", tokenizer="ptb").compute(predictions=captions, references=references)
    assert result["scores"] == pytest.approx(HARD["scores"]["cider"], abs=1e-9)
    result = load_metric("bleu", tokenizer="ptb").compute(predictions=captions, references=references)
    assert [result[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx(HARD["scores"]["bleu"], abs=1e-9)
    plain = load_metric("cider").compute(predictions=captions, references=references)["scores"]
    assert plain != pytest.approx(HARD["scores"]["cider"], abs=1e-3)


def test_missing_java_is_named_when_the_metric_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_recorded_tools(monkeypatch, tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ImportError, match="runs `java`, which is not installed"):
        load_metric("cider", tokenizer="ptb")


def test_captions_that_java_loses_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails:
        def tokenize(self, captions: dict) -> dict:
            return {0: ["a cat"]}

    monkeypatch.setattr("lavit_hf.evaluation.metrics.captions._load_ptb", Fails)
    with pytest.raises(ValueError, match="did not return all captions"):
        load_metric("cider", tokenizer="ptb").compute(predictions=["a cat", "a dog"], references=[["a"], ["b"]])


@pytest.mark.parametrize("name", ["bleu", "cider"])
def test_bad_input(name: str) -> None:
    with pytest.raises(ValueError, match="Caption 1 has no reference"):
        load_metric(name).compute(predictions=["a", "b"], references=[["a"], []])
    with pytest.raises(ValueError, match="no caption"):
        load_metric(name).compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="no tokenizer 'java' of captions; there are python, ptb"):
        load_metric(name, tokenizer="java")
    with pytest.raises(ValueError, match="expected a list"):
        load_metric(name).compute(predictions=["a cat"], references=["a cat"])
