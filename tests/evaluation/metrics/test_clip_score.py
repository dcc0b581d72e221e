from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from evaluation.metrics.tiny_networks import save_tiny_clip
from lavit_hf.evaluation.metrics import load_metric
from lavit_hf.evaluation.metrics.images import ClipSimilarity, open_image
from lavit_hf.evaluation.tasks import open_picture

TEXTS = ["a red bird", "two cats", "snow"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(20, 30), (16, 16), (40, 16)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def expected_cosines(clip: Path, pictures: list[Image.Image], texts: list[str]) -> list[float]:
    """One pair at a time, from the parts of the model."""
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    cosines = []
    for picture, text in zip(pictures, texts, strict=True):
        inputs = processor(images=picture, text=text, return_tensors="pt")
        vision = model.vision_model(pixel_values=inputs.pop("pixel_values")).pooler_output
        language = model.text_model(**inputs).pooler_output
        embeddings = model.visual_projection(vision), model.text_projection(language)
        cosines.append(torch.nn.functional.cosine_similarity(*embeddings).item())
    return cosines


@pytest.mark.parametrize(("options", "weight", "prefix"), [({}, 2.5, "A photo depicts "), ({"prefix": ""}, 2.5, "")])
def test_clip_score(clip: Path, pictures: list[Image.Image], options: dict, weight: float, prefix: str) -> None:
    metric = load_metric("clip_score", model_name_or_path=clip, batch_size=2, **options)
    result = metric.compute(predictions=pictures, references=TEXTS)
    cosines = expected_cosines(clip, pictures, [prefix + text for text in TEXTS])
    assert result["scores"] == pytest.approx([weight * max(cosine, 0) for cosine in cosines], abs=1e-5)
    assert result["clip_score"] == pytest.approx(np.mean(result["scores"]))
    assert len(set(result["scores"])) > 1


def test_paths_and_pictures_give_the_same(clip: Path, pictures: list[Image.Image], tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{index}.png") for index in range(3)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    metric = load_metric("clip_score", model_name_or_path=str(clip), weight=100.0, prefix="")
    from_paths = metric.compute(predictions=paths, references=TEXTS)
    assert from_paths == metric.compute(predictions=pictures, references=TEXTS)
    with pytest.raises(ValueError, match="nowhere.png"):
        metric.compute(predictions=["nowhere.png"], references=["a bird"])


@pytest.mark.parametrize("factor", [1.5, 3])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    path = tmp_path / "bomb.png"
    Image.new("RGB", (300, 200)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(300 * 200 / factor))
    for stored in ({"path": str(path), "bytes": None}, {"path": None, "bytes": path.read_bytes()}):
        with pytest.raises(ValueError, match="pixels|too large"):
            open_image(stored)
    with pytest.raises(ValueError, match="bomb.png.*(pixels|too large)|(pixels|too large).*bomb.png"):
        open_picture({"id": "1", "picture": path.name}, tmp_path)


def test_the_best_of_several_drawings(clip: Path, pictures: list[Image.Image]) -> None:
    similarity = ClipSimilarity(clip, batch_size=2)
    for text in TEXTS:
        cosines = expected_cosines(clip, pictures, [text] * 3)
        assert similarity.choose_best(pictures, text) == int(np.argmax(cosines))


def test_long_texts_are_cut(clip: Path, pictures: list[Image.Image]) -> None:
    cosines = ClipSimilarity(clip).compare(pictures[:1] * 2, ["a" * 100, "a" * 200])
    assert cosines[0] == pytest.approx(cosines[1])


def test_bad_input(clip: Path, pictures: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="needs a CLIP checkpoint"):
        load_metric("clip_score")
    similarity = ClipSimilarity(clip, batch_size=2)
    with pytest.raises(ValueError, match="fewer images"):
        similarity.compare(pictures[:1], TEXTS)
    with pytest.raises(ValueError, match="fewer images"):
        similarity.compare(pictures[:2], TEXTS)
    with pytest.raises(ValueError, match="more images"):
        similarity.compare(pictures, TEXTS[:2])
