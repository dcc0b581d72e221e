"""What is refused before torch is imported, and shell completion."""

import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lavit_cli import checks

# `lavit` that tells what it has imported by the time it gives up.
TELLING = (
    "import sys, lavit_cli\n"
    "try: lavit_cli.main()\n"
    "except SystemExit as error: code = error.code\n"
    "print({'torch', 'transformers', 'numpy', 'PIL', 'huggingface_hub', 'lavit_hf'} & set(sys.modules))\n"
    "sys.exit(code)"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "{photo}", "-m", "no/such/folder"], "no/such/folder does not exist; --model takes"),
        (["caption", "{photo}", "missing.png"], "missing.png: no such image file"),
        (["ask", "missing.png", "What?"], "missing.png: no such image file"),
        (["ask", "{photo}", "What?", "-m", "{empty}"], "has no readable config.json"),
        (["draw", "a", "-o", "{empty}", "-m", "no/such/folder"], "is a directory"),
        (["draw", "a", "-o", "{empty}/a.txt"], "the suffix says the format"),
        (["draw", "a", "-o", "{file}/b/a.png"], "is no directory that you may write to"),
        (["draw", "a", "-o", "a.png", "-i", "missing.png"], "missing.png: no such image file"),
        (["reconstruct", "{photo}", "-o", "{file}/a.png"], "is no directory that you may write to"),
        (["demo", "-o", "{empty}"], "is a directory"),
        (["demo", "-i", "missing.png"], "missing.png: no such image file"),
        (["demo", "--web", "--prompt", "a dog"], "--prompt goes with pictures of yours: give --image, too."),
        (["tokenize", "nowhere.jsonl", "out"], "nowhere.jsonl does not exist"),
        (["tokenize", "./nowhere", "out"], "./nowhere does not exist"),
        (["tokenize", "{empty}", "{file}"], "is a file; name a directory to write to"),
        (["tokenize", "{empty}", "out", "-m", "{file}"], "is not a directory"),
        (["evaluate", "no/such/one", "-t", "vqa", "--data", "scenes", "-o", "out"], "no/such/one does not exist"),
        (["evaluate", "x/y", "-t", "vqa", "--data", "a/b/c", "-o", "out"], "a/b/c does not exist"),
        (["evaluate", "x/y", "-t", "vqa", "--data", "scenes", "-o", "{file}/out"], "you may write to"),
        (
            ["evaluate", "x/y", "-t", "vqa", "--data", "scenes", "--clip", "no", "-o", "out"],
            "--clip takes a directory",
        ),
        (["convert", "nowhere", "out"], "nowhere does not exist"),
        (["convert", "{empty}", "{file}/out"], "you may write to"),
        (["convert", "--plan", "nowhere.json"], "nowhere.json does not exist"),
        (["export-llama", "{empty}", "{file}"], "is a file"),
        (["export-llama", "no/such", "out"], "no/such does not exist; CHECKPOINT takes a directory"),
        (["publish", "no/such", "me/lavit"], "no/such does not exist; CHECKPOINT takes a directory"),
        (["assemble", "nowhere", "{empty}", "out"], "nowhere does not exist; LANGUAGE_MODEL takes a directory"),
        (["assemble", "{empty}", "{file}", "out"], "is not a directory; PIXEL_DECODER takes a directory"),
        (["merge", "nowhere", "out"], "nowhere does not exist"),
        (["merge", "{empty}", "{file}"], "is a file"),
    ],
)
def test_refused_before_torch_is_imported(arguments: list[str], message: str, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")
    names = {"photo": photo, "empty": tmp_path / "empty", "file": tmp_path / "file"}
    command = [sys.executable, "-c", TELLING, *(argument.format(**names) for argument in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr.startswith("lavit: error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.stdout == "set()\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.parametrize(
    "check", [checks.check_picture_output, checks.check_new_directory, checks.check_output_directory]
)
def test_directories_that_cannot_be_written(check) -> None:
    """Root may write to /proc, says the system, and cannot."""
    with pytest.raises(ValueError, match="cannot be written: /proc is no directory that you may write to"):
        check(Path("/proc/a.png"))


def test_a_full_disk_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files can still be made there, but not filled."""
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: FullFile())
    for name in ("a.png", "new/a.png"):
        with pytest.raises(ValueError, match=rf"{name} cannot be written: the disk of {tmp_path} is full"):
            checks.check_picture_output(tmp_path / name)
    for path in (tmp_path / "new" / "folder", tmp_path):
        with pytest.raises(ValueError, match=rf"^{path} cannot be written: the disk of {tmp_path} is full"):
            checks.check_output_directory(path)


class FullFile(io.BytesIO):
    def write(self, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_names_that_may_be_on_the_hub_are_left_to_it() -> None:
    checks.check_model("user/name")
    checks.check_data("user/name")
    checks.check_data("name")
    checks.check_source("user/name", "ADAPTER", or_repository=True)
    checks.check_pictures(["https://example.org/a.png", "data:image/png;base64,AAAA"])


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="no such image file"):
            checks.check_pictures([name])
        with pytest.raises(ValueError, match="does not exist"):
            checks.check_model(name)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    environment = {**os.environ, "_LAVIT_COMPLETE": f"source_{shell}"}
    result = subprocess.run([Path(sys.executable).parent / "lavit"], env=environment, capture_output=True, text=True)
    assert "_LAVIT_COMPLETE" in result.stdout, result.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_completion_of_commands_and_values() -> None:
    def complete(words: str) -> list[str]:
        environment = {
            **os.environ,
            "_LAVIT_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }
        lavit = Path(sys.executable).parent / "lavit"
        return subprocess.run([lavit], env=environment, capture_output=True, text=True).stdout.split()

    assert complete("lavit ca") == ["caption"]
    assert complete("lavit caption --dtype b") == ["bfloat16"]
