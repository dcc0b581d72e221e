"""The command line as a whole: help, version, errors, interrupts."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lavit_cli.checks import find_checkpoint
from lavit_cli.errors import one_line
from lavit_hf import default_checkpoint
from zygote import Zygote

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    "caption",
    "ask",
    "draw",
    "reconstruct",
    "demo",
    "serve",
    "tokenize",
    "evaluate",
    "convert",
    "assemble",
    "merge",
    "plot",
    "plan-training",
    "publish",
    "export-llama",
]


_WITHOUT_DTYPE = ("assemble", "merge", "plot", "plan-training", "publish")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, lavit_cli\n"
        "try: lavit_cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'huggingface_hub', 'lavit_hf'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout or "Usage" in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_and_options(lavit, command: str) -> None:
    result = lavit(command, "--help")
    assert result.exit_code == 0
    assert f"lavit {command} " in result.stdout
    assert "Example" in result.stdout
    assert "--dtype" in result.stdout or command in _WITHOUT_DTYPE


def test_version(lavit) -> None:
    import lavit_hf

    assert lavit("--version").stdout == f"lavit-hf {lavit_hf.__version__}\n"


def test_installed_entry_point(photo: Path, random_checkpoint: Path) -> None:
    lavit = Path(sys.executable).parent / "lavit"
    result = subprocess.run([lavit, "caption", photo, "--model", random_checkpoint], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""


def corrupt_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def remove_processor(folder: Path) -> None:
    (folder / "processor_config.json").unlink()


def turn_into_adapters(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "user/base"}')


def change_model_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt_weights, "corrupt"),
        (drop_tensor, "lm_head.weight"),
        (reshape_tensor, "config.json does not fit the weights"),
        (remove_weights, "model.safetensors"),
        (remove_tokenizer, "token"),
        (remove_processor, "no processor_config.json: save the processor there, too"),
        (turn_into_adapters, "has no adapter_model.safetensors"),
        (change_model_type, "'llama'"),
        (break_config, "config.json"),
    ],
)
def test_broken_checkpoint(lavit, damage, message: str, photo: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(random_checkpoint, broken)
    damage(broken)
    assert_one_line_error(lavit("caption", photo, "--model", broken), message)


def test_wrong_paths(lavit, photo: Path, random_checkpoint: Path, original_dir: Path, tmp_path: Path) -> None:
    assert_one_line_error(lavit("caption", photo, "--model", tmp_path / "nowhere"), "does not exist")
    assert_one_line_error(lavit("caption", photo, "--model", tmp_path), "config.json")
    assert_one_line_error(lavit("caption", photo, "--model", photo), "not a directory")
    assert_one_line_error(lavit("caption", photo.parent, "--model", random_checkpoint), "is a directory; name the")
    assert_one_line_error(lavit("caption", photo, "--model", original_dir), "lavit convert")
    assert_one_line_error(lavit("caption", photo, "--model", "nobody/nothing"), "nobody/nothing")
    for command in (["caption"], ["ask", "Why?"], ["demo"]):
        image = ["--image"] if command == ["demo"] else []
        arguments = [command[0], *image, tmp_path / "no.png", *command[1:], "--model", random_checkpoint]
        assert_one_line_error(lavit(*arguments), "no.png")


def test_broken_image_is_named(lavit, photo: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    truncated, text = tmp_path / "truncated.jpg", tmp_path / "text.png"
    truncated.write_bytes(photo.read_bytes()[:5000])
    text.write_text("not a picture")
    for broken in (truncated, text):
        assert_one_line_error(lavit("caption", broken, "--model", random_checkpoint), broken.name)
        assert_one_line_error(lavit("ask", broken, "What?", "--model", random_checkpoint), broken.name)
    output = tmp_path / "a.png"
    result = lavit("draw", "a", "-i", text, "-i", photo, "-i", truncated, "-m", random_checkpoint, "-o", output)
    assert_one_line_error(result, "truncated.jpg")
    assert "text.png" in result.stderr and not output.exists()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_broken_images_among_others_are_left_out(
    lavit, photo: Path, random_checkpoint: Path, tmp_path: Path, batch_size: int
) -> None:
    bad = [tmp_path / "bad.jpg", tmp_path / "worse.png"]
    bad[0].write_bytes(photo.read_bytes()[:5000])
    bad[1].write_text("not a picture")
    command = ["caption", "--model", random_checkpoint, "--batch-size", batch_size]
    result = lavit(*command, photo, bad[0], photo, bad[1], photo)
    assert result.exit_code == 1
    caption = lavit(*command, photo).stdout
    assert result.stdout == f"{photo}\t{caption}" * 3
    first, second, last = result.stderr.splitlines()
    assert first.startswith(f"lavit: left out: {bad[0]}: ") and f"left out: Cannot read {bad[1]}" in second
    assert last == "lavit: error: 2 of 5 images could not be read."
    all_bad = lavit(*command, *bad)
    assert all_bad.exit_code == 1 and all_bad.stdout == "" and "2 of 2 images" in all_bad.stderr


def test_unusable_device(lavit, photo: Path, random_checkpoint: Path) -> None:
    for device in ("cuda:99", "abacus", "meta", "cuda:"):
        result = lavit("caption", photo, "-m", random_checkpoint, "--device", device)
        assert_one_line_error(result, f"--device {device} cannot be used: ")
        assert "devices are called cpu, cuda, cuda:1, mps or xpu" in result.stderr and len(result.stderr) < 250


def test_usage_errors_exit_with_2(lavit, photo: Path) -> None:
    for arguments in (
        ["caption"],
        ["ask", photo, "-m", "x"],
        ["draw", "a cat"],
        ["nothing"],
        ["convert", "--dtype", "int8"],
    ):
        result = lavit(*arguments)
        assert result.exit_code == 2
        assert "Usage" in result.stderr


@pytest.mark.parametrize("options", [["--seed", "-1"], ["--seed", str(2**70)], ["--guidance-scale", "-1"]])
def test_numbers_out_of_range_name_their_option(lavit, photo: Path, options: list[str]) -> None:
    result = lavit("reconstruct", photo, "-o", "a.png", *options)
    assert result.exit_code == 2 and options[0] in result.stderr


def test_the_checkpoint_that_comes_along_has_a_name(lavit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_checkpoint("lavit-emoji-small") == find_checkpoint(None) == default_checkpoint()
    monkeypatch.chdir(tmp_path)
    Path("lavit-emoji-small").mkdir()
    assert find_checkpoint("lavit-emoji-small") == "lavit-emoji-small"


def test_without_a_model_the_checkpoint_that_comes_along_is_used(lavit) -> None:
    result = lavit("caption", ROOT / "examples" / "images" / "scene.png")
    assert result.exit_code == 0, result.output
    assert "background" in result.stdout


def test_debug_shows_the_traceback(lavit, random_checkpoint: Path) -> None:
    result = lavit("--debug", "caption", "no.png", "--model", random_checkpoint)
    assert isinstance(result.exception, ValueError)


def test_unexpected_errors_name_their_type() -> None:
    assert one_line(RuntimeError("broken\n  badly")) == "RuntimeError: broken badly"
    assert one_line(AssertionError()) == "AssertionError"
    assert one_line(ValueError("a:\n" + "\n".join(map(str, range(9))))) == (
        "a: 0; 1; 2; 3; 4; and 4 more (lavit --debug shows all)"
    )


def test_interrupt(lavit, monkeypatch: pytest.MonkeyPatch, photo: Path) -> None:
    from lavit_cli import loading

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load", interrupt)
    result = lavit("caption", photo)
    assert result.exit_code == 130
    assert result.stderr == "lavit: interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupt_from_outside(zygote: Zygote, photo: Path, random_checkpoint: Path) -> None:
    command = [zygote.folder / "lavit", "caption", *[photo] * 2000, "--model", random_checkpoint, "--batch-size", "1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests may ignore it, as nohup and background jobs of a shell do, and so would the child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline().startswith(str(photo))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors.endswith("lavit: interrupted\n")
    assert "Traceback" not in errors


def assert_one_line_error(result, message: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("lavit: error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    assert message in result.stderr
    assert result.stdout == ""
