"""Options of a script from a YAML file and the command line."""

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import TrainingArguments

from lavit_hf.training import MixturePart, StreamArguments, parse_script_arguments

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = ["train_tokenizer", "train_lm", "train_pixel_decoder", "train_autoencoder", "finetune_lora"]
SCRIPTS += ["worlds/train_vision_encoder"]


@dataclass
class DataArguments:
    """Options of all kinds."""

    dataset: str = field(metadata={"help": "What to learn from."})
    rates: list[float] | None = None
    shuffle: bool = True
    limit: int | None = None
    mode: Literal["skip", "raise"] = "skip"
    widths: list[int] = field(default_factory=lambda: [1, 2])


def parse(tmp_path, content, *options):
    path = tmp_path / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    arguments = ["--config", str(path), "--output_dir", str(tmp_path / "out"), "--use_cpu", *options]
    return parse_script_arguments([DataArguments, TrainingArguments], arguments)


def test_the_command_line_goes_before_the_file_and_the_file_before_defaults(tmp_path):
    content = "dataset: a\nlearning_rate: 1e-5\nmax_steps: 7\nshuffle: false\nrates: [0.5, 1]\nlimit: null\n"
    data, args = parse(tmp_path, content, "--max_steps", "3")
    assert data == DataArguments("a", rates=[0.5, 1.0], shuffle=False)
    assert args.learning_rate == 1e-5 and args.max_steps == 3 and args.weight_decay == 0.0
    data, _ = parse(tmp_path, content, "--shuffle", "true", "--dataset", "b", "--limit", "4")
    assert data.shuffle and data.dataset == "b" and data.limit == 4
    data, _ = parse(tmp_path, {"dataset": "a"}, "--no_shuffle")
    assert not data.shuffle


def test_parts_of_a_mixture(tmp_path):
    def parse_mixture(content, *options):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return parse_script_arguments([StreamArguments], ["--config", str(path), *options])[0]

    content = {"mixture": [{"path": "a", "weight": 2, "text_column": "txt"}, "b"]}
    found = parse_mixture(content)
    assert found.mixture == [MixturePart("a", 2.0, text_column="txt"), MixturePart("b")] and found.is_used
    assert parse_mixture(content, "--mixture", "c", "d").mixture == [MixturePart("c"), MixturePart("d")]
    assert not parse_mixture({"shuffle_buffer": 4}).is_used


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"path": "a", "share": 2}, "recipe.yaml: mixture: 'share' is none of path, weight, split"),
        ({"path": "a", "weight": "two"}, "mixture: weight has to be a number; it is 'two'"),
        ({"weight": 2}, "mixture: {'weight': 2} lacks path"),
        (3, "mixture has to be a list, each item a mapping of path, weight, split"),
    ],
)
def test_a_part_that_is_none(tmp_path, capsys, part, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"mixture": [part]}))
    with pytest.raises(SystemExit):
        parse_script_arguments([StreamArguments], ["--config", str(path)])
    assert message in capsys.readouterr().err


def test_mappings_and_options_of_several_types(tmp_path):
    content = {
        "dataset": "a",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "report_to": "none",
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "bf16": False,
        "optim": "adamw_torch",
    }
    _, args = parse(tmp_path, content)
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert args.report_to == [] and args.lr_scheduler_type == "cosine" and args.optim == "adamw_torch"
    _, args = parse(tmp_path, {**content, "report_to": ["none"]})
    assert args.report_to == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "'learning_rat' is no option of this script. Did you mean learning_rate?"),
        ("config: a.yaml", "'config' is no option"),
        ("on: 1", "'True' is no option"),
        ("learning_rate: fast", "learning_rate has to be a number; it is 'fast'"),
        ("learning_rate: true", "learning_rate has to be a number; it is True"),
        ("max_steps: 1.5", "max_steps has to be a whole number; it is 1.5"),
        ("max_steps: true", "max_steps has to be a whole number"),
        ("max_steps: null", "max_steps has to be a whole number; it is empty"),
        ("dataset: 5", "dataset has to be text; it is 5"),
        ("shuffle: 1", "shuffle has to be true or false; it is 1"),
        ("widths: 3", "widths has to be a list, each item a whole number; it is 3"),
        ("widths: [1, x]", "widths has to be a list, each item a whole number; it is a list"),
        ("mode: ignore", "mode has to be one of skip, raise; it is 'ignore'"),
        ("limit: {a: 1}", "limit has to be a whole number or null; it is a mapping"),
        ("- dataset", "has to hold a YAML mapping, lines of `name: value`; it holds a list"),
        ("", "has to hold a YAML mapping, lines of `name: value`; it holds empty"),
        ("dataset: [", "is not readable as YAML"),
        ("[" * 5000, "is not readable as YAML"),
        ("max_steps: 1\nmax_steps: 2", "a name stands here twice"),
        ("dataset: !!python/object/apply:os.getcwd []", "is not readable as YAML"),
    ],
)
def test_what_is_wrong_is_said_with_the_files_name(tmp_path, capsys, content, message):
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, content, "--dataset", "a")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in line and str(tmp_path / "recipe.yaml") in line


def test_files_that_are_not_there_or_no_text(tmp_path, capsys):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, message in (("missing.yaml", "No such file"), ("binary.yaml", "is not readable as YAML")):
        with pytest.raises(SystemExit):
            parse_script_arguments([DataArguments], ["--config", str(tmp_path / name)])
        line = capsys.readouterr().err
        assert message in line and name in line


def test_what_is_required_is_still_asked_for(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, "max_steps: 1")
    assert "the following arguments are required: --dataset" in capsys.readouterr().err


def test_short_for_config_is_refused_and_not_ignored(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("dataset: a")
    with pytest.raises(SystemExit):
        parse_script_arguments([DataArguments], ["--conf", str(path), "--dataset", "b"])
    assert "write --config in full" in capsys.readouterr().err
    (data,) = parse_script_arguments([DataArguments], [f"--config={path}"])
    assert data.dataset == "a"


def test_help_shows_what_the_file_says(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, {"dataset": "of-the-file"}, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "of-the-file" in text and "--config FILE.yaml" in text


@pytest.fixture
def sdpa_backends():
    names = ["flash_sdp", "mem_efficient_sdp", "cudnn_sdp", "math_sdp"]
    before = {name: getattr(torch.backends.cuda, f"{name}_enabled")() for name in names}
    yield lambda: {name: getattr(torch.backends.cuda, f"{name}_enabled")() for name in names}
    for name, enabled in before.items():
        getattr(torch.backends.cuda, f"enable_{name}")(enabled)


def test_the_attention_of_the_process_is_chosen(tmp_path, sdpa_backends):
    before = sdpa_backends()
    parse(tmp_path, {"dataset": "a"})
    assert sdpa_backends() == before
    parse(tmp_path, {"dataset": "a", "sdpa_backend": "math"})
    assert [name for name, enabled in sdpa_backends().items() if enabled] == ["math_sdp"]
    query = torch.zeros(1, 1, 4, 8)
    with torch.profiler.profile() as profile:
        F.scaled_dot_product_attention(query, query, query)
    assert "aten::_scaled_dot_product_attention_math" in {event.key for event in profile.key_averages()}
    with pytest.raises(SystemExit):
        parse(tmp_path, {"dataset": "a"}, "--sdpa_backend", "fast")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_it(python, tmp_path, script):
    path = tmp_path / "recipe.yaml"
    path.write_text("no_such_option: 1\n")
    command = [python, str(EXAMPLES / f"{script}.py"), "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        f"{path}: 'no_such_option' is no option of this script. --help lists all options."
    )
