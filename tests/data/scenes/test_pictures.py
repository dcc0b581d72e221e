"""Pictures show what their scenes say, are labeled patch by patch, and are read back without a model."""

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from lavit_hf.data.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    UNKNOWN,
    Scene,
    SceneObject,
    facts_of,
    judge,
    object_coverage,
    render,
    sample_scene,
)
from lavit_hf.data.scenes.pictures import NO_SHAPE, NO_SIZE, label_patches


def single(shape: str, size: str = "large", x: int = 30, y: int = 34) -> Scene:
    return Scene("gray", (SceneObject(shape, "blue", size, x, y),))


def test_colors_are_those_of_the_palette() -> None:
    for index in range(20):
        scene = sample_scene("train", 0, index)
        pixels = np.asarray(render(scene))
        coverage = object_coverage(scene)
        assert (pixels[coverage.sum(axis=0) == 0] == BACKGROUNDS[scene.background]).all()
        for item, mask in zip(scene.objects, coverage, strict=True):
            assert (pixels[mask == 1] == COLORS[item.color]).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_objects_fill_their_size_and_are_not_small(shape: str, size: str) -> None:
    scene = single(shape, size)
    (mask,) = object_coverage(scene) > 0
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    half = SIZES[size] // 2
    assert (rows[0], rows[-1], columns[0]) == (34 - half, 33 + half, 30 - half)
    assert columns[-1] == 29 + half or shape == "moon"
    assert mask.sum() > 140
    # Wherever it stands, it is part of three patches of 8 x 8 pixels in each direction.
    for x in range(28, 36):
        for y in range(28, 36):
            (mask,) = object_coverage(single(shape, size, x, y)) > 0
            patches = mask.reshape(8, 8, 8, 8).any(axis=(1, 3))
            assert patches.any(axis=0).sum() >= 3 - (shape == "moon") and patches.any(axis=1).sum() >= 3
            assert patches.sum() >= 5


def test_resolution_does_not_matter() -> None:
    scene = sample_scene("train", 0, 4)
    small = np.asarray(render(scene, 64), dtype=float)
    for factor in (2, 3):
        large = np.asarray(render(scene, 64 * factor), dtype=float)
        averaged = large.reshape(64, factor, 64, factor, 3).mean(axis=(1, 3))
        assert np.abs(averaged - small).max() < 40 and np.abs(averaged - small).mean() < 0.5
    assert render(scene, 50).size == (50, 50)
    assert object_coverage(scene, 50).shape == (len(scene.objects), 50, 50)


def test_same_pixels_everywhere() -> None:
    pixels = b"".join(np.asarray(render(sample_scene("train", 0, index))).tobytes() for index in range(10))
    assert hashlib.sha256(pixels).hexdigest()[:16] == "df33e0dec49bb3d2"


def test_moving_an_object_moves_its_pixels() -> None:
    here, there = (object_coverage(single("moon", x=x, y=y))[0] for x, y in ((30, 34), (33, 30)))
    np.testing.assert_array_equal(np.roll(here, (-4, 3), axis=(0, 1)), there)


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="at least 16, got 8"):
        render(single("ring"), 8)
    with pytest.raises(ValueError, match="'unknown' cannot be drawn"):
        render(single("unknown"))
    assert object_coverage(Scene("white", ())).shape == (0, 64, 64)


SCENE = Scene("gray", (SceneObject("ring", "red", "small", 16, 16), SceneObject("moon", "cyan", "large", 48, 16)))


def test_labels_of_a_scene() -> None:
    labels = label_patches(SCENE, 8)
    shapes = labels.shape.reshape(8, 8)
    assert shapes[1, 1] == shapes[2, 2] == SHAPES.index("ring")  # in its hole
    assert shapes[1, 5] == SHAPES.index("moon")
    assert (shapes[4:] == NO_SHAPE).all() and (labels.size.reshape(8, 8)[4:] == NO_SIZE).all()
    assert labels.color[labels.is_object].min() >= 0
    assert set(labels.color[~labels.is_object]) == {len(COLORS) + list(BACKGROUNDS).index("gray")}
    assert set(labels.size[labels.shape == SHAPES.index("moon")]) == {list(SIZES).index("large")}


def test_offsets_point_at_the_middle() -> None:
    labels = label_patches(SCENE, 8)
    middles = (np.stack(np.meshgrid(np.arange(8), np.arange(8)), axis=-1).reshape(-1, 2) + 0.5) / 8
    pointed_at = (middles + labels.offset)[labels.shape == SHAPES.index("ring")]
    assert np.allclose(pointed_at, 16 / 64)
    assert not labels.offset[~labels.is_object].any()


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_labels_follow_what_is_drawn(split: str) -> None:
    for index in range(50):
        scene = sample_scene(split, 3, index)
        labels = label_patches(scene, 8)
        cover = object_coverage(scene).reshape(-1, 8, 8, 8, 8).mean(axis=(2, 4)).reshape(-1, 64)
        strongest = cover.argmax(axis=0)
        for patch in np.flatnonzero(cover.max(axis=0) > 0.5):
            item = scene.objects[strongest[patch]]
            assert SHAPES[labels.shape[patch]] == item.shape and list(COLORS)[labels.color[patch]] == item.color


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
