"""`lavit demo`: what it prints, and the picture it writes."""

import socket
import sys
from pathlib import Path

import pytest
from PIL import Image

from lavit_cli.demo_sheet import is_caption_right, is_drawing_right
from lavit_hf import default_checkpoint
from lavit_hf.data.scenes import PortableRng
from lavit_hf.data.worlds import WORLDS
from lavit_hf.hub.facts import world_of


def test_demo_of_a_picture(lavit, photo: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "demo.png"
    result = lavit("demo", "--image", photo, "--model", random_checkpoint, "--output", output)
    assert result.exit_code == 0, result.output
    assert "random numbers" in result.stdout
    assert "4 of 16 patches became tokens for understanding" in result.stdout
    assert "8 of 16 patches became tokens for drawing" in result.stdout
    budgets = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("Budget ")]
    assert budgets == ["1", "2", "4", "4", "16"]
    for label in ("Caption", "Question", "Answer", "Again", "Changed", "Budget", "Drawing", str(output)):
        assert label in result.stdout
    assert "(right)" not in result.stdout and "(wrong)" not in result.stdout  # nobody knows
    with Image.open(output) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 5 * 300
    assert list(output.parent.iterdir()) == [output]


def test_demo_without_pictures_shows_scenes(lavit, tmp_path: Path) -> None:
    output = tmp_path / "demo.png"
    result = lavit("demo", "--output", output)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    world = world_of(default_checkpoint())
    assert sum(line.startswith("Picture ") for line in lines) == len(world.splits) - 1  # all but that of training
    assert sum(line.startswith("Drawing ") for line in lines) == 4
    budgets = [line.split()[1] for line in lines if line.startswith("Budget ")]
    assert budgets[:3] == ["4", "8", "16"] and budgets[-1] == "64" and len(budgets) == 5
    for label in ("Caption", "Answer", "Again", "Changed", "Budget", "Drawing"):
        assert all(line.endswith(("(right)", "(wrong)")) for line in lines if line.startswith(label))
    assert output.is_file()


def test_demo_leaves_out_what_is_no_picture(lavit, photo: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    bad, output = tmp_path / "bad.png", tmp_path / "demo.webp"
    bad.write_text("not a picture")
    result = lavit("demo", "-i", bad, "-i", photo, "-i", bad, "-m", random_checkpoint, "-o", output)
    assert result.exit_code == 1
    assert result.stdout.count("\nPicture ") == 1 and str(photo) in result.stdout
    assert result.stderr.count("lavit: left out: ") == 2 and "2 of 3 images could not be read" in result.stderr
    with Image.open(output) as sheet:
        assert sheet.format == "WEBP"
    alone = lavit("demo", "-i", bad, "-m", random_checkpoint, "-o", tmp_path / "none.png")
    assert alone.exit_code == 1 and alone.stderr.count("\n") == 1 and not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("name", ["scenes", "emoji-small"])
def test_verdicts(name: str) -> None:
    world = WORLDS[name]
    scene, other = (world.sample_scene("validation", 0, index) for index in range(2))
    caption, wrong = (world.write_caption(shown, PortableRng(0, 0)) for shown in (scene, other))
    picture, facts = world.render(scene), world.facts_of(scene)
    assert is_caption_right(caption, facts, world) is True
    assert is_caption_right(wrong, facts, world) is False
    assert is_caption_right("a cat", facts, world) is False
    assert is_drawing_right(picture, facts, world) is True
    assert is_drawing_right(world.render(other), facts, world) is False
    assert is_caption_right(caption, None, None) is None and is_drawing_right(picture, None, None) is None


def test_only_a_card_that_says_so_makes_weights_random(lavit, photo: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = lavit("demo", "--image", photo, "--model", checkpoint, "--output", tmp_path / "demo.png")
    assert result.exit_code == 0, result.output
    assert "random" not in result.stdout


def test_unwritable_output(lavit, photo: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = lavit("demo", "-i", photo, "-m", random_checkpoint, "-o", tmp_path / "file" / "demo.png")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


def test_a_page_says_what_it_needs(lavit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "lavit_hf.web", raising=False)
    result = lavit("demo", "--web", "--port", "0")
    assert result.exit_code == 1 and "pip install 'lavit-hf[demo]'" in result.stderr


def test_a_page_does_not_take_the_port_of_others(lavit) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = lavit("demo", "--web", "--port", taken.getsockname()[1])
    assert result.exit_code == 1 and "Cannot listen at 127.0.0.1, port " in result.stderr
