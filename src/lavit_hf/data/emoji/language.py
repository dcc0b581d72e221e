"""Captions, layouts, questions and changes of scenes, and facts that are read back from captions."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..scenes.world import PortableRng
from .sprites import load_pack
from .world import BACKGROUNDS, PLACES, SIZES, Scene, SceneObject, held_out_pairs, visible_on


class ObjectFacts(NamedTuple):
    """What a caption says about one object."""

    place: str
    size: str
    concept: str


@dataclass(frozen=True)
class Facts:
    """All that a caption says; equal if they say the same in whatever words.

    Attributes:
        background: Its color.
        objects: Sorted.
    """

    background: str
    objects: tuple[ObjectFacts, ...]


class CaptionError(ValueError):
    """A text is no caption of a scene."""


_MEDIUM = "medium"  # captions do not mention this size
_SIZE_WORDS = tuple(size for size in SIZES if size != _MEDIUM)
_QUARTERS = PLACES[:4]
# Two objects side by side, or one above the other: the first, and in which half both are.
_FACING = {
    ("top left", "top right"): ("left of", "at the top"),
    ("bottom left", "bottom right"): ("left of", "at the bottom"),
    ("top left", "bottom left"): ("above", "on the left"),
    ("top right", "bottom right"): ("above", "on the right"),
}
_OPPOSITE = {"left of": "right of", "above": "below"}
_RELATIONS = {
    **{pair: relation for pair, (relation, _) in _FACING.items()},
    **{pair[::-1]: _OPPOSITE[relation] for pair, (relation, _) in _FACING.items()},
}
_PAIRS = {
    **{(relation, half): pair for pair, (relation, half) in _FACING.items()},
    **{(_OPPOSITE[relation], half): pair[::-1] for pair, (relation, half) in _FACING.items()},
}
_FRAMES = (
    "{core} on {background}",
    "there {verb} {core} on {background}",
    "a picture of {core} on {background}",
    "{background} with {core}",
)


def facts_of(scene: Scene) -> Facts:
    """Returns all that is said about a scene: what each of its captions says.

    Args:
        scene: Made, or read from a picture.

    Returns:
        Its facts.
    """
    objects = (ObjectFacts(item.place, item.size, item.concept) for item in scene.objects)
    return Facts(scene.background, tuple(sorted(objects)))


def with_article(noun: str, *adjectives: str) -> str:
    """Returns a concept or color as it is named first: "a small dog", "an apple", "grapes"."""
    words = " ".join([*adjectives, noun])
    if load_pack().nouns.get(noun, "one") != "one":
        return words
    is_open = words.startswith("hour") or (words[0] in "aeiou" and not words.startswith("uni"))  # as it is spoken
    return f"{'an' if is_open else 'a'} {words}"


def _phrase(item: SceneObject) -> str:
    return with_article(item.concept, *([] if item.size == _MEDIUM else [item.size]))


def _is(concept: str, sentence_start: bool = False) -> str:
    verb = "are" if load_pack().nouns[concept] == "many" else "is"
    return verb.capitalize() if sentence_start else verb


def captions_of(scene: Scene) -> list[str]:
    """Returns every caption of a scene, each of which says all of [`facts_of`] it.

    Args:
        scene: One to three objects, placed as `sample_scene` does.

    Returns:
        Some captions: 4 of one object, 8 to 16 of two, 24 of three.
    """
    background = with_article("background", scene.background)
    result = []
    for items in itertools.permutations(scene.objects):
        for core in _cores(items):
            verb = _is(items[0].concept)
            result += [frame.format(core=core, background=background, verb=verb) for frame in _FRAMES]
    return result


def write_caption(scene: Scene, rng: PortableRng) -> str:
    """Draws one of [`captions_of`], all equally likely."""
    return rng.choice(captions_of(scene))


def _cores(items: Sequence[SceneObject]) -> list[str]:
    """Returns what stands in the frames: objects in this order and where they are."""
    cores = [_join([_placed(item) for item in items])]
    if len(items) == 2 and (relation := _RELATIONS.get((items[0].place, items[1].place))):
        half = next(half for (name, half), pair in _PAIRS.items() if pair == (items[0].place, items[1].place))
        cores.append(f"{_phrase(items[0])} {relation} {_phrase(items[1])} {half}")
    return cores


def _placed(item: SceneObject) -> str:
    return _phrase(item) if item.place == "middle" else f"{_phrase(item)} at the {item.place}"


def _join(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


@functools.cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    """Patterns of one object with its place, and of two that face each other."""
    names = "|".join(re.escape(name) for name in sorted(load_pack().concepts, key=len, reverse=True))
    item = rf"(?:an? )?(?:({'|'.join(_SIZE_WORDS)}) )?({names})"
    relations = "|".join(dict.fromkeys(_RELATIONS.values()))
    halves = "|".join(half for _, half in _FACING.values())
    return (
        re.compile(rf"{item}(?: at the ({'|'.join(_QUARTERS)}))?"),
        re.compile(rf"{item} ({relations}) {item} ({halves})"),
    )


_BACKGROUND = rf"an? (?P<background>{'|'.join(BACKGROUNDS)}) background"
_FRAME_PATTERNS = (
    re.compile(rf"(?:there (?:is|are) |a picture of )?(?P<core>.+) on {_BACKGROUND}"),
    re.compile(rf"{_BACKGROUND} with (?P<core>.+)"),
)


def parse_caption(text: str) -> Facts:
    """Reads what a caption says. `parse_caption(caption) == facts_of(scene)` for every caption of a scene.

    Args:
        text: A caption; upper case, spaces and a period at the end do not matter.

    Returns:
        What it says, which need not be possible.

    Raises:
        CaptionError: It is not worded as captions of scenes are.
    """
    words = " ".join(text.lower().split()).rstrip(". ")
    for pattern in _FRAME_PATTERNS:
        frame = pattern.fullmatch(words)
        objects = frame and _read_core(frame["core"])
        if frame and objects:
            return Facts(frame["background"], tuple(sorted(objects)))
    raise CaptionError(f"Not a caption of a scene of emoji: {text!r}.")


def _read_core(core: str) -> list[ObjectFacts] | None:
    single, facing = _patterns()
    if found := facing.fullmatch(core):
        pair = _PAIRS.get((found[3], found[6]))
        if pair is None:
            return None
        said = [(pair[0], found[1], found[2]), (pair[1], found[4], found[5])]
    else:
        said = []
        for part in re.split(r", | and ", core):
            if not (item := single.fullmatch(part)):
                return None
            said.append((item[3] or "middle", item[1], item[2]))
    return [ObjectFacts(place, size or _MEDIUM, concept) for place, size, concept in said]


def write_layout(scene: Scene, rng: PortableRng | None = None) -> str:
    """Returns the shortest text that says everything: all objects with their places, then the background.

    Args:
        scene: What to list.
        rng: Chooses the order of the objects; by default that of reading.
    """
    items = scene.objects if rng is None else rng.shuffled(scene.objects)
    objects = [" ".join([*([] if item.size == _MEDIUM else [item.size]), item.concept, item.place]) for item in items]
    return ", ".join([*objects, f"{scene.background} background"])


KINDS = ("background", "count", "what", "where", "relation", "yes_no")
NUMBERS = ("zero", "one", "two", "three")


class Question(NamedTuple):
    """A question with its only right answer; `kind` is one of `KINDS`."""

    question: str
    answer: str
    kind: str


def ask_questions(scene: Scene, rng: PortableRng, shared_only: bool = False) -> list[Question]:
    """Asks one question of every kind that the scene allows.

    Half of all questions of the kind yes_no are to be answered with yes. No question of a scene without a held-out
    pair puts the two concepts of one together.

    Args:
        scene: One to three objects of different concepts.
        rng: Chooses among the questions.
        shared_only: Whether to name no concept that an artist did not draw, as in the smaller world.

    Returns:
        Between five and six questions, in the order of `KINDS`.
    """
    found = [
        Question("What color is the background?", scene.background, "background"),
        Question("How many things are there?", NUMBERS[len(scene.objects)], "count"),
        _ask_what(scene, rng),
        _ask_where(scene, rng),
        _ask_relation(scene, rng),
        _ask_yes_no(scene, rng, shared_only),
    ]
    return [question for question in found if question is not None]


def _ask_what(scene: Scene, rng: PortableRng) -> Question:
    by_place = {item.place: item for item in scene.objects}
    if "middle" in by_place:
        return Question("What is in the middle?", _phrase(by_place["middle"]), "what")
    # One in four asks for any place, where there may be nothing.
    place = rng.choice(_QUARTERS) if rng.below(4) == 0 else rng.choice(list(by_place))
    return Question(f"What is at the {place}?", _phrase(by_place[place]) if place in by_place else "nothing", "what")


def _ask_where(scene: Scene, rng: PortableRng) -> Question:
    item = rng.choice(scene.objects)
    answer = "in the middle" if item.place == "middle" else f"at the {item.place}"
    return Question(f"Where {_is(item.concept)} the {item.concept}?", answer, "where")


def _facing(scene: Scene) -> list[tuple[SceneObject, str, SceneObject]]:
    return [
        (first, relation, second)
        for first, second in itertools.permutations(scene.objects, 2)
        if (relation := _RELATIONS.get((first.place, second.place)))
    ]


def _ask_relation(scene: Scene, rng: PortableRng) -> Question | None:
    facing = _facing(scene)
    if not facing:
        return None
    first, relation, second = rng.choice(facing)
    return Question(f"What is {relation} the {second.concept}?", _phrase(first), "relation")


def _ask_yes_no(scene: Scene, rng: PortableRng, shared_only: bool) -> Question:
    is_true = rng.below(2) == 1
    ask = rng.choice((_claim_existence, _claim_existence, _claim_background, _claim_relation))
    claim = ask(scene, rng, is_true, shared_only) or _claim_existence(scene, rng, is_true, shared_only)
    return Question(claim, "yes" if is_true else "no", "yes_no")


def _claim_existence(scene: Scene, rng: PortableRng, is_true: bool, shared_only: bool) -> str:
    concept = rng.choice(scene.objects).concept if is_true else rng.choice(absent_concepts(scene, shared_only))
    return f"{_is(concept, True)} there {with_article(concept)}?"


def _claim_background(scene: Scene, rng: PortableRng, is_true: bool, shared_only: bool) -> str:
    others = [color for color in BACKGROUNDS if color != scene.background]
    return f"Is the background {scene.background if is_true else rng.choice(others)}?"


def _claim_relation(scene: Scene, rng: PortableRng, is_true: bool, shared_only: bool) -> str | None:
    facing = _facing(scene)
    if not facing:
        return None
    first, relation, second = rng.choice(facing)
    if not is_true:
        relation = rng.choice([other for other in dict.fromkeys(_RELATIONS.values()) if other != relation])
    return f"{_is(first.concept, True)} the {first.concept} {relation} the {second.concept}?"


def absent_concepts(scene: Scene, shared_only: bool = False) -> list[str]:
    """Returns concepts that a scene lacks, and that may be named beside those that it has."""
    names = load_pack().concepts
    present = [names.index(item.concept) for item in scene.objects]
    is_absent = load_pack().is_shared.copy() if shared_only else np.ones(len(names), dtype=bool)
    is_absent[present] = False
    if not scene.has_held_out_pair:
        is_absent &= ~held_out_pairs()[present].any(axis=0)
    return [names[number] for number in np.flatnonzero(is_absent)]


CHANGES = ("replace", "background", "remove")


class Change(NamedTuple):
    """What to draw after a picture."""

    text: str
    scene: Scene
    kind: str


def change_scene(scene: Scene, rng: PortableRng, kind: str | None = None, shared_only: bool = False) -> Change:
    """Changes one thing about a scene, everything else being the same.

    Args:
        scene: What the picture shows.
        rng: Chooses what is changed.
        kind: One of `CHANGES`; by default one of those that the scene allows.
        shared_only: Whether to add no concept that an artist did not draw, as in the smaller world.

    Returns:
        Words for the change ("the same with a dog instead of the cat"), and what is there after it. Neither shows or
        names a held-out pair, unless the scene has one.

    Raises:
        ValueError: There is no such kind, or the scene does not allow it.
    """
    if kind is not None and kind not in CHANGES:
        raise ValueError(f"{kind!r} is no kind of change; there are {', '.join(CHANGES)}.")
    kinds = (kind,) if kind else rng.shuffled(("replace", "replace", "background", "remove"))
    for chosen in kinds:
        change = {"replace": _replace, "background": _repaint, "remove": _remove}[chosen](scene, rng, shared_only)
        if change is not None:
            return change
    raise ValueError(f"The scene allows no change of the kind {kind}.")


def _replace(scene: Scene, rng: PortableRng, shared_only: bool) -> Change | None:
    pack = load_pack()
    item = rng.choice(scene.objects)
    artist, background = pack.artists.index(item.artist), list(BACKGROUNDS).index(scene.background)
    is_shown = pack.is_drawn[:, artist] & visible_on()[:, artist, background]
    # Also not named beside the one that leaves: the text has both.
    names = [name for name in absent_concepts(scene, shared_only) if is_shown[pack.concepts.index(name)]]
    if not names:
        return None
    other = rng.choice(names)
    old, new = item.concept, with_article(other)
    text = rng.choice((f"the same with {new} instead of the {old}", f"{new} instead of the {old}"))
    objects = tuple(replace(one, concept=other) if one == item else one for one in scene.objects)
    return Change(text, replace(scene, objects=objects), "replace")


def _repaint(scene: Scene, rng: PortableRng, shared_only: bool) -> Change | None:
    pack = load_pack()
    visible = visible_on()
    allowed = [
        name
        for number, name in enumerate(BACKGROUNDS)
        if name != scene.background
        and all(visible[pack.concepts.index(i.concept), pack.artists.index(i.artist), number] for i in scene.objects)
    ]
    if not allowed:
        return None
    other = rng.choice(allowed)
    return Change(f"the same on {with_article('background', other)}", replace(scene, background=other), "background")


def _remove(scene: Scene, rng: PortableRng, shared_only: bool) -> Change | None:
    if len(scene.objects) < 2:
        return None
    item = rng.choice(scene.objects)
    objects = tuple(one for one in scene.objects if one != item)
    return Change(f"the same without the {item.concept}", replace(scene, objects=objects), "remove")
