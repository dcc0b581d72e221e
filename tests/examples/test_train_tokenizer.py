"""The example that trains the visual tokenizer."""

import importlib
import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForPreTraining

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, LavitTokenDecoder, LavitVisualTokenizer
from lavit_hf.data.scenes import make_scenes
from tiny_parts import CHECKPOINT, picture_rows, save_text

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIZES = {"codebook_size": 24, "codebook_dim": 6, "num_layers": 1, "cross_attention_dims": 32, "pooled_size": 0}


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Runs the example with a few options of its own."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    main = importlib.import_module("train_tokenizer").main

    def run(**options):
        defaults = {
            "output_dir": tmp_path / "out",
            "max_steps": 12,
            "per_device_train_batch_size": 8,
            "kmeans_tokens_per_code": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        options = {**defaults, **options}
        return main([part for name, value in options.items() for part in (f"--{name}", *str(value).split())])

    return run


def test_what_it_saves_is_what_the_other_stages_need(train, tmp_path, capsys):
    new = {"vision_model": CHECKPOINT, "from_scratch": True, **SIZES}
    trainer = train(**new, dataset="scenes", num_scenes=32, eval_split="validation", num_eval_rows=16)
    assert trainer.model.phase == "quantized" and trainer.state.log_history[-1]["eval_argmax_keep_rate"] > 0
    assert "the codes mean nothing yet" not in capsys.readouterr().out
    config = trainer.model.config
    assert (config.bypass_merger_steps, config.selector_steps, config.quantize_after_steps) == (2, 2, 5)
    expected = LavitVisualTokenizer.from_pretrained(CHECKPOINT).vision_model.state_dict()
    assert all(
        torch.equal(trainer.model.visual_tokenizer.vision_model.state_dict()[k], v) for k, v in expected.items()
    )

    save_text(tmp_path / "text")
    folder = tmp_path / "out" / "visual_tokenizer"
    model = LavitForConditionalGeneration.from_vision_text_pretrained(None, tmp_path / "text", visual_tokenizer=folder)
    processor = ImageTextProcessor.from_vision_text_pretrained(
        folder, tmp_path / "text", config=model, visual_tokenizer=model
    )
    image = make_scenes("validation", num_scenes=1)[0]["image"]
    pixel_values = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    tokens = model.visual_tokenizer.encode(pixel_values)
    assert torch.equal(tokens.codes, trainer.model.eval().visual_tokenizer.encode(pixel_values).codes)
    decoder = LavitTokenDecoder.from_pretrained(tmp_path / "out" / "token_decoder")
    assert decoder(tokens.codes, tokens.num_tokens).condition.shape == (1, 16, 32)


def test_rows_of_the_training_split_to_evaluate_on(train):
    """Regression: all of it was evaluated on, however many rows were asked for."""
    options = {"num_scenes": 16, "eval_split": "train", "num_eval_rows": 3, "max_steps": 1, "learning_rate": 0.0}
    trainer = train(vision_model=CHECKPOINT, dataset="scenes", **options)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (16, 3)


def test_training_of_a_tokenizer_goes_on(train, tmp_path):
    trainer = train(vision_model=CHECKPOINT, dataset="scenes", num_scenes=16, max_steps=2, learning_rate=0.0)
    before, after = (LavitVisualTokenizer.from_pretrained(path) for path in (CHECKPOINT, tmp_path / "out"))
    assert trainer.model.phase == "quantized"
    state = after.state_dict()
    changed = {
        name
        for name, value in before.state_dict().items()
        if not name.startswith("continuous.") and not torch.equal(value, state[name])
    }
    assert changed == {"discrete.quantizer.codebook.weight"}


def test_the_selector_learns_alone(train, tmp_path):
    first = train(
        **{"vision_model": CHECKPOINT, "from_scratch": True, **SIZES, "dataset": "scenes", "num_scenes": 16},
        max_steps=2,
        bypass_merger_steps=2,
        quantize_after_steps=2,  # its codes are those it began with
    )
    parts = {"vision_model": tmp_path / "out/visual_tokenizer", "token_decoder": tmp_path / "out/token_decoder"}
    options = {**parts, "dataset": "scenes", "num_scenes": 16, "selector_only": True, "output_dir": tmp_path / "next"}
    trainer = train(**options, max_steps=20, selector_steps=18)
    before, after = first.model.state_dict(), trainer.model.state_dict()
    parts = [name for name in after if name.startswith(("visual_tokenizer.", "token_decoder."))]
    changed = {name for name in parts if not torch.equal(before[name], after[name])}
    assert changed == {name for name in parts if ".selector." in name}
    with pytest.raises(SystemExit, match="raise --max_steps or lower --selector_steps"):
        train(**options, max_steps=20, selector_steps=19)
    assert trainer.model.phase == "bypass"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_model": CHECKPOINT}, "needs the --token_decoder"),
        ({"vision_model": CHECKPOINT, "from_scratch": True, **SIZES}, "a --vision_model that is a visual tokenizer"),
    ],
)
def test_only_a_trained_tokenizer_has_a_selector_that_learns_alone(train, options, message):
    with pytest.raises(SystemExit, match=message):
        train(**options, dataset="scenes", num_scenes=8, selector_only=True)


@pytest.mark.parametrize("new", ["from_scratch", "new_codes"])
def test_a_new_tokenizer_learns_with_a_new_token_decoder(train, new):
    """Regression: one that was given was ignored."""
    with pytest.raises(SystemExit, match="--token_decoder is for a --vision_model that is a visual tokenizer"):
        train(vision_model=CHECKPOINT, token_decoder=CHECKPOINT, dataset="scenes", num_scenes=8, **{new: True})


def test_a_run_that_is_resumed_equals_one_that_is_not(train, tmp_path):
    vision = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
    (tmp_path / "vision.json").write_text(json.dumps({**vision, **sizes}))
    options = {"vision_config": tmp_path / "vision.json", **SIZES, "dataset": "scenes", "num_scenes": 16}
    options |= {"gradient_accumulation_steps": 2, "num_train_epochs": 6, "max_steps": -1, "save_strategy": "epoch"}
    options |= {"per_device_train_batch_size": 4, "keep_rate_range": "0.2 1.0"}
    expected = train(**options)
    assert expected.state.global_step == 12 and expected.model.config.quantize_after_steps == 10
    resumed = train(
        **options, output_dir=tmp_path / "resumed", resume_from_checkpoint=tmp_path / "out" / "checkpoint-6"
    )
    state = resumed.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.model.state_dict().items())
    assert isinstance(AutoModelForPreTraining.from_pretrained(tmp_path / "resumed"), type(expected.model))


def test_training_that_ends_too_early_is_told(train, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for index, row in enumerate(picture_rows(9)):
        if row["image"] is not None:
            row["image"].save(images / f"{index}.png")
    (images / "broken.png").write_bytes(b"no image")
    options = {"vision_model": CHECKPOINT, "from_scratch": True, **SIZES, "dataset": images, "max_steps": 1}
    train(**options, quantize_after_steps=9)
    out = capsys.readouterr().out
    assert "the codes mean nothing yet" in out and "1 samples were bad" in out
    train(**options, quantize_after_steps=9, on_failure="ignore")  # such as a stage that wants the selector alone
    assert "the codes mean nothing yet" not in capsys.readouterr().out


@pytest.mark.parametrize("given", [{}, {"vision_model": CHECKPOINT, "vision_config": "x.json"}])
def test_the_encoder_is_given_once(train, given):
    with pytest.raises(SystemExit, match="either --vision_model or --vision_config"):
        train(**given, dataset="scenes", num_scenes=8)


def test_label_smoothing_is_refused(train):
    with pytest.raises(SystemExit, match="stage 1 has no labels"):
        train(vision_model=CHECKPOINT, dataset="scenes", num_scenes=8, label_smoothing_factor=0.1)


def test_codes_of_an_image_can_tell_another_one(train, tmp_path):
    rows = picture_rows(24)
    table = [{"image": row["image"], "target_image": rows[-1 - index]["image"]} for index, row in enumerate(rows)]
    datasets.Dataset.from_list(table).save_to_disk(str(tmp_path / "pairs"))
    options = {"vision_model": CHECKPOINT, "from_scratch": True, **SIZES, "dataset": tmp_path / "pairs"}
    trainer = train(**options, target_image_column="target_image")
    assert "target_pixel_values" in next(iter(trainer.get_train_dataloader()))
    assert trainer.model.phase == "quantized"
    with pytest.raises(SystemExit, match="not streamed"):
        train(**options, target_image_column="target_image", streaming=True)
