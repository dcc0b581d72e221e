"""The example that fine-tunes with LoRA."""

import importlib
import json
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel, get_peft_model

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.training import tokenize_dataset
from lavit_hf.training.language_model.adapters import get_lora_config, upcast_trained_weights
from tiny_parts import CHECKPOINT, picture_rows

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def finetune(monkeypatch, tmp_path):
    """Runs the example with a few options of its own."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    main = importlib.import_module("finetune_lora").main

    def run(**options):
        defaults = {
            "model": CHECKPOINT,
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


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_scenes(finetune, tmp_path):
    trainer = finetune(
        dataset="scenes",
        num_scenes=16,
        eval_split="held_out",
        num_eval_rows=16,
        eval_strategy="steps",
        eval_steps=2,
        merge_to=tmp_path / "merged",
    )
    assert (
        losses(trainer)[-1] < losses(trainer)[0] and losses(trainer, "eval_loss")[1] < losses(trainer, "eval_loss")[0]
    )
    adapted = PeftModel.from_pretrained(LavitForConditionalGeneration.from_pretrained(CHECKPOINT), tmp_path / "out")
    merged = LavitForConditionalGeneration.from_pretrained(tmp_path / "merged")
    processor = ImageTextProcessor.from_pretrained(tmp_path / "merged")
    inputs = processor(images=picture_rows(1)[0]["image"], text="<image>a", return_tensors="pt")
    torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "out" / "processor_config.json").exists()
    assert (tmp_path / "merged" / "unet").is_dir(), "it draws with the pixel decoder of its base"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Adapters of LoRA for a LaVIT" in card and str(CHECKPOINT) not in card
    with pytest.raises(ValueError, match="merged exists; --merge_to takes a new directory"):  # before any training
        finetune(dataset="nothing", merge_to=tmp_path / "merged")


def test_codes_of_another_tokenizer_are_refused(finetune, tmp_path):
    """Regression: it trained on ids that meant something else."""
    other = LavitForConditionalGeneration.from_pretrained(CHECKPOINT)
    other.visual_tokenizer.discrete.quantizer.codebook.weight.data.neg_()
    processor = ImageTextProcessor.from_pretrained(CHECKPOINT, visual_tokenizer=other)
    rows = datasets.Dataset.from_list(picture_rows(8))
    tokenize_dataset(rows, tmp_path / "codes", processor, checkpoint="another", progress=False)
    for options in ({}, {"streaming": True}):
        with pytest.raises(ValueError, match="made by another, whose codebook is another one"):
            finetune(dataset=tmp_path / "codes", image_column="codes", **options)


def test_a_split_to_evaluate_on_is_evaluated_on_at_the_end(finetune, tmp_path, capsys):
    """Regression: without eval_strategy it did nothing; and it was loaded as a whole."""
    trainer = finetune(dataset="scenes", num_scenes=8, max_steps=1, eval_split="held_out", num_eval_rows=3)
    assert len(trainer.eval_dataset) == 3 and len(losses(trainer, "eval_loss")) == 1
    assert "eval_loss" in capsys.readouterr().out
    rows = datasets.Dataset.from_list(picture_rows(10)).cast_column("image", datasets.Image())
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    options = {"dataset": tmp_path / "data", "eval_split": "test", "num_eval_rows": 4, "max_steps": 1}
    for streaming in (False, True):
        assert len(finetune(**options, streaming=streaming).eval_dataset) == 4


def test_batches_of_similar_length(finetune, tmp_path):
    """Regression: nothing measured the lengths, and `Trainer` could not infer them."""
    options = {"train_sampling_strategy": "group_by_length", "max_steps": 1}
    trainer = finetune(dataset="scenes", num_scenes=8, eval_split="held_out", num_eval_rows=3, **options)
    assert trainer.train_dataset.has_lengths and trainer.eval_dataset.has_lengths
    rows = [{**row, "length": 10 + index} for index, row in enumerate(picture_rows(8))]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    known = finetune(dataset=tmp_path / "rows", **options).train_dataset
    assert [len(row["input_ids"]) for row in known] == list(range(10, 18))


def test_random_budgets(finetune):
    trainer = finetune(dataset="scenes", num_scenes=16, keep_rate_range="0.1 0.9", image_first_probability=1)
    counts = next(iter(trainer.get_train_dataloader()))["num_image_tokens"].tolist()
    assert len(set(counts)) > 1 and losses(trainer)[-1] < losses(trainer)[0]


def test_labels_are_smoothed_after_they_are_shifted(finetune):
    trainer = finetune(dataset="scenes", num_scenes=8, max_steps=1, label_smoothing_factor=0.1)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    predicted, targets = outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(predicted, targets, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_a_folder_of_images_with_questions_and_a_corrupt_file(finetune, tmp_path, capsys):
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    lines = []
    for index, row in enumerate(row for row in picture_rows(10) if row["image"] is not None):
        row["image"].save(folder / f"{index}.png")
        lines.append({"file_name": f"{index}.png", "prompt": "Question: what is it? Answer:", "answer": row["text"]})
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    trainer = finetune(dataset=tmp_path / "data", text_column="answer", train_embeddings=False, lora_r=4)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.train_dataset.bad_samples == [3] and "1 samples were bad" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["modules_to_save"] is None


def test_a_file_of_rows_with_paths_relative_to_it(finetune, tmp_path):
    (tmp_path / "data").mkdir()
    lines = []
    for index, row in enumerate(row for row in picture_rows(4) if row["image"] is not None):
        row["image"].save(tmp_path / "data" / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "text": row["text"]}))
    (tmp_path / "data" / "rows.jsonl").write_text("\n".join(lines))
    trainer = finetune(dataset=tmp_path / "data" / "rows.jsonl", on_bad_sample="raise", max_steps=1)
    assert len(losses(trainer)) == 1


def test_half_precision_base_trains_fp32_copies(finetune, tmp_path):
    base = LavitForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    ImageTextProcessor.from_pretrained(CHECKPOINT).save_pretrained(tmp_path / "base")
    options = {"dataset": "scenes", "num_scenes": 8, "learning_rate": 1e-5, "max_steps": 2, "warmup_steps": 0}
    trainer = finetune(model=tmp_path / "base", dtype="bfloat16", bf16=True, merge_to=tmp_path / "merged", **options)
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    frozen = {value.dtype for value in trainer.model.parameters() if not value.requires_grad}
    assert frozen == {torch.bfloat16, torch.float32}, "selectors and codebook stay in fp32"
    # Steps of 1e-5 would be lost in bfloat16.
    head = trainer.model.get_output_embeddings()
    moved = head.modules_to_save["default"].weight - head.original_module.weight.float()
    assert (moved != 0).float().mean() > 0.9
    merged = LavitForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight.dtype == torch.bfloat16
    assert merged.visual_tokenizer.discrete.selector.in_proj.weight.dtype == torch.float32


def test_upcasting_leaves_the_base_model_alone():
    base = LavitForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    model = get_peft_model(base, get_lora_config(base))
    before = {name: value.dtype for name, value in model.named_parameters() if not value.requires_grad}
    upcast_trained_weights(model)
    assert {name: value.dtype for name, value in model.named_parameters() if not value.requires_grad} == before
