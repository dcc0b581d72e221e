"""A disk that is full, or must not be written, ends a script with one line."""

import importlib
import subprocess
from pathlib import Path

import pytest
import yaml

from tiny_parts import CHECKPOINT

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# Runs a script whose files cannot grow beyond some bytes, as on a disk that fills up.
FULL_DISK = """
import os, resource, runpy, signal, sys

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


TRAINER = ["--dataset", "scenes", "--num_scenes", 8, "--max_steps", 2, "--save_steps", 1, "--use_cpu", True]
TRAINER += ["--per_device_train_batch_size", 2, "--report_to", "none"]
STAGE_2 = [*TRAINER, "--model", CHECKPOINT]
STAGE_3 = [*TRAINER, "--pixel_decoder", CHECKPOINT, "--visual_tokenizer", CHECKPOINT]


@pytest.mark.parametrize(
    ("script", "options", "obstacle"),
    [
        ("train_pixel_decoder", STAGE_3, "full disk"),
        ("train_pixel_decoder", STAGE_3, "no directory"),
        ("train_lm", STAGE_2, "full disk"),
        ("worlds/make_dataset", ["--num_rows", 200], "full disk"),
    ],
)
def test_one_line_instead_of_a_traceback(python, tmp_path, script, options, obstacle):
    pytest.importorskip("resource")
    (tmp_path / "file").write_text("")
    output = tmp_path / "out" if obstacle == "full disk" else tmp_path / "file" / "out"
    limit = 20_000 if obstacle == "full disk" else 2**40
    arguments = [EXAMPLES / f"{script}.py", *options, "--output_dir", output]
    command = [python, "-c", FULL_DISK, *map(str, [limit, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "could not be written: " in line]  # perhaps after a bar
    assert "error: " in line and line.endswith("goes on from the last complete one.")


SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_does_so(script):
    assert script.read_text(encoding="utf-8").endswith("    with exit_on_write_errors():\n        main()\n")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"../victim": {"script": "train_lm.py"}}, "'../victim' cannot be the name of a stage"),
        ({"a": {"script": "../evil.py"}}, "no script of these examples, but '../evil.py'"),
        ({"a": {"script": "/evil.py"}}, "no script of these examples, but '/evil.py'"),
        ({"a": {}}, "no script of these examples, but None"),
        ({"a": {"script": "train_lm.py/../../evil.py"}}, "no script of these examples"),
        ({"a": "train_lm.py"}, "no script of these examples, but None"),
        (["a"], "holds no stages"),
    ],
)
def test_recipes_stay_in_their_directories(monkeypatch, tmp_path, capsys, stages, message):
    monkeypatch.syspath_prepend(EXAMPLES)
    main = importlib.import_module("worlds.train").main
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(stages))
    with pytest.raises(SystemExit):
        main(["--recipe", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
