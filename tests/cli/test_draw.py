"""`lavit draw` and `lavit reconstruct`: pictures from prompts and from pictures."""

import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from lavit_hf.pipelines import LavitTextToImagePipeline

STEPS = ("--steps", 2)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size


def test_draw(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / "new" / f"{name}.png" for name in "abc")
    for path, seed in ((first, 3), (second, 3), (third, 4)):
        result = lavit("draw", "a cat", "-m", random_checkpoint, "-o", path, "--seed", seed, *STEPS)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"Wrote {path} (64 x 64 pixels, seed {seed})\n"
    assert size_of(first) == (64, 64)
    assert first.read_bytes() == second.read_bytes() != third.read_bytes()
    assert sorted(first.parent.iterdir()) == [first, second, third]


def test_a_printed_seed_draws_the_same_again(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    seed = lavit("draw", "a", "-m", random_checkpoint, "-o", first, *STEPS).stdout.split()[-1].rstrip(")")
    assert lavit("draw", "a", "-m", random_checkpoint, "-o", second, "--seed", seed, *STEPS).exit_code == 0
    assert first.read_bytes() == second.read_bytes()


def test_draw_after_pictures(lavit, photo: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    options = ["--aspect-ratio", "16:9", "--decoder", "lowres", "--seed", 0, *STEPS]
    with_picture, without = tmp_path / "with.png", tmp_path / "without.png"
    result = lavit("draw", "a", "-m", random_checkpoint, "-o", with_picture, "-i", photo, "--image", photo, *options)
    assert result.exit_code == 0, result.output
    assert size_of(with_picture) == (80, 48)
    lavit("draw", "a", "-m", random_checkpoint, "-o", without, *options)
    assert with_picture.read_bytes() != without.read_bytes()


def test_a_disk_that_fills_up(lavit, random_checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    result = lavit("draw", "a", "-m", random_checkpoint, "-o", tmp_path / "a.png", *STEPS)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert f"lavit: error: {tmp_path / 'a.png'} could not be written: No space left on device." in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".jpg", "JPEG"), (".JPEG", "JPEG"), (".webp", "WEBP"), (".tif", "TIFF"), (".bmp", "BMP")]
)
def test_the_suffix_says_the_format(lavit, random_checkpoint: Path, tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"a{suffix}"
    result = lavit("draw", "a", "-m", random_checkpoint, "-o", path, "--seed", 0, *STEPS)
    assert result.exit_code == 0, result.output
    with Image.open(path) as picture:
        assert picture.format == kind and picture.size == (64, 64)
    assert list(tmp_path.iterdir()) == [path]


def test_a_pixel_decoder_of_other_codes_is_refused(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(random_checkpoint, folder)
    path = folder / "token_decoder" / "model.safetensors"
    weights = load_file(path)
    weights["codebook.weight"] = weights["codebook.weight"].flip(0).contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    result = lavit("draw", "a", "-m", folder, "-o", tmp_path / "a.png", *STEPS)
    assert result.exit_code == 1 and "the codes of another visual tokenizer" in result.stderr
    assert lavit("draw", "a", "-m", folder, "-o", tmp_path / "a.png", "--decoder", "lowres", *STEPS).exit_code == 0


def test_reconstruct(lavit, photo: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "again.png"
    result = lavit("reconstruct", photo, "-m", random_checkpoint, "-o", path, "--seed", 1, *STEPS)
    assert result.exit_code == 0, result.output
    assert size_of(path) == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["draw", "a", "-o", "a.heic"],
            "has to be one of .png, .jpg, .jpeg, .webp, .tif, .tiff, .bmp; for example a.png",
        ),
        (["reconstruct", "missing.png", "-o", "a"], "missing.png: no such image file"),
        (["draw", "a", "-o", "{folder}/folder.png"], "is a directory"),
        (["draw", "a", "-o", "{folder}/a.png", "--aspect-ratio", "5:1"], "`aspect_ratio` must be one of 1:1"),
        (["draw", "a", "-o", "{folder}/a.png", "-i", "missing.png"], "missing.png: no such image file"),
        (["draw", " ", "-o", "{folder}/a.png"], "The prompt is empty"),
        (["draw", "a", "-o", f"{__file__}/a.png"], "cannot be written"),
        (["draw", "an <image>", "-o", "{folder}/a.png"], "which stands for an image"),
        (["reconstruct", "missing.png", "-o", "{folder}/a.png"], "missing.png: no such image file"),
    ],
)
def test_errors_are_one_line(lavit, random_checkpoint: Path, tmp_path: Path, arguments, message) -> None:
    (tmp_path / "folder.png").mkdir()
    command, *rest = (argument.format(folder=tmp_path) for argument in arguments)
    result = lavit(command, *rest, "-m", random_checkpoint)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_checkpoint_without_a_pixel_decoder(lavit, checkpoint: Path, model, processor, tmp_path: Path) -> None:
    folder = tmp_path / "text-only"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    result = lavit("draw", "a", "-m", folder, "-o", tmp_path / "a.png")
    assert result.exit_code == 1
    assert "cannot draw" in result.stderr
    assert not (tmp_path / "a.png").exists()


def test_interrupting_leaves_no_file(
    lavit, random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self, file, **kwargs) -> None:
        file.write(b"half a picture")
        raise KeyboardInterrupt

    path = tmp_path / "a.png"
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupt)
        assert lavit("draw", "a", "-m", random_checkpoint, "-o", path, *STEPS).exit_code == 130
    monkeypatch.setattr(LavitTextToImagePipeline, "generate_codes", _interrupted)
    assert lavit("draw", "a", "-m", random_checkpoint, "-o", path, *STEPS).exit_code == 130
    assert list(tmp_path.iterdir()) == []


def _interrupted(*args, **kwargs) -> None:
    raise KeyboardInterrupt


def test_compiling_needs_a_gpu(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    result = lavit("draw", "a cat", "-m", random_checkpoint, "-o", tmp_path / "a.png", "--compile", "--device", "cpu")
    assert result.exit_code == 1
    assert result.output == (
        "lavit: error: --compile cannot be used on cpu: it needs a CUDA device, with Triton and a C compiler such as "
        "gcc.\n"
    )
