"""Worlds: made pictures of which a program tells what is true, to train and measure checkpoints on.

Whoever trains or evaluates on a world needs its name and this protocol alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from . import emoji, scenes

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]

IGNORED = -100  # a label that losses leave out


class LabeledPictures(NamedTuple):
    """Pictures, and what their patches show, in raster order.

    Attributes:
        scenes: What is on them.
        pixels: Bytes, `[batch, height, width, 3]`.
        classes: For each kind of label (`World.label_classes`) the label of every patch, `[batch, num_patches]`;
            `IGNORED` where it cannot be seen.
        offset: From the middle of the patch to that of its object, across and down, in sides of the picture,
            `[batch, num_patches, 2]`; 0 where there is none.
        is_object: Where there is an object, `[batch, num_patches]`.
    """

    scenes: Sequence[Any]
    pixels: np.ndarray
    classes: Mapping[str, np.ndarray]
    offset: np.ndarray
    is_object: np.ndarray


class World(Protocol):
    """A world of scenes: how they are drawn at random, shown, told, asked about, and read back from text and pixels.

    A scene and the facts about it are objects of the world's own; what is said here is all that others know of them.
    """

    @property
    def name(self) -> str:
        """Its name, as `--data`, `--dataset` and `--world` take it."""

    @property
    def image_size(self) -> int:
        """Width and height of its pictures."""

    @property
    def splits(self) -> Sequence[str]:
        """Names of its splits; the first is to be trained on, the second has other scenes of the same kind."""

    @property
    def label_classes(self) -> Mapping[str, int]:
        """How many classes each kind of label of patches has."""

    @property
    def fact_units(self) -> Mapping[str, str]:
        """For each part of its facts what is counted: scenes, objects, or relations."""

    def sample_scene(self, split: str, seed: int, index: int, /) -> Any:
        """Draws the scene with this index."""

    def scene_from_dict(self, values: Mapping[str, Any], /) -> Any:
        """Reads a row's `scene`."""

    def num_objects(self, scene: Any, /) -> int:
        """Counts the objects of a scene."""

    def object_area(self, scene: Any, /) -> float:
        """Computes which share of its picture the objects cover."""

    def render(self, scene: Any, /) -> Image.Image:
        """Draws a scene."""

    def labeled_pictures(
        self, split: str, seed: int, indices: np.ndarray, patches_per_side: int, is_varied: np.ndarray
    ) -> LabeledPictures:
        """Draws scenes and labels their patches; some in looks that no scene has, to learn more than those."""

    def row(self, split: str, seed: int, index: int, /) -> dict[str, Any]:
        """Makes a row: `image`, `text`, `questions` and `scene`."""

    def make_dataset(self, split: str, num_scenes: int, seed: int = 0) -> datasets.Dataset:
        """Makes the first rows of a split."""

    def write_caption(self, scene: Any, rng: scenes.PortableRng, /) -> str:
        """Writes one of a scene's captions."""

    def write_layout(self, scene: Any, rng: scenes.PortableRng | None = None, /) -> str:
        """Writes everything in the fewest words, in reading order or, with `rng`, in any."""

    def ask_questions(self, scene: Any, rng: scenes.PortableRng, /) -> Sequence[tuple[str, str, str]]:
        """Asks questions: with answer and kind; the last is for yes or no."""

    def change_scene(self, scene: Any, rng: scenes.PortableRng, /) -> tuple[str, Any, str]:
        """Returns words for a change, the scene after it, and which kind of change it is."""

    def redraw(self, scene: Any, artist: str, /) -> Any | None:
        """Returns the scene as that artist draws it; `None` if this cannot be.

        Raises:
            ValueError: There is no such artist.
        """

    def parse_caption(self, text: str, /) -> Any | None:
        """Reads facts from a caption; `None` if it is not worded as captions are."""

    def facts_of(self, scene: Any, /) -> Any:
        """Returns what can be said about a scene."""

    def judge(self, picture: Image.Image, /) -> Any:
        """Reads a scene from a picture, without any model."""

    def parts_of(self, facts: Any | None, /) -> dict[str, Sequence[Any]]:
        """Takes facts apart, for each of `fact_units` but the number of objects; `None` has no facts."""

    def make_texts(self, num_scenes: int) -> Iterable[str]:
        """Writes texts with all words that a language model of this world needs."""


class _Common:
    """What all worlds do alike, whatever their scenes are."""

    def make_texts(self: World, num_scenes: int) -> Iterable[str]:  # type: ignore[misc]
        for index in range(num_scenes):
            scene = self.sample_scene(self.splits[0], 0, index)
            rng = scenes.PortableRng(0, index)
            yield self.write_caption(scene, rng)
            for question, answer, _ in self.ask_questions(scene, rng):
                yield f"Question: {question} Answer: {answer}"
            yield self.write_layout(scene)
            yield self.change_scene(scene, rng)[0]


class SceneWorld(_Common):
    """Colored shapes, `lavit_hf.data.scenes`."""

    name = "scenes"
    image_size = 64
    splits = ("train", "validation", "held_out")
    label_classes = {
        "shape": len(scenes.SHAPES) + 1,
        "color": len(scenes.COLORS) + len(scenes.BACKGROUNDS),
        "size": len(scenes.SIZES) + 1,
    }
    fact_units = {
        "background": "scenes",
        "object_count": "scenes",
        "color": "objects",
        "shape": "objects",
        "size": "objects",
        "relation": "relations",
    }
    sample_scene = staticmethod(scenes.sample_scene)
    scene_from_dict = staticmethod(scenes.Scene.from_dict)
    render = staticmethod(scenes.render)
    row = staticmethod(scenes.scene_row)
    write_caption = staticmethod(scenes.write_caption)
    write_layout = staticmethod(scenes.write_layout)
    ask_questions = staticmethod(scenes.ask_questions)
    facts_of = staticmethod(scenes.facts_of)
    judge = staticmethod(scenes.judge)

    def make_dataset(self, split: str, num_scenes: int, seed: int = 0) -> datasets.Dataset:
        return scenes.make_scenes(split, num_scenes, seed)

    def change_scene(self, scene: scenes.Scene, rng: scenes.PortableRng) -> tuple[str, scenes.Scene, str]:
        return *scenes.change_scene(scene, rng), "background"

    def redraw(self, scene: scenes.Scene, artist: str) -> scenes.Scene | None:
        raise ValueError(f"No artist drew the world of scenes, not {artist!r} either.")

    def num_objects(self, scene: scenes.Scene) -> int:
        return len(scene.objects)

    def object_area(self, scene: scenes.Scene) -> float:
        return float(scenes.object_coverage(scene).sum()) / self.image_size**2

    def labeled_pictures(
        self, split: str, seed: int, indices: np.ndarray, patches_per_side: int, is_varied: np.ndarray
    ) -> LabeledPictures:
        found = [scenes.sample_scene(split, seed, int(index)) for index in indices]
        labels = [scenes.label_patches(scene, patches_per_side) for scene in found]
        pictures = [
            scenes.repaint(scene, scenes.PortableRng(seed, int(index), _REPAINT)) if varied else scenes.render(scene)
            for scene, index, varied in zip(found, indices, is_varied, strict=True)
        ]
        color = np.stack([its.color for its in labels])
        color[is_varied] = IGNORED
        return LabeledPictures(
            found,
            np.stack([np.asarray(picture) for picture in pictures]),
            {
                "shape": np.stack([its.shape for its in labels]),
                "color": color,
                "size": np.stack([its.size for its in labels]),
            },
            np.stack([its.offset for its in labels]),
            np.stack([its.is_object for its in labels]),
        )

    def parse_caption(self, text: str) -> scenes.Facts | None:
        try:
            return scenes.parse_caption(text)
        except scenes.CaptionError:
            return None

    def parts_of(self, facts: scenes.Facts | None) -> dict[str, Sequence[Any]]:
        facts = facts or scenes.Facts("", (), ())
        parts: dict[str, Sequence[Any]] = {
            part: [getattr(item, part) for item in facts.objects] for part in ("color", "shape", "size")
        }
        return {"background": [facts.background], **parts, "relation": facts.relations}


_REPAINT = 2000  # the third key of these random choices; scenes have four keys


class EmojiWorld(_Common):
    """Pictures that artists drew, `lavit_hf.data.emoji`.

    Args:
        name: Its name.
        shared_only: Whether it is the smaller world, of the concepts that all artists drew.
    """

    image_size = emoji.IMAGE_SIZE
    splits = emoji.SPLITS
    fact_units = {
        "background": "scenes",
        "object_count": "scenes",
        "concept": "objects",
        "size": "objects",
        "place": "objects",
        "all_concepts": "scenes",
        "all_places": "scenes",
    }
    scene_from_dict = staticmethod(emoji.Scene.from_dict)
    render = staticmethod(emoji.render)
    write_caption = staticmethod(emoji.write_caption)
    write_layout = staticmethod(emoji.write_layout)
    redraw = staticmethod(emoji.redraw)
    facts_of = staticmethod(emoji.facts_of)
    judge = staticmethod(emoji.judge)

    def __init__(self, name: str = "emoji", shared_only: bool = False) -> None:
        self.name, self._shared_only = name, shared_only

    @property
    def label_classes(self) -> Mapping[str, int]:
        return {
            "concept": len(emoji.load_pack().concepts) + 1,
            "background": len(emoji.BACKGROUNDS),
            "size": len(emoji.SIZES) + 1,
        }

    def make_dataset(self, split: str, num_scenes: int, seed: int = 0) -> datasets.Dataset:
        return emoji.make_emoji(split, num_scenes, seed, shared_only=self._shared_only)

    def sample_scene(self, split: str, seed: int, index: int) -> emoji.Scene:
        return emoji.sample_scene(split, seed, index, self._shared_only)

    def row(self, split: str, seed: int, index: int) -> dict[str, Any]:
        return emoji.emoji_row(split, seed, index, shared_only=self._shared_only)

    def ask_questions(self, scene: emoji.Scene, rng: scenes.PortableRng) -> Sequence[tuple[str, str, str]]:
        return emoji.ask_questions(scene, rng, self._shared_only)

    def num_objects(self, scene: emoji.Scene) -> int:
        return len(scene.objects)

    def object_area(self, scene: emoji.Scene) -> float:
        return float(emoji.object_area(emoji.SceneArrays.from_scenes([scene]))[0])

    def labeled_pictures(
        self, split: str, seed: int, indices: np.ndarray, patches_per_side: int, is_varied: np.ndarray
    ) -> LabeledPictures:
        found: dict[int, Any] = {}
        rows, tensors = [], []
        for varied in (False, True):
            (chosen,) = np.nonzero(is_varied == varied)
            if not len(chosen):
                continue
            arrays = emoji.sample_scenes(split, seed, indices[chosen], self._shared_only)
            looks = emoji.draw_looks(split, seed, indices[chosen]) if varied else None
            labels = emoji.label_patches(arrays, patches_per_side, looks=looks)
            found |= zip(chosen.tolist(), arrays.to_scenes(), strict=True)
            rows.append(chosen)
            tensors.append((emoji.render_scenes(arrays, looks=looks), *labels, labels.is_object))
        order = np.argsort(np.concatenate(rows))
        pixels, concept, background, size, offset, is_object = (
            torch.cat(of_both).numpy()[order] for of_both in zip(*tensors, strict=True)
        )
        return LabeledPictures(
            [found[row] for row in range(len(indices))],
            pixels.transpose(0, 2, 3, 1),
            {"concept": concept, "background": background, "size": size},
            offset,
            is_object,
        )

    def change_scene(self, scene: emoji.Scene, rng: scenes.PortableRng) -> tuple[str, emoji.Scene, str]:
        return emoji.change_scene(scene, rng, shared_only=self._shared_only)

    def parse_caption(self, text: str) -> emoji.Facts | None:
        try:
            return emoji.parse_caption(text)
        except emoji.CaptionError:
            return None

    def parts_of(self, facts: emoji.Facts | None) -> dict[str, Sequence[Any]]:
        facts = facts or emoji.Facts("", ())
        concepts = [item.concept for item in facts.objects]
        places = [(item.concept, item.place) for item in facts.objects]
        return {
            "background": [facts.background],
            "concept": concepts,
            "size": [(item.concept, item.size) for item in facts.objects],
            "place": places,
            "all_concepts": [tuple(sorted(concepts))],
            "all_places": [tuple(sorted(places))],
        }


WORLDS: dict[str, World] = {
    world.name: world for world in (SceneWorld(), EmojiWorld(), EmojiWorld("emoji-small", shared_only=True))
}


def find_world(name: str) -> World:
    """Returns the world of a name.

    Raises:
        ValueError: There is none.
    """
    if name not in WORLDS:
        raise ValueError(f"There is no world {name!r}; there are {', '.join(WORLDS)}.")
    return WORLDS[name]


__all__ = ["IGNORED", "WORLDS", "LabeledPictures", "World", "find_world"]
