"""Measures the emoji world: how fast pictures are made and judged, and how often the judge is right.

    python benchmarks/emoji_world.py --num_scenes 500 --num_wrong 200

True pictures of every split have to be read fully right, also when they are spoiled as a decoder does it; wrong ones,
in which one thing differs from what is claimed, must not be. Seconds are those of one core.
"""

from __future__ import annotations

import argparse
import io
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageFilter

from lavit_hf.data.emoji import (
    BACKGROUNDS,
    PLACES,
    SPLITS,
    Facts,
    Scene,
    SceneObject,
    facts_of,
    judge,
    load_pack,
    render,
    render_scenes,
    sample_scenes,
    stream_batches,
)
from lavit_hf.data.emoji.sprites import scaled_sprites
from lavit_hf.data.emoji.world import visible_on
from lavit_hf.data.scenes import PortableRng

SEED = 77  # of scenes that nothing else uses


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_scenes", type=int, default=500, help="true pictures of each split")
    parser.add_argument("--num_spoiled", type=int, default=100, help="pictures of three splits for each way to spoil")
    parser.add_argument("--num_wrong", type=int, default=200, help="wrong pictures")
    parser.add_argument("--num_batches", type=int, default=16, help="batches of 256 pictures to make")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure_speed(args.num_batches)
    for split in SPLITS:
        scenes = sample_scenes(split, SEED, np.arange(args.num_scenes)).to_scenes()
        pictures = [render(scene) for scene in scenes]
        start = time.process_time()
        seen = [judge(picture) for picture in pictures]
        took = (time.process_time() - start) / args.num_scenes
        right = sum(facts_of(mine) == facts_of(its) for mine, its in zip(seen, scenes, strict=True))
        print(f"true, {split}: {right} of {args.num_scenes} right, {1000 * took:.0f} ms each", flush=True)
    for split, (name, spoil) in itertools.product(("validation", "unseen_artist", "single"), SPOIL.items()):
        right = count_right(sample_scenes(split, SEED + 1, np.arange(args.num_spoiled)).to_scenes(), spoil)
        print(f"{name}, {split}: {right} of {args.num_spoiled} right", flush=True)
    tried: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    for kind, claim, scene in itertools.islice(wrong_scenes(), args.num_wrong):
        tried[kind] += 1
        accepted[kind] += facts_of(judge(render(scene))) == claim
    print(f"wrong: {dict(accepted)} accepted of {dict(tried)}")


def measure_speed(num_batches: int) -> None:
    """Pictures and labels on one core."""
    for varied in (False, True):
        batches = stream_batches(batch_size=256, varied=varied)
        next(batches)  # reads sprites
        start = time.process_time()
        for _ in range(num_batches):
            next(batches)
        rate = 256 * num_batches / (time.process_time() - start)
        print(f"{rate:.0f} pictures with labels a second, {'with' if varied else 'without'} other looks")
    start = time.process_time()
    scenes = sample_scenes("train", 0, np.arange(256 * num_batches))
    middle = time.process_time()
    render_scenes(scenes)
    rates = [256 * num_batches / took for took in (middle - start, time.process_time() - middle)]
    print(f"{rates[0]:.0f} scenes drawn at random a second, {rates[1]:.0f} pictures rendered", flush=True)
    judge(render(scenes.to_scenes()[0]))  # makes templates


def count_right(scenes: list[Scene], spoil: Callable[[Image.Image], Image.Image]) -> int:
    """How many scenes are read fully right from spoiled pictures."""
    return sum(facts_of(judge(spoil(render(scene)))) == facts_of(scene) for scene in scenes)


def compress(quality: int) -> Callable[[Image.Image], Image.Image]:
    """JPEG of some quality."""

    def spoil(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(io.BytesIO(file.getvalue()))

    return spoil


def blur(radius: float, noise: float = 0.0) -> Callable[[Image.Image], Image.Image]:
    """Gaussian blur, then noise."""

    def spoil(picture: Image.Image) -> Image.Image:
        pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), dtype=float)
        pixels = pixels + np.random.default_rng(0).normal(0, noise, pixels.shape)
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    return spoil


SPOIL = {
    "JPEG 75": compress(75),
    "JPEG 50": compress(50),
    "blur 1": blur(1),
    "noise 10": blur(0, 10),
    "blur 0.7 and noise 5": blur(0.7, 5),
    "half the resolution": lambda picture: picture.resize((48, 48), 4).resize((96, 96), 2),
}


def wrong_scenes() -> Iterator[tuple[str, Facts, Scene]]:
    """What is wrong, what is claimed, and the scene that is shown."""
    for number in itertools.count():
        split = ("validation", "unseen_artist")[number % 2]
        (scene,) = sample_scenes(split, SEED + 2, [number]).to_scenes()
        rng = PortableRng(SEED, number)
        item = rng.choice(scene.objects)
        kind = ("concept", "background", "moved", "missing", "extra")[number % 5]
        free = [place for place in PLACES[:4] if place not in {one.place for one in scene.objects}]
        if kind == "concept":
            wrong = exchange(scene, item, replace(item, concept=likest_concept(scene, item)))
        elif kind == "background":
            wrong = replace(scene, background=rng.choice([name for name in BACKGROUNDS if name != scene.background]))
        elif item.place == "middle" or len(scene.objects) == {"missing": 1, "extra": 3}.get(kind):
            continue
        elif kind == "moved":
            wrong = exchange(scene, item, move(item, rng.choice(free)))
        elif kind == "missing":
            wrong = replace(scene, objects=tuple(one for one in scene.objects if one != item))
        else:
            wrong = replace(scene, objects=(*scene.objects, move(item, rng.choice(free))))
        yield kind, facts_of(scene), wrong


def exchange(scene: Scene, item: SceneObject, other: SceneObject) -> Scene:
    """The scene with another object instead of one."""
    return replace(scene, objects=tuple(other if one == item else one for one in scene.objects))


def move(item: SceneObject, place: str) -> SceneObject:
    """The object in another quarter."""
    (row, column), (new_row, new_column) = (divmod(PLACES.index(name), 2) for name in (item.place, place))
    return replace(item, place=place, x=item.x + 192 * (new_column - column), y=item.y + 192 * (new_row - row))


def likest_concept(scene: Scene, item: SceneObject) -> str:
    """The other concept whose picture by the same artist is most alike."""
    pack = load_pack()
    number, artist = pack.concepts.index(item.concept), pack.artists.index(item.artist)
    sprites = scaled_sprites(24)[:, artist].float().flatten(1)
    distance = (sprites - sprites[number]).square().sum(dim=1).numpy()
    is_possible = visible_on()[:, artist, list(BACKGROUNDS).index(scene.background)] & pack.is_drawn[:, artist]
    is_possible[number] = False
    return pack.concepts[int(np.where(is_possible, distance, np.inf).argmin())]


if __name__ == "__main__":
    main()
