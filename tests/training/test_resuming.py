"""A run that goes on in other numbers of processes is the run that was not interrupted: losses, and samples."""

import importlib
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from examples.test_interruptions import EXAMPLES, STAGES
from lavit_hf.training import VisualTokenizerCallback
from lavit_hf.training.trainer_checkpoints import require_sound_sharding
from tiny_parts import CHECKPOINT, picture_rows
from training import counted_training
from training.tiny_training import build_trainer, script_environment

NUM_SAMPLES, BATCH_SIZE, NUM_UPDATES = 16, 4, 6
COMMON = {
    "num_scenes": NUM_SAMPLES,
    "max_steps": NUM_UPDATES,
    "logging_steps": 1,
    "use_cpu": True,
    "dataset": "scenes",
}
COMMON |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-3}
COMMON |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": BATCH_SIZE}
OPTIONS = {
    **STAGES,
    # Every phase of stage 1 within these updates.
    "train_tokenizer": {
        "vision_model": CHECKPOINT,
        "from_scratch": True,
        "codebook_size": 24,
        "codebook_dim": 6,
        "num_layers": 1,
        "cross_attention_dims": 32,
        "pooled_size": 0,
        "kmeans_tokens_per_code": 1,
        "revive_every_steps": 2,
        "quantize_after_steps": 2,
        "selector_steps": 1,
        "bypass_merger_steps": 1,
        "on_failure": "ignore",
    },
}
# What `accelerate launch` makes of examples/accelerate/fsdp2.yaml (test_sharding.py has accelerate read it).
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Blip2EncoderLayer,LavitMergerLayer,LlamaDecoderLayer",
    "FSDP_IGNORED_MODULES": r".*\.(selector|quantizer)",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
WAYS = {
    "ddp": {},
    "sharded": {**FSDP, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    "full": {**FSDP, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
}
CASES = [(script, "ddp") for script in OPTIONS]
CASES += [("train_lm", "sharded"), ("train_lm", "full"), ("finetune_lora", "sharded")]


def command(script: str, folder: Path, **options: object) -> list[str]:
    values = {**COMMON, **OPTIONS[script], "output_dir": folder / "out", **options}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def example(monkeypatch: pytest.MonkeyPatch, script: str) -> Callable[[list[str]], Trainer]:
    """The `main` of a script, to run in this process."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(script).main


def run(
    python: str,
    script: str,
    folder: Path,
    num_processes: int,
    way: str = "ddp",
    noted: dict | None = None,
    restarts: int = 0,
    **options: object,
) -> subprocess.CompletedProcess[str]:
    """Runs a script; what it trains on is noted in `notes` of the folder."""
    (folder / "notes").mkdir(parents=True, exist_ok=True)
    launch = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    launch += ["--max-restarts", str(restarts), counted_training.__file__]
    launch += [json.dumps({"notes": str(folder / "notes"), **(noted or {})}), str(EXAMPLES / f"{script}.py")]
    environment = {**os.environ, **script_environment(), **WAYS[way]}
    # Or the processes that are started again may find the addresses of those before them.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    launch += command(script, folder, **options)
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=600)
    (folder / f"stderr-{num_processes}").write_text(done.stderr)
    return done


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


def samples(folder: Path, processes: dict[int, int] | None = None) -> dict[int, list[tuple[int, int]]]:
    """Epoch and number of every sample, by update; of updates that several runs made, those of so many processes."""
    found: dict[int, list[tuple[int, int]]] = {}
    for path in sorted((folder / "notes").iterdir()):
        for line in path.read_text().splitlines():
            update, *batch = json.loads(line)
            if processes is None or processes[update] == int(path.stem.split("-of-")[1]):
                found.setdefault(update, []).extend(map(tuple, batch))
    return {update: sorted(found[update]) for update in sorted(found)}


@pytest.fixture(scope="module")
def uninterrupted(python, tmp_path_factory):
    """The folder of a script's run in one process, which is not sharded."""
    folders: dict[str, Path] = {}

    def find(script: str) -> Path:
        if script not in folders:
            folder = tmp_path_factory.mktemp(script)
            done = run(python, script, folder, 1)
            assert done.returncode == 0, done.stderr[-3000:]
            folders[script] = folder
        return folders[script]

    return find


@pytest.mark.parametrize(("script", "way"), CASES)
def test_other_numbers_of_processes_go_on_as_one_run(python, tmp_path, uninterrupted, script, way):
    expected = uninterrupted(script)
    resume = {"resume_from_checkpoint": "latest", "way": way}
    begun = run(python, script, tmp_path, 2, per_device_train_batch_size=2, noted={"sigterm_at": 3}, **resume)
    assert begun.returncode == 0, begun.stderr[-3000:]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    more = run(python, script, tmp_path, 4, per_device_train_batch_size=1, noted={"sigterm_at": 5}, **resume)
    assert more.returncode == 0, more.stderr[-3000:]
    one = run(python, script, tmp_path, 1, **resume)
    assert one.returncode == 0, one.stderr[-3000:]

    assert losses(tmp_path) == pytest.approx(losses(expected), abs=1e-5)
    found = samples(tmp_path)
    assert found == samples(expected) and list(found) == list(range(1, NUM_UPDATES + 1))
    trained = Counter(sample for update in found.values() for sample in update)
    assert set(trained.values()) == {1} and len(trained) == NUM_UPDATES * BATCH_SIZE
    assert {number for epoch, number in trained if epoch == 0} == set(range(NUM_SAMPLES)), "all, before any again"

    names = [path.relative_to(expected / "out") for path in (expected / "out").rglob("*.safetensors")]
    assert names and [path for path in (tmp_path / "out").rglob("*.safetensors") if "checkpoint-" not in str(path)]
    for name in names:
        actual, wanted = load_file(tmp_path / "out" / name), load_file(expected / "out" / name)
        assert {key: value.shape for key, value in actual.items()} == {k: v.shape for k, v in wanted.items()}
        # AdamW makes steps of up to the learning rate of what is rounding alone, where a gradient should be zero.
        assert all((value.float() - actual[key].float()).abs().max() < 5e-3 for key, value in wanted.items())
    shutil.rmtree(tmp_path / "out")


def test_streamed_stage_3_goes_on_in_other_numbers_of_processes(python, tmp_path):
    """Other readers read other parts, so losses differ, but nothing comes twice and nothing is lost."""
    num_rows = NUM_UPDATES * BATCH_SIZE
    rows = [{**row, "sample_id": number} for number, row in enumerate(picture_rows(2 * num_rows)) if row["image"]]
    (tmp_path / "pictures").mkdir()
    for shard in range(4):
        part = datasets.Dataset.from_list(rows[shard:num_rows:4]).cast_column("image", datasets.Image())
        part.to_parquet(tmp_path / "pictures" / f"{shard}.parquet")
    options = {"dataset": tmp_path / "pictures", "streaming": True, "resume_from_checkpoint": "latest"}
    for processes, sigterm_at in ((2, 2), (4, 4), (1, None)):
        options["per_device_train_batch_size"] = BATCH_SIZE // processes
        noted = {} if sigterm_at is None else {"sigterm_at": sigterm_at}
        done = run(python, "train_pixel_decoder", tmp_path, processes, noted=noted, **options)
        assert done.returncode == 0, done.stderr[-3000:]
    found = samples(tmp_path)
    assert [len(batch) for batch in found.values()] == [BATCH_SIZE] * NUM_UPDATES
    assert sorted(sample for batch in found.values() for sample in batch) == [
        (0, row["sample_id"]) for row in rows[:num_rows]
    ]


def test_torchrun_goes_on_by_itself_after_a_worker_was_killed(python, tmp_path, uninterrupted):
    """The command is the same each time, also the first one, when there is nothing to resume from."""
    options = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "restarts": 3}
    noted = {"sigkill_at": 5}
    done = run(python, "train_lm", tmp_path, 2, noted=noted, resume_from_checkpoint="latest", **options)
    assert done.returncode == 0, done.stderr[-3000:]
    # Of the two that failed, it names the killed one or the one that waited for it, whichever it finds first.
    assert "There is no complete checkpoint" in done.stderr and "failed (exitcode: " in done.stderr
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted("train_lm")), abs=1e-5)
    found, expected = samples(tmp_path), samples(uninterrupted("train_lm"))
    assert len(found[5]) > len(expected[5]), "the update that was not saved is computed again"
    assert {update: set(batch) for update, batch in found.items()} == {n: set(b) for n, b in expected.items()}


@pytest.mark.parametrize(
    ("script", "change", "reason"),
    [
        ("train_lm", {"per_device_train_batch_size": 2}, "samples_per_update was 4, is 2.*here are 1 process"),
        ("finetune_lora", {"num_scenes": 20}, "dataset_size was 16, is 20"),
        ("train_lm", {"seed": 1}, "seed was 42, is 1"),
        (
            "train_tokenizer",
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps was 1, is 2",
        ),
    ],
)
def test_other_samples_would_follow(monkeypatch, tmp_path, script, change, reason):
    """Regression: `Trainer` skips as many updates, whatever their size, and loses samples or takes them twice."""
    main = example(monkeypatch, script)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    main(command(script, tmp_path, **options))
    assert json.loads((tmp_path / "out" / "checkpoint-1" / "run.json").read_text())["samples_per_update"] == 4
    options |= {"resume_from_checkpoint": "latest", "max_steps": 2, **change}
    with pytest.raises(ValueError, match=f"checkpoint-1 belongs to another run .{reason}"):
        main(command(script, tmp_path, **options))
    if script == "train_tokenizer":  # it is not about samples
        with pytest.raises(ValueError, match=reason):
            main(command(script, tmp_path, **options, ignore_data_skip=True))
    else:
        assert main(command(script, tmp_path, **options, ignore_data_skip=True)).state.global_step == 2


@pytest.mark.parametrize("ignore_data_skip", [False, True])
def test_phases_of_stage_1_stay(monkeypatch, tmp_path, ignore_data_skip):
    """Regression: shares followed from the number of updates of the resumed run, which bypassed the merger again."""
    main = example(monkeypatch, "train_tokenizer")
    shares = {"bypass_merger_steps": 0.2, "selector_steps": 0.2, "quantize_after_steps": 0.4}
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 5, **shares}
    main(command("train_tokenizer", tmp_path, **options))
    options |= {"resume_from_checkpoint": "latest", "max_steps": 10, "ignore_data_skip": ignore_data_skip}
    with pytest.raises(ValueError, match="quantize_after_steps was 2, is 4.*resume with the same --max_steps"):
        main(command("train_tokenizer", tmp_path, **options))
    limits = {"bypass_merger_steps": 1, "selector_steps": 1, "quantize_after_steps": 2}
    assert main(command("train_tokenizer", tmp_path, **options | limits)).state.global_step == 10


def test_streamed_stage_1_has_as_many_forward_passes_in_an_update(monkeypatch, tmp_path):
    """Regression: of streams nothing was compared, as other samples may follow there."""
    main = example(monkeypatch, "train_tokenizer")
    options = {"streaming": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    main(command("train_tokenizer", tmp_path, **options))
    options |= {"resume_from_checkpoint": "latest", "max_steps": 2}
    with pytest.raises(ValueError, match="gradient_accumulation_steps was 1, is 2"):
        main(command("train_tokenizer", tmp_path, **options, gradient_accumulation_steps=2))
    resumed = main(command("train_tokenizer", tmp_path, **options, per_device_train_batch_size=2))
    assert resumed.state.global_step == 2


@pytest.mark.parametrize("script", ["train_tokenizer", "train_lm", "finetune_lora"])
def test_a_new_run_does_not_mix_with_an_old_one(monkeypatch, tmp_path, script):
    """Regression: only stage 3 refused it; `latest` went on with either run, whose checkpoints replaced each other."""
    main = example(monkeypatch, script)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    main(command(script, tmp_path, **options))
    (tmp_path / "out" / "checkpoint-9").mkdir()  # of a run that is writing it
    with pytest.raises(FileExistsError, match="out holds checkpoints of another run .checkpoint-1.*or choose another"):
        main(command(script, tmp_path, **options))
    assert (tmp_path / "out" / "checkpoint-9").is_dir()
    options |= {"resume_from_checkpoint": "latest", "max_steps": 2}
    assert main(command(script, tmp_path, **options)).state.global_step == 2


def test_an_update_of_as_many_samples_follows_however_it_is_divided(monkeypatch, tmp_path, uninterrupted):
    main = example(monkeypatch, "train_lm")
    options = {"save_strategy": "steps", "save_steps": 3, "resume_from_checkpoint": "latest"}
    main(command("train_lm", tmp_path, **options))
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    main(command("train_lm", tmp_path, **options))
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted("train_lm")), abs=1e-5)


def test_stage_1_is_not_sharded(monkeypatch, tmp_path):
    main = example(monkeypatch, "train_tokenizer")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit, match="Stage 1 is not for FSDP and DeepSpeed"):
        main(command("train_tokenizer", tmp_path))
    model = torch.nn.Linear(2, 2)
    VisualTokenizerCallback().on_train_begin(None, None, None, model=model)
    model.weight.ds_id = 0  # of ZeRO-3
    with pytest.raises(ValueError, match="Stage 1 is not for FSDP and DeepSpeed"):
        VisualTokenizerCallback().on_train_begin(None, None, None, model=model)


@pytest.mark.parametrize(
    ("plugin", "precision", "reason"),
    [
        ({}, "bf16", r"selector\..* would be sharded, and compute in bf16.*Set fsdp_ignored_modules"),
        ({"ignored_modules": r".*\.(selector|quantizer)", "fsdp_version": 1}, "no", "Only FSDP2"),
        ({"ignored_modules": r".*(selector|lm_head)"}, "bf16", r"lm_head.weight learns, but fsdp_ignored_modules"),
        ({"ignored_modules": r".*lm_head"}, "no", r"lm_head.weight learns, but fsdp_ignored_modules"),
        ({"ignored_modules": r".*\.(selector|quantizer)"}, "bf16", None),
        ({}, "no", None),
    ],
)
def test_sharding_that_would_go_wrong_in_silence(tmp_path, plugin, precision, reason):
    trainer = build_trainer(tmp_path)
    values = {"fsdp_version": 2, "ignored_modules": None, **plugin}
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**values)), mixed_precision=precision
    )
    if reason is None:
        require_sound_sharding(trainer.model, accelerator)
    else:
        with pytest.raises(ValueError, match=reason):
            require_sound_sharding(trainer.model, accelerator)
