"""Curves of quality against budgets: the points are evaluations of their own, and all of them are in the picture."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lavit_hf.evaluation import EvaluationSettings, build_tasks, evaluate, evaluate_budgets, format_curve

SETTINGS = EvaluationSettings(
    "scenes",
    tasks=("caption", "vqa", "text-to-image", "reconstruction"),
    num_samples=4,
    options={"max_new_tokens": 6, "num_inference_steps": 1},
)


@pytest.fixture(scope="module")
def curve(evaluated, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("curve")
    return output, evaluate_budgets(evaluated, SETTINGS, [16, 2, 2], output, progress=False)


def test_points(curve, evaluated, tmp_path):
    output, content = curve
    assert [point["num_image_tokens"] for point in content["points"]] == [2, 16, None]
    assert json.loads((output / "curve.json").read_text()) == content
    assert {path.name for path in output.iterdir()} == {
        *("tokens-2", "tokens-16", "tokens-own", "curve.json", "curve.png")
    }
    for point in content["points"]:
        # What sees no image has no budget.
        assert [result["task"] for result in point["results"]] == ["caption", "vqa", "reconstruction"]
        for result in (point["results"][0], point["results"][2]):
            for branch in ("discrete", "continuous"):
                mean = result["metrics"][f"tokens/{branch}/mean"]["value"]
                assert mean == point["num_image_tokens"] or point["num_image_tokens"] is None
    options = {"max_new_tokens": 6, "num_image_tokens": 2}
    (task,) = build_tasks(EvaluationSettings("scenes", tasks=("caption",), num_samples=4, options=options))
    (alone,) = evaluate(evaluated, [task], tmp_path / "alone", progress=False)["results"]
    assert alone["metrics"] == content["points"][0]["results"][0]["metrics"]


def test_cost(curve, evaluated):
    """2 FLOP per weight of the decoder without its embeddings, and position."""
    decoder = evaluated.model.model.language_model
    weights = sum(value.numel() for value in decoder.layers.parameters()) + decoder.norm.weight.numel()
    points = curve[1]["points"]
    assert [point["cost"] and point["cost"]["positions"] for point in points] == [4, 18, None]
    assert points[0]["cost"]["language_model_gflop"] == pytest.approx(2 * 4 * weights / 1e9)


def test_picture_and_table(curve):
    output, content = curve
    with Image.open(output / "curve.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    table = format_curve(content)
    assert table.splitlines()[0] == "caption, validation (4 samples)"
    assert table.splitlines()[1].split() == ["tokens", "2", "16", "own"]
    assert "fully_right" in table and "vqa" in table and "reconstruction" in table


def test_a_curve_goes_on(curve, evaluated, monkeypatch):
    """Points that are there are not computed again."""
    output, content = curve
    monkeypatch.setattr(evaluated.model, "generate", lambda *args, **kwargs: pytest.fail("was asked again"))
    assert evaluate_budgets(evaluated, SETTINGS, [2, 16], output, progress=False) == content


@pytest.mark.parametrize("budgets", [[], [0], [2, 17]])
def test_budgets_that_an_image_cannot_have(evaluated, tmp_path, budgets):
    with pytest.raises(ValueError, match="numbers of tokens from 1 to 16"):
        evaluate_budgets(evaluated, SETTINGS, budgets, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tasks_without_images(evaluated, tmp_path):
    settings = EvaluationSettings("scenes", tasks=("text-to-image",), num_samples=2)
    with pytest.raises(ValueError, match="None of the tasks .text-to-image. sees images"):
        evaluate_budgets(evaluated, settings, [2, 4], tmp_path)
