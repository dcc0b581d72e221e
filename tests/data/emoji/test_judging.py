"""The judge of pictures of emoji."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lavit_hf.data.emoji import UNKNOWN, Scene, SceneObject, facts_of, judge, load_pack, render, sample_scenes

NUM = 12  # scenes of each kind; the data card has numbers from many more


def jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=75)
    return Image.open(io.BytesIO(file.getvalue()))


def blur(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(0.8))


def noise(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture, dtype=float)
    pixels = pixels + np.random.default_rng(0).normal(0, 8, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def count_right(scenes: list[Scene], spoil=lambda picture: picture) -> int:
    return sum(facts_of(judge(spoil(render(scene)))) == facts_of(scene) for scene in scenes)


@pytest.mark.parametrize("split", ["validation", "held_out", "unseen_artist", "single"])
def test_true_pictures_are_read_right(split: str) -> None:
    assert count_right(sample_scenes(split, 7, np.arange(NUM)).to_scenes()) == NUM


@pytest.mark.parametrize("spoil", [jpeg, blur, noise, lambda picture: picture.resize((192, 192), 3)])
def test_spoiled_pictures_are_read_right(spoil) -> None:
    assert count_right(sample_scenes("validation", 7, np.arange(NUM)).to_scenes(), spoil) >= NUM - 1


def test_what_is_read_is_also_where_it_is() -> None:
    for scene in sample_scenes("validation", 8, np.arange(NUM)).to_scenes():
        for mine, its in zip(judge(render(scene)).objects, scene.objects, strict=True):
            assert abs(mine.x - its.x) <= 6 and abs(mine.y - its.y) <= 6 and abs(mine.side - its.side) <= 3


def likest_concept(item: SceneObject) -> str:
    """The other concept whose picture by the same artist is most alike."""
    pack = load_pack()
    number, artist = pack.concepts.index(item.concept), pack.artists.index(item.artist)
    small = pack.sprites[:, artist, ::3, ::3].astype(float)
    distance = ((small - small[number]) ** 2).sum(axis=(1, 2, 3))
    distance[number] = distance[~pack.is_drawn[:, artist]] = np.inf
    return pack.concepts[int(distance.argmin())]


@pytest.mark.parametrize("kind", ["other concept", "moved", "background", "missing", "extra"])
def test_wrong_pictures_are_not_accepted(kind: str) -> None:
    def to(item: SceneObject, place: str) -> SceneObject:
        row, column = place.split()
        x, y = (96 + 192 * (word in ("right", "bottom")) for word in (column, row))
        return replace(item, place=place, x=x, y=y)

    tried = 0
    for scene in sample_scenes("validation", 9, np.arange(40)).to_scenes():
        if len(scene.objects) != 2 or tried == 6:
            continue
        first, second = scene.objects
        free = [
            place for place in ("top left", "top right", "bottom left") if place not in (first.place, second.place)
        ]
        wrong = {
            "other concept": replace(scene, objects=(replace(first, concept=likest_concept(first)), second)),
            "moved": replace(scene, objects=(to(first, free[0]), second)),
            "background": replace(scene, background="gray" if scene.background != "gray" else "blue"),
            "missing": replace(scene, objects=(second,)),
            "extra": replace(scene, objects=(first, second, to(first, free[0]))),
        }[kind]
        tried += 1
        assert facts_of(judge(render(wrong))) != facts_of(scene)
    assert tried == 6


def test_pictures_of_nothing_in_particular() -> None:
    plain = judge(Image.new("RGB", (96, 96), (105, 165, 235)))
    assert (plain.background, plain.objects) == ("blue", ())
    assert judge(Image.new("RGB", (96, 96), (0, 0, 0))).background == UNKNOWN
    random = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    assert {item.concept for item in judge(Image.fromarray(random)).objects} <= {UNKNOWN}
    square = Image.new("RGB", (96, 96), (248, 248, 248))
    square.paste((20, 90, 30), (8, 8, 42, 42))
    assert len(judge(square).objects) == 1
    for size in ((1, 1), (300, 40)):
        judge(Image.new("L", size, 128))
