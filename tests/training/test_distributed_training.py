"""Two processes give what one gives with batches twice as large."""

import json
import socket
import subprocess

import torch

from training import tiny_training
from training.tiny_training import BATCH_SIZE, build_trainer, losses, script_environment


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_equal_one_with_twice_the_batch(python, tmp_path):
    """Rows without images leave parameters without gradient in one process and not in the other."""
    # Of a number that does not divide, accelerate would repeat samples.
    arguments = {"num_samples": 3 * BATCH_SIZE}
    options = {
        "output_dir": str(tmp_path),
        "arguments": {**arguments, "per_device_train_batch_size": BATCH_SIZE // 2},
    }
    # `--multi_gpu` is accelerate's name for its launcher of several processes; `--cpu` would start a single one.
    command = [python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), tiny_training.__file__, json.dumps(options)]
    run = subprocess.run(command, env=script_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "2 processes DistributedDataParallel" in run.stdout
    single = build_trainer(tmp_path / "single", **arguments)
    single.train()
    found = json.loads((tmp_path / "losses.json").read_text())
    assert len(found) == len(losses(single)) == 9
    torch.testing.assert_close(found, losses(single), atol=1e-5, rtol=1e-5)
    trained = type(single.model).from_pretrained(tmp_path).state_dict()
    for name, value in single.model.state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=1e-3, rtol=1e-3, msg=name)
