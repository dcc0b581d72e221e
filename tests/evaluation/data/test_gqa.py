"""Questions of GQA."""

import pytest

from lavit_hf.evaluation.data.gqa import is_gqa, read_gqa

CONTENT = {
    "201307251": {
        "imageId": "n161313",
        "question": "Is it overcast?",
        "answer": "no",
        "types": {"structural": "verify", "semantic": "global"},
    },
    "201640614": {"imageId": "n235859", "question": "Who is wearing the dress?", "answer": "woman"},
}


def test_questions(folder, add_image):
    add_image("n161313.jpg")
    add_image("n235859.jpg", "blue")
    assert is_gqa(CONTENT)
    first, second = read_gqa(CONTENT, folder)
    assert (first.id, first.question, first.references) == ("201307251", "Is it overcast?", ("no",))
    assert (first.meta["kind"], second.meta["kind"]) == ("verify", "other")
    assert second.open_image().getpixel((0, 0)) == (0, 0, 255)
    assert len(read_gqa(CONTENT, folder, 1)) == 1


def test_a_split_without_answers(folder, add_image):
    with pytest.raises(ValueError, match="has no answer"):
        read_gqa({"1": {"imageId": "n161313", "question": "?"}}, folder)


def test_other_files_are_none_of_these():
    assert not any(map(is_gqa, ([], {}, None, {"questions": [{"question_id": 1}]}, {"images": []})))
