"""The example that trains the language model."""

import importlib
import json
from pathlib import Path

import datasets
import pytest
import torch

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.data.scenes import make_scenes
from lavit_hf.training.precompute_codes.tokenize_dataset import tokenize_dataset
from tiny_parts import CHECKPOINT, picture_rows, save_text, save_vision

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Runs the example with a few options of its own."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    main = importlib.import_module("train_lm").main

    def run(**options):
        defaults = {
            "output_dir": tmp_path / "out",
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        options = {**defaults, **options}
        return main([part for name, value in options.items() for part in (f"--{name}", *str(value).split())])

    return run


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_scenes(train, tmp_path, capsys):
    trainer = train(
        model=CHECKPOINT,
        dataset="scenes",
        num_scenes=16,
        eval_split="held_out",
        num_eval_rows=2,
        train_sampling_strategy="group_by_length",
    )
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert "eval_word_f1" in capsys.readouterr().out
    trained = LavitForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    before = LavitForConditionalGeneration.from_pretrained(CHECKPOINT).state_dict()
    changed = {name for name, value in trained.items() if not torch.equal(value, before[name])}
    assert changed and not any("vision_model" in name or "discrete" in name for name in changed)
    ImageTextProcessor.from_pretrained(tmp_path / "out")


def test_attention_of_the_language_model_can_be_chosen(train):
    trainers = [
        train(model=CHECKPOINT, dataset="scenes", num_scenes=8, max_steps=1, attn_implementation=name)
        for name in ("sdpa", "eager")
    ]
    for trainer, name in zip(trainers, ("sdpa", "eager"), strict=True):
        assert trainer.model.config.text_config._attn_implementation == name
        assert trainer.model.visual_tokenizer.config.vision_config._attn_implementation == "sdpa"
    assert losses(trainers[1]) == pytest.approx(losses(trainers[0]), rel=1e-4)


def test_labels_are_smoothed_after_they_are_shifted(train):
    trainer = train(model=CHECKPOINT, dataset="scenes", num_scenes=8, max_steps=1, label_smoothing_factor=0.1)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    predicted, targets = outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(predicted, targets, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_a_folder_of_pictures_with_a_bad_one(train, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for index, row in enumerate(row for row in picture_rows(6) if row["image"] is not None):
        row["image"].save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "caption": row["text"]}))
    (folder / "0.png").write_bytes(b"no picture")
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    trainer = train(model=CHECKPOINT, dataset=folder, text_column="caption")
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert "1 samples were bad" in capsys.readouterr().out


def test_streamed_data(train, tmp_path, capsys):
    """The projector starts from the first pictures of the stream; the first rows of another split are evaluated on."""
    folder = tmp_path / "shards"
    folder.mkdir()
    rows = picture_rows(12)
    rows[2]["text"] = ""
    for split, start, stop in (("train", 0, 8), ("test", 8, 12)):
        part = datasets.Dataset.from_list(rows[start:stop]).cast_column("image", datasets.Image())
        part.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    options = {"dataset": folder, "streaming": True, "init_projector": True, "eval_split": "test", "num_eval_rows": 3}
    trainer = train(model=CHECKPOINT, save_strategy="steps", save_steps=2, **options)
    assert len(trainer.eval_dataset) == 3
    found = losses(trainer)
    num_bad = trainer.train_dataset.num_bad_samples
    assert num_bad in (2, 3), "16 samples of 7 good rows and a bad one: two passes, and two more"
    assert len(found) == 4 and f"{num_bad} samples were bad" in capsys.readouterr().out
    resumed = train(model=CHECKPOINT, resume_from_checkpoint=tmp_path / "out" / "checkpoint-2", **options)
    assert losses(resumed) == found
    with pytest.raises(ValueError, match="max_steps has to say"):
        train(model=CHECKPOINT, max_steps=-1, **options)
    with pytest.raises(ValueError, match="a dataset or a mixture"):
        train(model=CHECKPOINT, streaming=True)
    with pytest.raises(SystemExit, match="--dataset"):
        train(model=CHECKPOINT)


def test_tokenized_images_and_packing(train, tmp_path):
    model = LavitForConditionalGeneration.from_pretrained(CHECKPOINT)
    processor = ImageTextProcessor.from_pretrained(CHECKPOINT, visual_tokenizer=model)
    tokenize_dataset(datasets.Dataset.from_list(picture_rows(8)), tmp_path / "codes", processor, progress=False)
    budgets = train(model=CHECKPOINT, dataset="scenes", num_scenes=16, packing=True, keep_rate_range="0.2 0.9")
    assert losses(budgets)[-1] < losses(budgets)[0]
    assert budgets.model.model.multi_modal_projector.weight.requires_grad, "features can be packed with budgets"
    for option in ("init_merger", "init_projector"):
        with pytest.raises(ValueError, match="but images are codes here"):
            train(model=CHECKPOINT, dataset=tmp_path / "codes", **{option: True})
    trainer = train(model=CHECKPOINT, dataset=tmp_path / "codes", packing=True, max_length=128)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert (tmp_path / "out" / "unet").is_dir(), "it draws with the pixel decoder of the model it started from"
    learned = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert learned and all(name.startswith(("lm_head", "model.language_model")) for name in learned)


def test_lengths_that_are_known_are_not_measured(train, tmp_path):
    """Regression: those of codes were replaced by longer ones, in which every patch is kept."""
    processor = ImageTextProcessor.from_pretrained(
        CHECKPOINT, visual_tokenizer=LavitForConditionalGeneration.from_pretrained(CHECKPOINT)
    )
    tokenize_dataset(datasets.Dataset.from_list(picture_rows(8)), tmp_path / "codes", processor, progress=False)
    options = {"dataset": tmp_path / "codes", "train_sampling_strategy": "group_by_length", "max_steps": 1}
    rows = train(model=CHECKPOINT, **options).train_dataset
    assert [len(row["input_ids"]) for row in rows] == list(rows.dataset["length"])


def test_a_new_lavit(train, tmp_path):
    trainer = train(
        text_model=save_text(tmp_path / "text"),
        vision_model=save_vision(tmp_path / "vision"),
        dataset="scenes",
        num_scenes=8,
        max_steps=2,
    )
    assert len(losses(trainer)) == 2
    saved = LavitForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert saved.config.text_config.vocab_size == trainer.model.config.text_config.vocab_size


@pytest.mark.parametrize("part", ["text_model", "visual_tokenizer", "vision_model"])
def test_a_model_has_its_parts(train, part):
    """Regression: they were ignored."""
    with pytest.raises(SystemExit, match="either --model, which has all parts, or --text_model"):
        train(model=CHECKPOINT, dataset="scenes", num_scenes=8, **{part: CHECKPOINT})


def test_a_new_lavit_starts_at_what_its_tokenizer_knows(train, tmp_path):
    trainer = train(
        text_model=save_text(tmp_path / "text"),
        visual_tokenizer=CHECKPOINT,
        dataset="scenes",
        num_scenes=40,
        max_steps=1,
        init_code_embeddings=True,
        init_merger=True,
        init_projector=True,
        text_noise=0.1,
        freeze_image_features=True,
    )
    assert trainer.data_collator.text_noise == 0.1
    model = trainer.model
    learned = {name for name, value in model.named_parameters() if value.requires_grad}
    assert learned and all(name.startswith(("lm_head", "model.language_model")) for name in learned)
    assert not any(part.weight.any() for part in model.visual_tokenizer.continuous.merger.output_projections())
    images = [row["image"] for row in make_scenes("train", 40)]
    pixels = trainer.processing_class.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        projected = torch.cat(model.get_image_features(pixels).pooler_output)
    assert projected.square().mean().sqrt() == pytest.approx(1, abs=1e-3)
    codebook = model.visual_tokenizer.discrete.quantizer.codebook.weight
    offset = model.config.visual_token_offset
    rows = model.lm_head.weight[offset : offset + len(codebook)]
    cosines = [
        torch.nn.functional.cosine_similarity(part[:1] - part.mean(0), part[1:] - part.mean(0))
        for part in (rows, torch.nn.functional.normalize(codebook, dim=-1))
    ]
    assert torch.corrcoef(torch.stack(cosines))[0, 1] > 0.9  # one small step away from equal
