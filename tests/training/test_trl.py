"""TRL's `SFTTrainer` on the same model and processor, with conversations about images."""

import datasets
import pytest
import torch
import trl
from packaging.version import Version
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.training.language_model.adapters import get_lora_config
from lavit_hf.training.language_model.data_collator import LavitDataCollator
from lavit_hf.training.language_model.preparation import freeze_for_language_modeling
from tiny_parts import CHECKPOINT, picture_rows

ARGUMENTS = {
    "max_steps": 6,
    "per_device_train_batch_size": 5,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "remove_unused_columns": False,
}


@pytest.fixture(scope="module")
def conversations() -> datasets.Dataset:
    rows = [row for row in picture_rows(12) if row["image"] is not None]
    question = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    return datasets.Dataset.from_list(
        [
            {
                "images": [row["image"]],
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": [{"type": "text", "text": row["text"]}]},
                ],
                "sample_id": index,
            }
            for index, row in enumerate(rows)
        ]
    )


def build_trainer(output_dir, train_dataset, assistant_only_loss=False, **kwargs) -> SFTTrainer:
    torch.manual_seed(0)
    model = LavitForConditionalGeneration.from_pretrained(CHECKPOINT)
    arguments = SFTConfig(str(output_dir), **ARGUMENTS, assistant_only_loss=assistant_only_loss)
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        processing_class=ImageTextProcessor.from_pretrained(CHECKPOINT),
        peft_config=get_lora_config(model),
        **kwargs,
    )


def train(trainer: SFTTrainer) -> list[float]:
    visual_tokenizer = trainer.model.base_model.model.visual_tokenizer
    before = {name: value.clone() for name, value in visual_tokenizer.state_dict().items()}
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in visual_tokenizer.state_dict().items())
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def learned_text(trainer: SFTTrainer) -> tuple[dict, list[str]]:
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = trainer.processing_class.tokenizer
    return batch, [tokenizer.decode(row[row >= 0]) for row in batch["labels"]]


def test_with_its_own_collator(conversations, tmp_path):
    # Otherwise TRL counts the question and image placeholders among the tokens to learn.
    arguments = {"output_dir": tmp_path, "train_dataset": conversations, "assistant_only_loss": True}
    if Version(trl.__version__) < Version("1.15"):
        with pytest.raises(ValueError, match="Assistant-only loss is not yet supported"):
            build_trainer(**arguments)
        return
    trainer = build_trainer(**arguments)
    batch, texts = learned_text(trainer)
    assert batch["pixel_values"].shape == (5, 3, 56, 56)
    assert (batch["input_ids"] == trainer.model.config.image_token_id).sum() == 5 * 16
    assert all(text.strip().startswith("cat dog") and not text.endswith("</s>") for text in texts)
    losses = train(trainer)
    assert losses[-1] < 0.7 * losses[0]
    trainer.save_model(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and (tmp_path / "processor_config.json").exists()


def test_with_our_collator_the_model_learns_to_stop(conversations, tmp_path):
    collator = LavitDataCollator(ImageTextProcessor.from_pretrained(CHECKPOINT))
    trainer = build_trainer(tmp_path, conversations, data_collator=collator)
    _, texts = learned_text(trainer)
    assert all(text.strip().startswith("cat dog") and text.endswith("</s>") for text in texts)
    losses = train(trainer)
    assert losses[-1] < 0.7 * losses[0]


def test_placeholders_in_the_labels_keep_the_loss_positive(conversations, tmp_path):
    """Regression: the placeholder's id lay outside of the head, and TRL's fused loss took its logit for 0."""
    losses = train(build_trainer(tmp_path, conversations))
    assert min(losses) > 0 and losses[-1] < losses[0]


def test_with_our_collator_the_loss_is_that_of_trainer(conversations, tmp_path):
    processor = ImageTextProcessor.from_pretrained(CHECKPOINT)
    losses = []
    for trainer_class, arguments_class in ((SFTTrainer, SFTConfig), (Trainer, TrainingArguments)):
        model = freeze_for_language_modeling(LavitForConditionalGeneration.from_pretrained(CHECKPOINT))
        trainer = trainer_class(
            model=model,
            args=arguments_class(str(tmp_path), **{**ARGUMENTS, "learning_rate": 1e-3}),
            train_dataset=conversations,
            processing_class=processor,
            data_collator=LavitDataCollator(processor),
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_prompts_and_completions(conversations, tmp_path):
    def split(row):
        return {"prompt": row["messages"][:1], "completion": row["messages"][1:]}

    pairs = conversations.map(split, remove_columns=["messages"])
    losses = train(build_trainer(tmp_path, pairs))
    assert losses[-1] < 0.7 * losses[0]


def preferences(conversations):
    def prefer(row):
        rejected = [{"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}]
        return {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": rejected}

    return conversations.map(prefer, remove_columns=["messages", "sample_id"])


@pytest.mark.parametrize("is_adapted", [False, True])
def test_preferences(conversations, tmp_path, is_adapted):
    model = LavitForConditionalGeneration.from_pretrained(CHECKPOINT)
    # Before, TRL looked for the class of a reference model in transformers only.
    finds_class = is_adapted or Version(trl.__version__) >= Version("1.15")
    trainer = DPOTrainer(
        model=model,
        ref_model=None if finds_class else LavitForConditionalGeneration.from_pretrained(CHECKPOINT),
        args=DPOConfig(str(tmp_path), **{**ARGUMENTS, "max_steps": 2, "remove_unused_columns": True}),
        train_dataset=preferences(conversations),
        processing_class=ImageTextProcessor.from_pretrained(CHECKPOINT),
        peft_config=get_lora_config(model) if is_adapted else None,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # both answers as likely as before
    assert losses[1] < losses[0]


def test_rewards(conversations, tmp_path):
    """GRPO writes answers to pictures itself; here long words are rewarded."""
    prompts = conversations.map(lambda row: {"prompt": row["messages"][:1]}, remove_columns=["messages", "sample_id"])
    options = {**ARGUMENTS, "per_device_train_batch_size": 2, "max_steps": 2, "remove_unused_columns": True}
    trainer = GRPOTrainer(
        model=LavitForConditionalGeneration.from_pretrained(CHECKPOINT),
        args=GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=5, **options),
        reward_funcs=lambda completions, **kwargs: [float(len(answer[0]["content"])) for answer in completions],
        train_dataset=prompts,
        processing_class=ImageTextProcessor.from_pretrained(CHECKPOINT),
    )
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "reward" in entry]) == 2
