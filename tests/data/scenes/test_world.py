"""Scenes as JSON, and how objects stand to each other."""

import json

import pytest

from lavit_hf.data.scenes import Scene, SceneObject, sample_scene
from lavit_hf.data.scenes.world import BACKGROUNDS, COLORS, HELD_OUT_PAIRS, SHAPES, SIZES, relation_between


def thing(x: int, y: int, **changes) -> SceneObject:
    return SceneObject(**{"shape": "ring", "color": "red", "size": "small", "x": x, "y": y, **changes})


def test_the_world_is_as_large_as_promised() -> None:
    assert len(SHAPES) >= 6 and len(COLORS) >= 6 and len(SIZES) == 2 and len(BACKGROUNDS) >= 3


def test_every_shape_and_color_is_held_out_once() -> None:
    assert sorted(shape for shape, _ in HELD_OUT_PAIRS) == sorted(SHAPES)
    assert sorted(color for _, color in HELD_OUT_PAIRS) == sorted(COLORS)


@pytest.mark.parametrize("split", ["train", "validation", "held_out"])
def test_json_round_trip(split: str) -> None:
    for index in range(30):
        scene = sample_scene(split, 1, index)
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"background": "plaid"}, "'plaid' is no background"),
        ({"objects": [{"shape": "ring"}]}, "Not a scene"),
        ({"objects": [vars(thing(1, 2, shape="dog"))]}, "'dog' is no shape"),
        ({"objects": [vars(thing(1, 2, color="mauve"))]}, "'mauve' is no color"),
        ({"objects": [vars(thing(1, 2, size="vast"))]}, "'vast' is no size"),
        ({"objects": [vars(thing(1, 99))]}, "y must be an integer from 0 to 64"),
        ({"objects": [vars(thing(1.5, 2))]}, "x must be an integer"),
        ({"objects": None}, "Not a scene"),
    ],
)
def test_what_is_no_scene(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scene.from_dict({"background": "white", "objects": [], **changes})


def test_relations() -> None:
    middle = thing(32, 32)
    assert relation_between(thing(10, 40), middle) == "left of"
    assert relation_between(thing(50, 20), middle) == "right of"
    assert relation_between(thing(30, 5), middle) == "above"
    assert relation_between(thing(44, 60), middle) == "below"
    assert relation_between(thing(5, 5), middle) is None
    assert relation_between(thing(30, 30), middle) is None
