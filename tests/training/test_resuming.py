"""A run that goes on in other numbers of processes is the run that was not interrupted: losses, and samples."""

import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples.test_interruptions import STAGES
from tiny_parts import CHECKPOINT
from training import counted_training
from training.tiny_training import script_environment

ROOT = Path(__file__).parents[2]
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
CASES += [("train_lm", "sharded"), ("train_lm", "full"), ("finetune_lora", "sharded"), ("finetune_lora", "full")]


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
    values = {**COMMON, **OPTIONS[script], "output_dir": folder / "out", **options}
    command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command += ["--max-restarts", str(restarts), counted_training.__file__]
    command += [json.dumps({"notes": str(folder / "notes"), **(noted or {})}), str(ROOT / "examples" / f"{script}.py")]
    command += [part for name, value in values.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, **script_environment(), **WAYS[way]}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


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
