"""`lavit evaluate --benchmark`: from miniatures of the published files to the numbers, which are computed by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.metrics.tiny_networks import save_tiny_clip
from evaluation.miniatures import CIDER, MINIATURES, QUESTIONS, generate_text, use_recorded_tools
from lavit_hf.evaluation import BENCHMARKS, original_exact_match, original_vqa_accuracy


@pytest.fixture
def evaluate(lavit, random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Evaluates a benchmark in `tmp_path / "root"`, where a miniature is."""
    use_recorded_tools(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr("lavit_hf.evaluation.tasks.generate_text", generate_text)

    def run(name: str, *options: object):
        MINIATURES[name](tmp_path / "root")
        command = ["evaluate", random_checkpoint, "--benchmark", name, "--root", tmp_path / "root"]
        return lavit(*command, "--output", tmp_path / "out", *options)

    return run


def result_of(folder: Path) -> dict:
    (result,) = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["results"]
    return result


CAPTIONED = {"coco": "134.6, v2 133.3", "nocaps": "113.1, v2 112.0", "flickr30k": "83.2, v2 81.4"}
ASKED = {
    "vqav2": ((90 + 100 + 100 + 60 + 30) / 5, "68.2, v2 68.3"),
    "okvqa": ((100 + 60 + 0 + 90 + 100) / 5, "55.7, v2 55.9"),
    "gqa": ((100 + 0 + 100 + 0 + 0) / 5, "48.0, v2 47.9"),
    "vizwiz": ((100 + 100 + 0 + 90 + 90) / 5, "45.3, v2 41.0"),
}


@pytest.mark.parametrize(("name", "published"), CAPTIONED.items())
def test_captions(evaluate, tmp_path: Path, name: str, published: str) -> None:
    result = evaluate(name)
    assert result.exit_code == 0, result.output
    found = result_of(tmp_path / "out")
    assert found["metrics"]["cider"]["value"] == pytest.approx(CIDER)
    low, high = (100 * end for end in found["metrics"]["cider"]["interval"])
    line = f"{name} by the protocol lavit: 500.0 [{low:.1f}, {high:.1f}]; published: v1 {published}"
    assert line in result.stdout
    assert f"{name}: 5 samples; estimated time: " in result.stderr
    assert found["versions"].keys() >= {"lavit-hf", "torch", "transformers"}


@pytest.mark.parametrize(("name", "expected", "published"), [(name, *values) for name, values in ASKED.items()])
def test_questions(evaluate, tmp_path: Path, name: str, expected: float, published: str) -> None:
    result = evaluate(name)
    assert result.exit_code == 0, result.output
    found = result_of(tmp_path / "out")
    assert 100 * found["metrics"][BENCHMARKS[name].metric]["value"] == pytest.approx(expected)
    kind = "query" if name == "gqa" else "other"
    lines = (tmp_path / "out" / "vqa" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    for line, (*_, of_question) in zip(lines, QUESTIONS[name], strict=True):
        record = json.loads(line)
        prediction, references = record["prediction"], record["references"]
        assert record["meta"]["kind"] == kind
        if name == "gqa":
            assert original_exact_match(prediction, *references) == of_question
        else:
            assert original_vqa_accuracy(prediction, references) == of_question
    assert f"{name} by the protocol lavit: {expected:.1f} [" in result.stdout
    assert f"; published: v1 {published}\n" in result.stdout
    assert found["protocol"]["name"] == "lavit" and found["protocol"]["benchmark"] == name
    assert found["settings"]["lemmas"] == "en_core_web_sm-recorded-spacy-recorded"
    assert [deviation.split(" ")[0] for deviation in found["protocol"]["deviations"]] == ["patches", "5", "computed"]


def test_vizwiz_asks_first_whether_a_question_can_be_answered(evaluate, tmp_path: Path) -> None:
    assert evaluate("vizwiz").exit_code == 0
    lines = (tmp_path / "out" / "vqa" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["first_answer"] for record in records] == ["yes", "no", "not really", "yes", "yes"]
    assert [record["prediction"] for record in records[:3]] == ["a soda can", "unanswerable", "unanswerable"]
    assert records[1]["answer"] == "blue"


class TwoFeatures(torch.nn.Module):
    """In place of InceptionV3: the mean of red, and how much green there is in all pixels, which tells sizes apart."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        pixels = images.float()
        return torch.stack([pixels[:, 0].mean(dim=[1, 2]), pixels[:, 1].sum(dim=[1, 2]) / 4096], dim=1)


def closed_form(drawn: np.ndarray, real: np.ndarray) -> float:
    """The distance of normal distributions with two dimensions: of S = sqrt(A B) only the trace matters, and the trace
    of the root of a 2 x 2 matrix is the root of its trace plus twice the root of its determinant."""
    a, b = np.cov(drawn.T), np.cov(real.T)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(max(np.linalg.det(a @ b), 0)))
    return float(((drawn.mean(0) - real.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root)


def features(pictures: list[Image.Image]) -> np.ndarray:
    pixels = [np.asarray(picture.convert("RGB"), dtype=np.float64) for picture in pictures]
    return np.array([[one[..., 0].mean(), one[..., 1].sum() / 4096] for one in pixels])


@pytest.mark.parametrize("protocol", ["lavit", "plain"])
def test_fid(evaluate, tmp_path: Path, protocol: str) -> None:
    torch.jit.script(TwoFeatures()).save(str(tmp_path / "inception.pt"))
    networks = ["--inception", tmp_path / "inception.pt", "--clip", save_tiny_clip(tmp_path / "clip")]
    result = evaluate("coco-fid", *networks, "--steps", 1, "--candidates", 2, "--protocol", protocol)
    assert result.exit_code == 0, result.output
    drawn = [Image.open(tmp_path / "out" / "text-to-image" / "pictures" / f"{number:012d}.png") for number in range(5)]
    real = [Image.open(path).convert("RGB") for path in sorted((tmp_path / "root" / "val2014").iterdir())]
    if protocol == "lavit":
        real = [picture.resize((512, 512), Image.Resampling.BICUBIC) for picture in real]
    expected = closed_form(features(drawn), features(real))
    found = result_of(tmp_path / "out")
    fid = found["metrics"]["fid"]["value"]
    assert fid == pytest.approx(expected, rel=1e-4)
    assert f"coco-fid by the protocol {protocol}: {fid:.1f}; published: v1 7.2, v2 7.1" in result.stdout
    deviations = found["protocol"]["deviations"]
    assert "num_inference_steps is 1 instead of 50" in deviations and "num_candidates is 2 instead of 4" in deviations
    assert ("real images keep their sizes" in deviations) == (protocol == "plain")
    assert any(deviation.startswith("CLIP is not ViT-L/14: hidden_size ") for deviation in deviations)


def test_plain_protocol(evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions as they are written, official scores, and nothing that has to be installed for lemmas."""
    asked: list[str] = []

    def answer(model, processor, images, prompts, options, **_):
        asked.extend(prompts)
        return ["Two dogs." for _ in prompts]

    monkeypatch.setattr("lavit_hf.evaluation.tasks.generate_text", answer)
    monkeypatch.setattr("lavit_hf.evaluation.lemmas.Lemmatizer.load", lambda: pytest.fail("nobody needs lemmas"))
    result = evaluate("vqav2", "--protocol", "plain")
    assert result.exit_code == 0, result.output
    assert sorted(asked) == sorted(f"Question: {question} Answer:" for question, *_ in QUESTIONS["vqav2"])
    found = result_of(tmp_path / "out")
    assert found["metrics"]["vqa_accuracy"]["value"] == pytest.approx(1 / 5)  # "2 dogs", as seven humans say
    assert found["protocol"]["deviations"][0].startswith("questions are put as they are written")


def test_deviations_are_named(evaluate, tmp_path: Path) -> None:
    result = evaluate("coco", "--num-samples", 2, "--num-tokens", 3, "--visual-mode", "discrete")
    assert result.exit_code == 0, result.output
    deviations = result_of(tmp_path / "out")["protocol"]["deviations"]
    assert "2 samples instead of 5000" in deviations and "num_image_tokens is 3 instead of None" in deviations
    assert "computed in float32 instead of bfloat16" in deviations
    assert "images are read as discrete codes instead of features" in deviations
    assert any("patches are selected by 'expected'" in deviation for deviation in deviations)
    assert all(deviation in result.stdout for deviation in deviations)


def test_what_is_missing_is_named(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    MINIATURES["vqav2"](root)
    (root / "v2_mscoco_val2014_annotations.json").unlink()
    (root / "val2014").rename(root / "elsewhere")
    command = ["evaluate", random_checkpoint, "--benchmark", "vqav2", "--root", root, "--output", tmp_path / "out"]
    result = lavit(*command)
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert "v2_mscoco_val2014_annotations.json (https://" in result.stderr and "val2014.zip" in result.stderr
    assert "v2_OpenEnded" not in result.stderr


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("spacy", "gqa", "Lemmas need spaCy: pip install 'lavit-hf[protocol]'"),
        ("pycocoevalcap.tokenizer.ptbtokenizer", "coco", "tokenizer of pycocoevalcap needs it: pip install"),
    ],
)
def test_missing_packages_are_named_before_anything_is_asked(
    evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("lavit_hf.evaluation.tasks.generate_text", lambda *_, **__: pytest.fail("asked"))
    result = evaluate(name)
    assert result.exit_code == 1 and message in result.stderr


def test_options_that_do_not_go_together(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    def error(*options: object) -> str:
        result = lavit("evaluate", random_checkpoint, "--output", tmp_path / "out", *options)
        assert result.exit_code == 1 and not (tmp_path / "out").exists(), result.output
        return result.stderr

    assert "--task and --data say what to evaluate on; or --benchmark" in error("--task", "caption")
    assert "--root goes with --benchmark" in error("--task", "caption", "--data", "scenes", "--root", tmp_path)
    assert "--protocol goes with --benchmark" in error("-t", "vqa", "--data", "scenes", "--protocol", "plain")
    assert "--benchmark gqa needs --root" in error("--benchmark", "gqa")
    assert "--root takes a directory" in error("--benchmark", "gqa", "--root", tmp_path / "nowhere")
    assert "--data cannot be given with --benchmark gqa" in error("--benchmark", "gqa", "--data", "scenes")
    assert "needs --inception" in error("--benchmark", "coco-fid", "--root", tmp_path)
