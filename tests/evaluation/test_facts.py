"""What is right and wrong about a scene."""

from lavit_hf.data import emoji
from lavit_hf.data.scenes import Facts, ObjectFacts, Scene, SceneObject, captions_of, facts_of
from lavit_hf.data.worlds import WORLDS
from lavit_hf.evaluation.facts import compare_facts, measure_facts, read_facts, wrong_parts
from lavit_hf.evaluation.measurement import cluster_interval, wilson_interval

RED, BLUE = SceneObject("square", "red", "large", 16, 32), SceneObject("ring", "blue", "small", 48, 32)
SCENE = Scene("white", (RED, BLUE))


def test_every_caption_of_a_scene_is_fully_right():
    for caption in captions_of(SCENE):
        comparison = compare_facts(read_facts(caption), SCENE)
        assert wrong_parts(comparison) == []
        assert comparison == {
            "fully_right": (1, 1),
            "background": (1, 1),
            "object_count": (1, 1),
            "color": (2, 2),
            "shape": (2, 2),
            "size": (2, 2),
            "relation": (1, 1),
        }


def test_one_wrong_word_is_one_wrong_part():
    comparison = compare_facts(read_facts("a large red square left of a small blue ring on a gray background"), SCENE)
    assert wrong_parts(comparison) == ["background"] and comparison["fully_right"] == (0, 1)
    comparison = compare_facts(read_facts("a large red square left of a large blue ring on a white background"), SCENE)
    assert comparison["size"] == (1, 2) and comparison["relation"] == (0, 1)
    comparison = compare_facts(read_facts("a large red square above a small blue ring on a white background"), SCENE)
    assert wrong_parts(comparison) == ["relation"]


def test_right_parts_that_belong_to_other_objects():
    single = Scene("white", (RED, SceneObject("ring", "blue", "small", 48, 60)))  # not facing each other
    swapped = Facts("white", (ObjectFacts("large", "blue", "square"), ObjectFacts("small", "red", "ring")), ())
    comparison = compare_facts(swapped, single)
    assert comparison["color"] == (2, 2) and comparison["fully_right"] == (0, 1)
    assert wrong_parts(comparison) == ["combination"]


def test_objects_too_many_are_wrong_too():
    comparison = compare_facts(facts_of(Scene("white", (RED, BLUE, RED))), SCENE)
    assert comparison["object_count"] == (0, 1) and comparison["color"] == (2, 3)
    comparison = compare_facts(facts_of(Scene("white", ())), SCENE)
    assert comparison["background"] == (1, 1) and comparison["shape"] == (0, 2)


def test_a_text_that_is_no_caption_is_all_wrong():
    comparison = compare_facts(read_facts("a nice picture"), SCENE)
    assert all(right == 0 < total for right, total in comparison.values())


def test_shares_are_of_scenes_objects_and_relations():
    right = compare_facts(facts_of(SCENE), SCENE)
    wrong = compare_facts(None, Scene("white", (RED,)))
    found = measure_facts([right, wrong], "prefix/")
    assert (found["prefix/fully_right"].value, found["prefix/fully_right"].n) == (0.5, 2)
    assert (found["prefix/color"].value, found["prefix/color"].n) == (2 / 3, 3)
    assert (found["prefix/relation"].value, found["prefix/relation"].n) == (1.0, 1)


def test_objects_of_a_scene_are_no_independent_ones():
    """Regression: their intervals were Wilson's, as if every object were drawn by itself."""
    right, wrong = compare_facts(facts_of(SCENE), SCENE), compare_facts(None, SCENE)
    found = measure_facts([right] * 10 + [wrong] * 10)
    assert found["fully_right"].interval == found["relation"].interval == wilson_interval(10, 20)
    assert found["color"].interval == cluster_interval([2] * 10 + [0] * 10, [2] * 20)
    assert measure_facts([right] * 10)["color"].interval == wilson_interval(10, 10)


def test_facts_of_emoji():
    world = WORLDS["emoji"]
    item = emoji.SceneObject("dog", "noto", "medium", "top left", 40, 96, 96)
    other = emoji.SceneObject("cat", "noto", "small", "top right", 28, 288, 96)
    truth = emoji.Scene("pink", (item, other))
    for caption in emoji.captions_of(truth):
        assert wrong_parts(compare_facts(read_facts(caption, world), truth, world)) == []
    swapped = read_facts("a dog right of a small cat at the top on a pink background", world)
    comparison = compare_facts(swapped, truth, world)
    assert wrong_parts(comparison) == ["place", "all_places"] and comparison["place"] == (0, 2)
    one = read_facts("a cat at the top right on a pink background", world)
    assert compare_facts(one, truth, world) == {
        "fully_right": (0, 1),
        "background": (1, 1),
        "object_count": (0, 1),
        "concept": (1, 2),
        "size": (0, 2),
        "place": (1, 2),
        "all_concepts": (0, 1),
        "all_places": (0, 1),
    }
    measured = measure_facts([comparison], world=world)
    assert measured["concept"].value == 1 and measured["all_places"].unit == "scenes"
    assert compare_facts(None, truth, world)["concept"] == (0, 2)
    assert read_facts("a large red square on a white background", world) is None
