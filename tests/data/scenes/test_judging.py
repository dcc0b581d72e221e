"""Pictures are read back, also if a model drew them."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from lavit_hf.data.scenes import COLORS, UNKNOWN, Scene, facts_of, judge, render, sample_scene

SCENES = [sample_scene(split, 9, index) for split in ("train", "held_out") for index in range(100)]
RED = (220, 45, 45)


def test_ground_truth_is_read_exactly() -> None:
    assert sum(judge(render(scene)) == scene for scene in SCENES) >= 0.99 * len(SCENES)


@pytest.mark.parametrize("image_size", [32, 48, 128, 224])
def test_other_resolutions(image_size: int) -> None:
    scenes = SCENES[::5]
    right = sum(facts_of(judge(render(scene, image_size))) == facts_of(scene) for scene in scenes)
    assert right >= (0.9 if image_size < 64 else 0.99) * len(scenes)


def blurred(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(1.2))


def noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    values = np.asarray(image) + rng.normal(0, 25, (*image.size, 3))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def tinted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    values = np.asarray(image) + rng.uniform(-25, 25, 3)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def autoencoded(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """At a PSNR of 25 dB: fewer pixels, blur, noise and blocks."""
    image = image.resize((32, 32), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC)
    values = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7))) + rng.normal(0, 10, (64, 64, 3))
    file = io.BytesIO()
    Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).save(file, format="JPEG", quality=60)
    return Image.open(file)


@pytest.mark.parametrize("damage", [blurred, noisy, tinted, autoencoded])
def test_damaged_pictures(damage) -> None:
    rng = np.random.default_rng(0)
    right = sum(facts_of(judge(damage(render(scene), rng))) == facts_of(scene) for scene in SCENES)
    assert right >= 0.98 * len(SCENES)


def draw(color=RED, background=(245, 245, 245)) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (64, 64), background)
    return image, ImageDraw.Draw(image)


def test_shapes_of_no_name() -> None:
    for points in (
        [(12, 22), (40, 22), (40, 30), (12, 30)],  # a bar
        [(20, 20), (48, 20), (34, 48)],  # a triangle on its head
        [(4, 4), (60, 4), (60, 60), (4, 60)],  # far too large a square
    ):
        image, pencil = draw()
        pencil.polygon(points, fill=RED)
        (found,) = judge(image).objects
        assert (found.shape, found.color) == (UNKNOWN, "red")


def test_objects_that_touch_are_not_two() -> None:
    image, pencil = draw()
    pencil.rectangle((10, 20, 30, 40), fill=RED)
    pencil.ellipse((31, 20, 51, 40), fill=(50, 80, 225))
    assert [item.shape for item in judge(image).objects] == [UNKNOWN]


def test_colors_of_no_name() -> None:
    image, pencil = draw(background=(90, 60, 200))
    pencil.rectangle((10, 10, 37, 37), fill=(120, 60, 0))
    scene = judge(image)
    assert scene.background == UNKNOWN
    assert [(item.shape, item.color, item.size) for item in scene.objects] == [("square", UNKNOWN, "large")]
    assert Scene.from_dict(scene.to_dict()) == scene


def test_specks_are_no_objects() -> None:
    image, pencil = draw()
    assert judge(image) == Scene("white", ())
    pencil.rectangle((10, 10, 13, 13), fill=RED)
    assert judge(image) == Scene("white", ())
    pencil.rectangle((40, 40, 48, 48), fill=RED)
    assert len(judge(image).objects) == 1


def recolored(scene: Scene, used: set[str]) -> list[Scene]:
    """The scene with one object in another color."""
    others = [color for color in COLORS if color not in used and color != scene.background]
    return [replace(scene, objects=(replace(scene.objects[0], color=color), *scene.objects[1:])) for color in others]


def test_wrong_pictures_are_called_wrong() -> None:
    """A judge that sees what it expects would be none."""
    scene = next(scene for scene in SCENES if len(scene.objects) == 2)
    image = render(scene)
    flips = [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM]
    # Left or above becomes right or below.
    assert any(facts_of(judge(image.transpose(flip))) != facts_of(scene) for flip in flips)
    colors = {item.color for item in scene.objects}
    assert all(facts_of(judge(render(other))) != facts_of(scene) for other in recolored(scene, colors))


def test_any_picture_is_read() -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(5)]
    pictures += [np.full((64, 64, 3), color, dtype=np.uint8) for color in (RED, (35, 185, 60), (0, 0, 255))]
    pictures.append(np.tile(np.arange(0, 256, 4, dtype=np.uint8)[:, None], (64, 1, 3)))
    for picture in pictures:
        scene = judge(picture)
        assert Scene.from_dict(scene.to_dict()) == scene
        assert all(item.shape == UNKNOWN for item in scene.objects)


def test_arrays_and_other_modes() -> None:
    image = render(SCENES[0])
    assert judge(np.asarray(image)) == judge(image.convert("RGBA")) == SCENES[0]
    with pytest.raises(ValueError, match="square, got 64 x 32"):
        judge(image.crop((0, 0, 64, 32)))
    with pytest.raises(ValueError, match="of uint8, got .* of float64"):
        judge(np.asarray(image) / 255)
    with pytest.raises(ValueError, match=r"got \[64, 64\]"):
        judge(np.zeros((64, 64), dtype=np.uint8))
