"""Stage 1 with plain `Trainer`."""

import json
import logging
import subprocess

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from lavit_hf import LavitImageProcessorPil, LavitVisualTokenizer
from lavit_hf.modeling.modeling_lavit_pretraining import LavitVisualTokenizerForPreTraining
from lavit_hf.training.dataset import TrainingDataset
from lavit_hf.training.visual_tokenizer import VisualTokenizerCallback, VisualTokenizerDataCollator, find_failures
from lavit_hf.utils.seeds import sample_seed
from modeling.tiny_pretraining import build_pretraining_model
from training import tiny_tokenizer_training
from training.tiny_tokenizer_training import BATCH_SIZE, NUM_STEPS, build_trainer, train_logs
from training.tiny_training import script_environment


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without any extras, to compare with."""
    trainer = build_trainer(tmp_path_factory.mktemp("plain"))
    trainer.train()
    return trainer


def assert_same_state(one: torch.nn.Module, other: torch.nn.Module) -> None:
    state = other.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(state[name], value), name


def test_every_phase_is_trained_and_logged(plain):
    assert plain.model.phase == "quantized" and int(plain.model.step) == NUM_STEPS
    logs = train_logs(plain)
    assert len(logs) == NUM_STEPS
    config = plain.model.config
    for log in logs:
        terms = log["reconstruction_loss"], log["keep_rate_loss"], log["commitment_loss"]
        weighted = terms[0] + config.keep_rate_weight * terms[1] + config.commitment_weight * terms[2]
        assert log["loss"] == pytest.approx(weighted, abs=1e-4)
        assert 0 <= log["keep_rate"] <= 1 and log["keep_rate_spread"] >= 0 and log["argmax_empty_images"] <= 1
    assert "live_codes" not in logs[0]
    assert 0 < logs[-1]["live_codes"] <= logs[-1]["used_tokens"] and logs[-1]["perplexity"] <= logs[-1]["live_codes"]
    assert logs[-1]["argmax_keep_rate"] == logs[-1]["keep_rate"]


def test_evaluation_has_metrics_of_its_own(plain):
    metrics = plain.evaluate()
    assert metrics["eval_loss"] > 0 and 0 < metrics["eval_cosine"] < 1
    assert metrics["eval_live_codes"] > 0
    assert plain.state.log_history[-1]["eval_argmax_keep_rate"] == metrics["eval_argmax_keep_rate"]
    again = plain.evaluate()
    assert plain.model.train_metrics.is_empty
    assert {name: again[name] for name in ("eval_loss", "eval_live_codes", "eval_cosine")} == {
        name: metrics[name] for name in ("eval_loss", "eval_live_codes", "eval_cosine")
    }


def test_services_get_the_metrics(tmp_path):
    """Callbacks that send logs somewhere are added by Trainer before those of the user."""
    seen = []

    class Service(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = build_trainer(tmp_path, max_steps=1)
    trainer.add_callback(Service())
    trainer.train()
    assert "cosine" in seen[0] and not any("cosine" in name for name in seen[-1])


@pytest.mark.parametrize("saved_at", [2, 7])
def test_resuming_is_bit_equal(plain, tmp_path, saved_at):
    trainer = build_trainer(tmp_path, save_strategy="steps", save_steps=saved_at)
    stop_at(trainer, saved_at)
    trainer.train()
    resumed = build_trainer(tmp_path, save_strategy="steps", save_steps=100)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    assert train_logs(resumed) == train_logs(plain)
    assert_same_state(resumed.model, plain.model)


def stop_at(trainer, step: int) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step

    trainer.add_callback(Stop())


def test_two_processes_equal_one_with_twice_the_batch(python, tmp_path):
    """With k-means, averages, revival, calibration and centering; the processes keep different numbers of patches."""
    # Adam would blow up the rounding errors of gradients that should be zero.
    arguments = {"optim": "sgd", "learning_rate": 0.1}
    options = {
        "output_dir": str(tmp_path),
        "arguments": {**arguments, "per_device_train_batch_size": BATCH_SIZE // 2},
    }
    command = [python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", tiny_tokenizer_training.__file__, json.dumps(options)]
    run = subprocess.run(command, env=script_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "2 processes DistributedDataParallel" in run.stdout
    single = build_trainer(tmp_path / "single", **arguments)
    single.train()
    assert single.model.phase == "quantized" and int(single.model.quantizer_learner.num_revived) > 0
    found = json.loads((tmp_path / "logs.json").read_text())
    for log, expected in zip(found, train_logs(single), strict=True):
        assert log == pytest.approx(expected, abs=1e-5, rel=1e-5)
    state = LavitVisualTokenizerForPreTraining.from_pretrained(tmp_path).state_dict()
    for name, value in single.model.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_gradient_accumulation(tmp_path):
    """The mean over micro-batches; the codebook learns at each of them."""
    config = {"selector_steps": 0, "bypass_merger_steps": 0, "keep_rate_weight": 0.0, "quantize_after_steps": 100}
    config["center_targets"] = False
    whole = build_trainer(tmp_path, config, max_steps=3)
    parts = build_trainer(
        tmp_path, config, max_steps=3, per_device_train_batch_size=BATCH_SIZE // 4, gradient_accumulation_steps=4
    )
    for trainer in (whole, parts):
        trainer.train()
    assert [log["loss"] for log in train_logs(parts)] == pytest.approx(
        [log["loss"] for log in train_logs(whole)], abs=1e-4
    )
    assert int(parts.model.step) == 12 and int(whole.model.step) == 3


@pytest.mark.parametrize("arguments", [{"gradient_checkpointing": True}, {"torch_compile_backend": "eager"}])
def test_options_of_trainer_change_nothing(plain, tmp_path, arguments):
    trainer = build_trainer(tmp_path, **arguments, max_steps=8)
    trainer.train()
    for log, expected in zip(train_logs(trainer), train_logs(plain), strict=False):
        assert log == pytest.approx(expected, abs=1e-4, rel=1e-3)


def test_the_best_model_can_be_chosen_by_a_metric(tmp_path):
    trainer = build_trainer(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        metric_for_best_model="cosine",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_metric == max(
        log["eval_cosine"] for log in trainer.state.log_history if "eval_cosine" in log
    )
    LavitVisualTokenizer.from_pretrained(trainer.state.best_model_checkpoint)


class TestCollator:
    collator = VisualTokenizerDataCollator(LavitImageProcessorPil(size={"height": 16, "width": 16}), seed=5)

    def test_seeds_follow_seed_epoch_and_sample(self):
        image = Image.new("RGB", (20, 10), "red")
        rows = [{"images": [image], "sample_id": 3, "epoch": 2}, {"images": [image] * 2, "sample_id": 4, "epoch": 2}]
        batch = self.collator(rows)
        assert batch["pixel_values"].shape == (3, 3, 16, 16) and batch["sample_seeds"].dtype == torch.long
        assert batch["sample_seeds"][0] == sample_seed(5, 2, 3, "gumbel/0")
        assert len(set(batch["sample_seeds"].tolist())) == 3
        other = VisualTokenizerDataCollator(self.collator.image_processor, seed=6)(rows)
        assert not set(other["sample_seeds"].tolist()) & set(batch["sample_seeds"].tolist())

    def test_a_row_without_image_is_refused(self):
        with pytest.raises(ValueError, match="Sample 7 has no image"):
            self.collator([{"images": [], "sample_id": 7, "epoch": 0}])

    def test_targets_stand_beside_their_images(self):
        red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
        table = [{"image": [red, red], "drawing": [blue, red], "sample_id": 3}, {"image": red, "drawing": blue}]
        dataset = TrainingDataset(table, text_column=None, target_image_column="drawing")
        batch = self.collator([dataset[0], dataset[1]])
        colors = self.collator([{"image": red}, {"image": blue}])["pixel_values"]
        assert torch.equal(batch["target_pixel_values"], colors[[1, 0, 1]])
        assert torch.equal(batch["pixel_values"], colors[[0, 0, 0]])
        plain = self.collator([{"image": red, "target_image": blue}])
        assert torch.equal(plain["target_pixel_values"], colors[[1]])
        assert "target_pixel_values" not in self.collator([{"image": red}])

    def test_targets_for_some_rows_only_are_refused(self):
        image = Image.new("RGB", (16, 16), "red")
        with pytest.raises(ValueError, match="2 images has 1 target images: either all rows need them, or none"):
            self.collator([{"image": image, "target_image": image}, {"image": image}])

    def test_a_corrupt_image_is_replaced_by_the_next(self):
        good = Image.new("RGB", (16, 16), "blue")
        dataset = TrainingDataset([{"image": b"no image"}, {"image": good}], text_column=None)
        batch = next(iter(DataLoader(dataset, batch_size=2, collate_fn=self.collator)))
        assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1]) and dataset.bad_samples == [0]


HEALTHY = {
    "argmax_empty_images": 0.0,
    "keep_rate": 0.33,
    "keep_probability_spread": 0.2,
    "live_codes": 20,
    "used_tokens": 500,
    "perplexity": 15.0,
}
FAILURES = [
    ({"argmax_empty_images": 1.0}, "empty", "argmax keeps nothing in 100%"),
    ({"keep_probability_spread": 0.001}, "flat", "same probability"),
    ({"live_codes": 2, "perplexity": 1.2}, "collapse", "Only 2 of 24 possible codes"),
]


@pytest.mark.parametrize(("values", "name", "message"), FAILURES)
def test_failures_are_told_from_healthy_runs(values, name, message):
    model = build_pretraining_model(bypass_merger_steps=0, selector_steps=None)
    assert find_failures(model, HEALTHY) == {}
    found = find_failures(model, {**HEALTHY, **values})
    assert list(found) == [name] and message in found[name]


def test_few_tokens_cannot_use_many_codes():
    model = build_pretraining_model()
    assert find_failures(model, {**HEALTHY, "live_codes": 4, "used_tokens": 5}) == {}


def test_a_selector_that_will_be_calibrated_may_keep_nothing_yet():
    model = build_pretraining_model(selector_steps=3)
    nothing = {**HEALTHY, "argmax_empty_images": 1.0, "keep_probability_spread": 0.0}
    assert find_failures(model, nothing) == {}
    model.step += 3 + model.config.calibration_steps
    assert find_failures(model, nothing) == {}
    model.step += 1
    assert set(find_failures(model, nothing)) == {"empty", "flat"}


def keep_nothing(trainer) -> None:
    with torch.no_grad():
        trainer.model.visual_tokenizer.discrete.selector.out_proj_3.bias[0] -= 1000


def test_a_failing_run_is_ended(tmp_path):
    trainer = build_trainer(tmp_path, {"selector_steps": 0})
    trainer.callback_handler.callbacks[0] = VisualTokenizerCallback(on_failure="raise", patience=3)
    keep_nothing(trainer)
    with pytest.raises(RuntimeError, match="argmax keeps nothing"):
        trainer.train()
    assert trainer.state.global_step == 3


class StopAfterOneUpdate(TrainerCallback):
    """As SIGTERM does."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_stopped_run_has_its_patience_left(tmp_path, logging_steps):
    """Regression: what was stopped in the middle ended in an error about a few updates."""
    trainer = build_trainer(tmp_path, {"selector_steps": 0}, logging_steps=logging_steps)
    trainer.callback_handler.callbacks[0] = VisualTokenizerCallback(on_failure="raise", patience=3)
    trainer.add_callback(StopAfterOneUpdate())
    keep_nothing(trainer)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_failing_run_is_warned_about(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = build_trainer(tmp_path, {"selector_steps": 0}, max_steps=3)
    trainer.callback_handler.callbacks[0] = VisualTokenizerCallback(patience=2)
    keep_nothing(trainer)
    trainer.train()
    assert sum("argmax keeps nothing" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_run_of_few_logs_is_warned_about_at_its_end(tmp_path, caplog, monkeypatch, logging_steps):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = build_trainer(tmp_path, {"selector_steps": 0}, max_steps=2, logging_steps=logging_steps)
    trainer.callback_handler.callbacks[0] = VisualTokenizerCallback()
    keep_nothing(trainer)
    trainer.train()
    assert sum("argmax keeps nothing" in record.message for record in caplog.records) == 1
    trainer.evaluate()
    assert sum("argmax keeps nothing" in record.message for record in caplog.records) == 2, "of other images"


def test_what_helps_a_calibrated_selector_is_another_option():
    """Enough is kept of all images together: more steps of the same would keep as little of those that have none."""
    model = build_pretraining_model(selector_steps=3, bypass_merger_steps=3)
    model.step += 4 + model.config.calibration_steps
    (message,) = find_failures(model, {**HEALTHY, "argmax_empty_images": 0.4}).values()
    assert "nothing in 40% of the images" in message and "keep_rate_per_image=True" in message
    config = model.config
    config.keep_rate_per_image, config.keep_rate_weight = True, 100
    (message,) = find_failures(model, {**HEALTHY, "argmax_empty_images": 0.4}).values()
    assert "Raise keep_rate_weight (now 100) or keep_rate" in message and "per_image" not in message
    naive = build_pretraining_model(selector_steps=None, bypass_merger_steps=0)
    (message,) = find_failures(naive, {**HEALTHY, "argmax_empty_images": 0.4}).values()
    assert "bypass_merger_steps" in message and "keep_rate_per_image" not in message


def test_a_selector_that_is_taken_as_it_is_cannot_be_helped_here():
    model = build_pretraining_model(selector_steps=0, bypass_merger_steps=0)
    (message,) = find_failures(model, {**HEALTHY, "argmax_empty_images": 0.4}).values()
    assert "does not learn in this run" in message and "train another one" in message and "Start with" not in message


def test_unknown_reactions_are_refused():
    with pytest.raises(ValueError, match="on_failure"):
        VisualTokenizerCallback(on_failure="panic")
