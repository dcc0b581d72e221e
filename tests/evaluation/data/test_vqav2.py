"""Questions of VQAv2 and OK-VQA."""

import pytest

from lavit_hf.evaluation.data.vqav2 import is_vqav2, read_vqav2


def content(**values) -> dict:
    asked = {"question_id": 262148000, "image_id": 262148, "question": "Where is he looking?"}
    return {"questions": [asked, {**asked, "question_id": 262148001, "question": "Is it day?"}], **values}


def answers() -> dict:
    def annotation(question_id: int, answer: str, answer_type: str) -> dict:
        listed = [{"answer": answer, "answer_confidence": "yes", "answer_id": number} for number in range(1, 11)]
        listed[-1]["answer"] = "other"
        return {"question_id": question_id, "image_id": 262148, "answers": listed, "answer_type": answer_type}

    return {"annotations": [annotation(262148001, "yes", "yes/no"), annotation(262148000, "down", "other")]}


@pytest.mark.parametrize(
    ("subtype", "name"),
    [
        ({"data_subtype": "val2014"}, "COCO_val2014_000000262148.jpg"),
        ({"data_subtype": "test2015"}, "COCO_test2015_000000262148.jpg"),
        ({}, "000000262148.jpg"),
    ],
)
def test_questions_meet_their_answers(folder, add_image, subtype, name):
    add_image(name)
    assert is_vqav2(content(**subtype))
    samples = read_vqav2(content(**subtype), answers(), folder)
    assert [sample.id for sample in samples] == ["000262148000", "000262148001"]
    assert [sample.question for sample in samples] == ["Where is he looking?", "Is it day?"]
    assert [sample.references for sample in samples] == [("down",) * 9 + ("other",), ("yes",) * 9 + ("other",)]
    assert [sample.meta["kind"] for sample in samples] == ["other", "yes/no"]
    assert samples[0].open_image().size == (24, 16)
    assert len(read_vqav2(content(**subtype), answers(), folder, 1)) == 1


def test_answers_of_another_split(folder, add_image):
    add_image("000000262148.jpg")
    with pytest.raises(ValueError, match="Question 262148000 has no answers"):
        read_vqav2(content(), {"annotations": []}, folder)


def test_other_files_are_none_of_these():
    assert not any(map(is_vqav2, ([], {}, None, {"questions": []}, {"1": {"imageId": "2", "question": "?"}})))
