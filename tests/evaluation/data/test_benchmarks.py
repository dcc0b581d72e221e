"""Annotation files of COCO, Karpathy's splits, VQAv2, GQA and VizWiz become samples."""

import pytest

from lavit_hf.evaluation.data.benchmarks import (
    is_coco,
    is_gqa,
    is_karpathy,
    is_vizwiz,
    is_vqav2,
    read_coco,
    read_gqa,
    read_karpathy,
    read_vizwiz,
    read_vqav2,
)


def karpathy_image(number: int, split: str, **values) -> dict:
    sentences = [{"raw": f"Picture {number}.", "tokens": ["picture"]}, {"raw": "It is red.", "tokens": ["it"]}]
    return {"imgid": number, "filename": f"{number}.jpg", "split": split, "sentences": sentences, **values}


def test_a_split(folder, add_image):
    content = {
        "dataset": "flickr30k",
        "images": [karpathy_image(0, "train"), karpathy_image(1, "test"), karpathy_image(2, "test")],
    }
    assert is_karpathy(content)
    add_image("1.jpg")
    add_image("2.jpg")
    samples = read_karpathy(content, folder, "test")
    assert [sample.id for sample in samples] == ["000000000001", "000000000002"]
    assert samples[1].references == ("Picture 2.", "It is red.")
    assert len(read_karpathy(content, folder, "test", 1)) == 1
    with pytest.raises(ValueError, match="no split 'val'; it has test, train"):
        read_karpathy(content, folder, "val")


def test_images_of_coco_are_in_folders_of_their_own(folder, add_image):
    add_image("val2014/5.jpg", "blue")
    (sample,) = read_karpathy({"images": [karpathy_image(5, "test", filepath="val2014")]}, folder, "test")
    assert sample.open_image().getpixel((0, 0)) == (0, 0, 255)


def test_other_files_are_not_karpathy():
    assert not any(map(is_karpathy, ([], {}, None, {"images": [{"id": 1}]})))


def coco_content() -> dict:
    return {
        "images": [
            {"id": 391895, "file_name": "COCO_val2014_000000391895.jpg", "width": 24, "height": 16},
            {"id": 42, "file_name": "COCO_val2014_000000000042.jpg"},
            {"id": 7, "file_name": "without_captions.jpg"},
        ],
        "annotations": [
            {"image_id": 391895, "id": 2, "caption": "A man rides."},
            {"image_id": 42, "id": 3, "caption": "A dog."},
            {"image_id": 391895, "id": 1, "caption": "A person on a bike."},
        ],
    }


def test_one_sample_per_image(folder, add_image):
    add_image("COCO_val2014_000000391895.jpg")
    add_image("COCO_val2014_000000000042.jpg", "blue")
    assert is_coco(coco_content())
    samples = read_coco(coco_content(), folder)
    assert [sample.id for sample in samples] == ["000000000042", "000000391895"]
    assert [sample.references for sample in samples] == [("A dog.",), ("A man rides.", "A person on a bike.")]
    assert samples[0].open_image().getpixel((0, 0)) == (0, 0, 255)
    assert samples[0].question is None


def test_the_first_images(folder, add_image):
    add_image("COCO_val2014_000000000042.jpg")
    assert [sample.id for sample in read_coco(coco_content(), folder, 1)] == ["000000000042"]


def test_two_images_of_one_id_are_both_there(folder, add_image):
    """So that whoever reads the file says so."""
    add_image("COCO_val2014_000000000042.jpg")
    twice = coco_content()
    twice["images"].append(twice["images"][1])
    assert [sample.id for sample in read_coco(twice, folder, 2)] == ["000000000042"] * 2


def test_missing_images(folder):
    with pytest.raises(ValueError, match="has no COCO_val2014_000000000042.jpg; --images takes"):
        read_coco(coco_content(), folder)


def test_other_files_are_not_coco():
    questions = {"questions": [], "images": [{"id": 1}], "annotations": [{"image_id": 1, "answers": []}]}
    assert not any(map(is_coco, ([], {}, None, questions, {"images": [{"sentences": []}]})))


def vqav2_content(**values) -> dict:
    asked = {"question_id": 262148000, "image_id": 262148, "question": "Where is he looking?"}
    return {"questions": [asked, {**asked, "question_id": 262148001, "question": "Is it day?"}], **values}


def vqav2_answers() -> dict:
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
    assert is_vqav2(vqav2_content(**subtype))
    samples = read_vqav2(vqav2_content(**subtype), vqav2_answers(), folder)
    assert [sample.id for sample in samples] == ["000262148000", "000262148001"]
    assert [sample.question for sample in samples] == ["Where is he looking?", "Is it day?"]
    assert [sample.references for sample in samples] == [("down",) * 9 + ("other",), ("yes",) * 9 + ("other",)]
    assert [sample.meta["kind"] for sample in samples] == ["other", "yes/no"]
    assert samples[0].open_image().size == (24, 16)
    assert len(read_vqav2(vqav2_content(**subtype), vqav2_answers(), folder, 1)) == 1


def test_answers_of_another_split(folder, add_image):
    add_image("000000262148.jpg")
    with pytest.raises(ValueError, match="Question 262148000 has no answers"):
        read_vqav2(vqav2_content(), {"annotations": []}, folder)


def test_other_files_are_not_vqav2():
    assert not any(map(is_vqav2, ([], {}, None, {"questions": []}, {"1": {"imageId": "2", "question": "?"}})))


GQA_CONTENT = {
    "201307251": {
        "imageId": "n161313",
        "question": "Is it overcast?",
        "answer": "no",
        "types": {"structural": "verify", "semantic": "global"},
    },
    "201640614": {"imageId": "n235859", "question": "Who is wearing the dress?", "answer": "woman"},
}


def test_gqa_questions(folder, add_image):
    add_image("n161313.jpg")
    add_image("n235859.jpg", "blue")
    assert is_gqa(GQA_CONTENT)
    first, second = read_gqa(GQA_CONTENT, folder)
    assert (first.id, first.question, first.references) == ("201307251", "Is it overcast?", ("no",))
    assert (first.meta["kind"], second.meta["kind"]) == ("verify", "other")
    assert second.open_image().getpixel((0, 0)) == (0, 0, 255)
    assert len(read_gqa(GQA_CONTENT, folder, 1)) == 1


def test_a_split_without_answers(folder, add_image):
    with pytest.raises(ValueError, match="has no answer"):
        read_gqa({"1": {"imageId": "n161313", "question": "?"}}, folder)


def test_other_files_are_not_gqa():
    assert not any(map(is_gqa, ([], {}, None, {"questions": [{"question_id": 1}]}, {"images": []})))


def vizwiz_asked(number: int, *answers: str) -> dict:
    return {
        "image": f"VizWiz_val_{number:08d}.jpg",
        "question": "Can you tell me what this is?",
        "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers],
        "answer_type": "other",
        "answerable": 1,
    }


def test_vizwiz_questions(folder, add_image):
    content = [vizwiz_asked(0, "basil", "basil leaves"), vizwiz_asked(1, "unanswerable")]
    assert is_vizwiz(content)
    add_image("VizWiz_val_00000000.jpg")
    add_image("VizWiz_val_00000001.jpg")
    samples = read_vizwiz(content, folder)
    assert [sample.id for sample in samples] == ["VizWiz_val_00000000", "VizWiz_val_00000001"]
    assert [sample.references for sample in samples] == [("basil", "basil leaves"), ("unanswerable",)]
    assert samples[0].question == "Can you tell me what this is?" and samples[0].meta == {"kind": "other"}
    assert len(read_vizwiz(content, folder, 1)) == 1


def test_other_files_are_not_vizwiz():
    rows = [{"image": "a.png", "question": "?", "answers": ["yes"]}]  # a table of `datasets`
    assert not any(map(is_vizwiz, ([], {}, None, rows, [{"image": "a.png", "text": "b"}])))


def test_rows_without_texts_are_refused(folder, add_image):
    add_image("0.jpg")
    with pytest.raises(ValueError, match=r"images\[0\]: sentences is empty"):
        read_karpathy({"images": [karpathy_image(0, "test", sentences=[])]}, folder, "test")
