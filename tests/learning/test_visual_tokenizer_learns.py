"""Stage 1 learns on scenes, and its guards tell a naive run, whose numbers look as healthy, from one that works."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from lavit_hf.data.scenes import make_scenes
from lavit_hf.modeling.modeling_lavit_pretraining import LavitVisualTokenizerForPreTraining
from lavit_hf.training.dataset import TrainingDataset
from lavit_hf.training.visual_tokenizer import VisualTokenizerCallback, VisualTokenizerDataCollator
from tiny_vision import IMAGE_SIZE, image_processor, patch_labels, train_vision_model

CODEBOOK_SIZE = 128


@pytest.fixture(scope="module")
def scenes() -> dict[str, Dataset]:
    sizes = {"train": 1000, "validation": 200}
    return {split: make_scenes(split, num_scenes=size, image_size=IMAGE_SIZE) for split, size in sizes.items()}


@pytest.fixture(scope="module")
def vision_model(scenes):
    return train_vision_model(scenes["train"])


def build_trainer(folder, scenes, vision_model, max_steps: int, on_failure: str, **config) -> Trainer:
    torch.manual_seed(0)
    sizes = {"merger_num_layers": 2, "merger_num_heads": 4, "codebook_dim": 16, "initializer_range": 0.1}
    model = LavitVisualTokenizerForPreTraining.from_vision_pretrained(
        vision_model=vision_model,
        visual_tokenizer_config={**sizes, "codebook_size": CODEBOOK_SIZE},
        token_decoder_config={"cross_attention_dims": [8], "pooled_size": None, "initializer_range": 0.1},
        **config,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        max_steps=max_steps,
        learning_rate=3e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        weight_decay=0.01,
        logging_steps=25,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = {split: TrainingDataset(rows, text_column=None) for split, rows in scenes.items()}
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=VisualTokenizerDataCollator(image_processor()),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
    )
    VisualTokenizerCallback(on_failure=on_failure).attach(trainer)
    return trainer


def test_stage_one_learns(tmp_path, scenes, vision_model):
    steps = {"bypass_merger_steps": 300, "selector_steps": 300, "quantize_after_steps": 320}
    trainer = build_trainer(tmp_path, scenes, vision_model, 400, "raise", **steps)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < logs[0]["loss"] / 3
    assert logs[-1]["keep_rate"] == pytest.approx(1 / 3, rel=0.2)

    found = trainer.evaluate()
    assert found["eval_live_codes"] >= 0.8 * CODEBOOK_SIZE
    assert found["eval_argmax_keep_rate"] == pytest.approx(1 / 3, rel=0.2)
    assert found["eval_argmax_empty_images"] <= 0.02
    assert found["eval_cosine"] > 0.8

    tokens = trainer.model.visual_tokenizer.eval().encode(
        image_processor()(images=list(scenes["validation"]["image"]), return_tensors="pt")["pixel_values"]
    )
    is_object = patch_labels(scenes["validation"])[:, 1] > 0
    kept = tokens.keep_mask.float()
    assert kept[is_object].mean() > 0.8 > 0.4 > kept[~is_object].mean(), "tokens should be where the objects are"
    more_for_more = torch.corrcoef(torch.stack([tokens.num_tokens.float(), is_object.sum(dim=-1).float()]))[0, 1]
    assert more_for_more > 0.5


def test_a_naive_run_looks_healthy_but_is_found_out(tmp_path, scenes, vision_model):
    """Without the bypass all patches are equally likely to be kept: sampling works, the argmax keeps nothing."""
    naive = {"bypass_merger_steps": 0, "selector_steps": None, "quantize_after_steps": 1000}
    trainer = build_trainer(tmp_path, scenes, vision_model, 250, "raise", **naive)
    trainer.callback_handler.callbacks[0].patience = 8
    with pytest.raises(RuntimeError, match="argmax keeps nothing in 100%"):
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < 0.5 * logs[0]["loss"]
    assert logs[-1]["keep_rate"] == pytest.approx(1 / 3, rel=0.1)
    assert logs[-1]["argmax_keep_rate"] < 0.01
