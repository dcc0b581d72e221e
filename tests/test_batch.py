"""Batches of an engine: what is made of a row depends on the row, bad ones say why, and killed actors cost nothing."""

import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.batch import Captioner, Drawer, Scorer, Tokenizer
from lavit_hf.pipelines.image_to_text import generate_text
from lavit_hf.training.language_model.data_collator import LavitDataCollator
from tiny_parts import CHECKPOINT, picture_rows

PICTURES = [row["image"] for row in picture_rows(6) if row["image"] is not None]
TEXTS = ["a cat", "a dog on a cat", "cat " * 9, "dog", "a"]
FEW = {"num_beams": 1, "min_new_tokens": 1, "max_new_tokens": 4}


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def lavit():
    model = LavitForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    return model, ImageTextProcessor.from_pretrained(CHECKPOINT, visual_tokenizer=model)


def test_captions(lavit) -> None:
    captioner = Captioner(str(CHECKPOINT), generation=FEW)
    images = [
        png(PICTURES[0]),
        b"no picture",
        np.asarray(PICTURES[1]),
        None,
        {"bytes": png(PICTURES[2]), "path": None},
    ]
    found = captioner({"image": images, "id": np.arange(5)})
    expected = generate_text(*lavit, PICTURES[:3], [""] * 3, captioner.generation)
    first, second, third = (text.partition(".")[0] for text in expected)
    assert list(found["caption"]) == [first, None, second, None, third]
    assert [error is None for error in found["error"]] == [True, False, True, False, True]
    assert "missing" in found["error"][3] or "0 images" in found["error"][3]
    assert list(found["id"]) == list(range(5)) and found["image"] is images
    assert captioner({"image": []})["caption"].shape == (0,)
    with pytest.raises(KeyError, match="no column 'image'; it has 'picture'"):
        captioner({"picture": images})


def test_codes_do_not_depend_on_the_batch(lavit) -> None:
    tokenizer = Tokenizer(str(CHECKPOINT))
    model, processor = lavit
    together = tokenizer({"image": PICTURES})["codes"]
    alone = [tokenizer({"image": [image]})["codes"][0] for image in PICTURES]
    expected = [(ids[1:-1] - model.config.visual_token_offset).tolist() for ids in processor.tokenize_images(PICTURES)]
    assert list(together) == alone == [[codes] for codes in expected]


def test_scores_are_mean_logarithms_of_probabilities(lavit) -> None:
    model, processor = lavit
    scorer = Scorer(str(CHECKPOINT))
    found = scorer({"image": PICTURES, "text": [*TEXTS[:-1], " "]})
    assert found["score"][-1] is None and "empty" in found["error"][-1]
    collator = LavitDataCollator(processor, image_first_probability=1.0)
    for image, text, score in list(zip(PICTURES, TEXTS, found["score"], strict=True))[:-1]:
        with torch.no_grad():
            loss = model(**collator([{"image": image, "text": text}])).loss
        assert score == pytest.approx(-loss.item(), abs=1e-4)


def test_pictures_are_those_of_their_prompts() -> None:
    drawer = Drawer(str(CHECKPOINT), seed_column="number", drawing={"num_inference_steps": 1, "max_new_tokens": 6})
    found = drawer({"prompt": ["a cat", 5, "a dog", "a cat"], "number": [0, 0, 0, 1]})
    assert found["picture"][1] is None and "type int" in found["error"][1]
    again = drawer({"prompt": np.array(["a dog"]), "number": np.array([0])})
    first, second = (np.asarray(Image.open(io.BytesIO(data))) for data in (found["picture"][2], again["picture"][0]))
    assert np.abs(first.astype(int) - second).max() <= 1, "but for rounding in another batch"
    assert len({found["picture"][index] for index in (0, 2, 3)}) == 3


def test_missing_tensors_are_refused(tmp_path: Path) -> None:
    """Regression: transformers fills them with random numbers, and a job wrote captions of these."""
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors are missing, the first is model.language_model.norm.weight"):
        Captioner(str(checkpoint))


def test_seeds_mean_the_same_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    drawer, drawn_with = Drawer(str(CHECKPOINT)), []

    def draw(prompts, generator, **options):
        drawn_with.extend(generator)
        return SimpleNamespace(images=[Image.new("RGB", (4, 4))] * len(prompts))

    monkeypatch.setattr(drawer, "pipeline", draw)
    monkeypatch.setattr(drawer, "device", torch.device("cuda"))
    drawer.work([("a cat", 7), ("a dog", 8)])
    assert [(one.device.type, one.initial_seed()) for one in drawn_with] == [("cpu", 7), ("cpu", 8)]


def test_bad_rows_to_draw_stay() -> None:
    drawer = Drawer(str(CHECKPOINT), seed_column="number", drawing={"num_inference_steps": 1, "max_new_tokens": 6})
    prompts = ["a cat", "a cat", "a cat", "a cat", "an <image> of a cat", "a cat"]
    found = drawer({"prompt": prompts, "number": [1.5, float("nan"), float("inf"), "one", 0, 0.0]})
    assert [picture is None for picture in found["picture"]] == [True] * 5 + [False]
    assert all("the seed is no integer: " in error for error in found["error"][:4])
    assert "<image> placeholder" in found["error"][4] and found["error"][5] is None


def test_rows_that_failed_before_stay_failed() -> None:
    class Reader(Tokenizer):
        def read(self, row):
            assert row["id"] in (2, 3, 4), "it is worked on"
            return super().read(row)

    images = [None, PICTURES[0], PICTURES[0], b"no picture", PICTURES[1]]
    before = np.array(["no caption", "no score", None, "", float("nan")], dtype=object)
    found = Reader(str(CHECKPOINT))({"id": range(5), "image": images, "error": before})
    assert [codes is None for codes in found["codes"]] == [True, True, False, True, False]
    assert list(found["error"][:3]) == ["no caption", "no score", None]
    assert found["error"][3] and found["error"][4] is None
    assert before[3] == "", "what was given stays as it is"


def test_a_chain_keeps_the_first_reason() -> None:
    first = Captioner(str(CHECKPOINT), generation=FEW)({"image": [b"no picture", PICTURES[0]]})
    second = Scorer(str(CHECKPOINT), text_column="caption")({**first, "caption": [None, "a cat"]})
    assert second["error"][0] == first["error"][0] and second["score"][0] is None
    assert second["error"][1] is None and second["score"][1] < 0


def test_all_that_draws_has_the_dtype_of_the_model() -> None:
    pipeline = Drawer(str(CHECKPOINT), dtype="bfloat16").pipeline
    parts = (pipeline.model, pipeline.token_decoder, pipeline.unet, pipeline.vae)
    assert [part.dtype for part in parts] == [torch.bfloat16] * 4


class KilledOnce(Tokenizer):
    """Dies in its third batch, as a machine does that is taken back; its successor does not."""

    def __init__(self, checkpoint: str, marker: str) -> None:
        super().__init__(checkpoint, num_threads=1)
        self.marker, self.num_calls = marker, 0

    def __call__(self, batch):
        self.num_calls += 1
        if self.num_calls == 3:
            try:
                os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os._exit(1)
        return super().__call__(batch)


def test_a_killed_actor_of_ray_costs_nothing(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="pip install 'lavit-hf[ray]'")
    data = pytest.importorskip("ray.data", reason="pip install 'lavit-hf[ray]'")
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    try:
        rows = [{"id": index, "image": png(PICTURES[index % 5])} for index in range(40)]
        rows[7]["image"] = b"no picture"
        blocks = data.from_items(rows, override_num_blocks=10)
        arguments = {"checkpoint": str(CHECKPOINT), "marker": str(tmp_path / "killed")}
        done = blocks.map_batches(
            KilledOnce, fn_constructor_kwargs=arguments, batch_size=4, compute=data.ActorPoolStrategy(size=2)
        ).take_all()
    finally:
        ray.shutdown()
    assert (tmp_path / "killed").exists()
    assert sorted(row["id"] for row in done) == list(range(40)), "nothing twice, nothing lost"
    codes = Tokenizer(str(CHECKPOINT))({"image": PICTURES})["codes"]
    for row in done:
        if row["id"] == 7:
            assert row["codes"] is None and row["error"]
        else:
            assert [list(map(int, of_image)) for of_image in row["codes"]] == codes[row["id"] % 5] and not row["error"]
