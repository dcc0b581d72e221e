"""`lavit demo`: what it prints, and the picture it writes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lavit_cli.demo_sheet import is_caption_right, is_drawing_right
from lavit_cli.pictures import grey_out_dropped, save_picture
from lavit_hf.data.scenes import facts_of, render, sample_scene
from lavit_hf.data.scenes.language import captions_of
from lavit_hf.utils.contact_sheet import Panel, contact_sheet


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
    assert sum(line.startswith("Picture ") for line in lines) == 3
    assert sum(line.startswith("Drawing ") for line in lines) == 4
    budgets = [line.split()[1] for line in lines if line.startswith("Budget ")]
    assert [int(count) for count in budgets] == [4, 8, 16, 25, 64]
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


def test_verdicts() -> None:
    scene = sample_scene("validation", 0, 0)
    caption, facts = captions_of(scene)[0], facts_of(scene)
    assert is_caption_right(caption, facts) is True
    assert is_caption_right(captions_of(sample_scene("validation", 0, 1))[0], facts) is False
    assert is_caption_right("a cat", facts) is False
    assert is_drawing_right(render(scene), facts) is True
    assert is_drawing_right(render(sample_scene("validation", 0, 1)), facts) is False
    assert is_caption_right(caption, None) is None and is_drawing_right(render(scene), None) is None


def test_long_titles_are_wrapped() -> None:
    pictures = [Image.new("RGB", (100, 50), color) for color in ("red", "blue")]
    short = contact_sheet([[Panel("a", pictures[0])]])
    long = contact_sheet([[Panel("a title that does not fit into one line", pictures[0]), Panel("b", pictures[1])]])
    assert long.height > short.height and long.width > 200
    pixels = np.asarray(long)
    assert (pixels == (255, 0, 0)).all(-1).sum() == (pixels == (0, 0, 255)).all(-1).sum() == 100 * 50


def test_only_a_card_that_says_so_makes_weights_random(lavit, photo: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = lavit("demo", "--image", photo, "--model", checkpoint, "--output", tmp_path / "demo.png")
    assert result.exit_code == 0, result.output
    assert "random" not in result.stdout


def test_unwritable_output(lavit, photo: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = lavit("demo", "-i", photo, "-m", random_checkpoint, "-o", tmp_path / "file" / "demo.png")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("size", [(56, 56), (300, 218), (9, 5), (1, 1)])
def test_only_dropped_patches_are_greyed(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (255, 0, 0))
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    result = np.asarray(grey_out_dropped(image, mask.flatten(), (2, 4)))
    assert result.shape == (size[1], size[0], 3)
    if min(size) > 8:
        centers = [
            [result[int((row + 0.5) * size[1] / 2), int((column + 0.5) * size[0] / 4)] for column in range(4)]
            for row in range(2)
        ]
        assert np.array_equal((np.array(centers) == (255, 0, 0)).all(-1), mask.numpy())
    assert np.asarray(image).min() == 0  # the given picture is not drawn on


def test_nothing_dropped_changes_nothing(photo: Path) -> None:
    image = Image.open(photo)
    assert grey_out_dropped(image, torch.ones(16, dtype=torch.bool), (4, 4)).tobytes() == image.tobytes()


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self, file, **kwargs) -> None:
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    sheet = contact_sheet([[Panel("a", Image.new("RGB", (20, 10)))]])
    with pytest.raises(OSError, match="No space left"):
        save_picture(sheet, tmp_path / "demo.png")
    assert list(tmp_path.iterdir()) == []
