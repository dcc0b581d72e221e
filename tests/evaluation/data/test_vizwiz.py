"""Questions of VizWiz."""

from lavit_hf.evaluation.data.vizwiz import is_vizwiz, read_vizwiz


def asked(number: int, *answers: str) -> dict:
    return {
        "image": f"VizWiz_val_{number:08d}.jpg",
        "question": "Can you tell me what this is?",
        "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers],
        "answer_type": "other",
        "answerable": 1,
    }


def test_questions(folder, add_image):
    content = [asked(0, "basil", "basil leaves"), asked(1, "unanswerable")]
    assert is_vizwiz(content)
    add_image("VizWiz_val_00000000.jpg")
    add_image("VizWiz_val_00000001.jpg")
    samples = read_vizwiz(content, folder)
    assert [sample.id for sample in samples] == ["VizWiz_val_00000000", "VizWiz_val_00000001"]
    assert [sample.references for sample in samples] == [("basil", "basil leaves"), ("unanswerable",)]
    assert samples[0].question == "Can you tell me what this is?" and samples[0].meta == {"kind": "other"}
    assert len(read_vizwiz(content, folder, 1)) == 1


def test_other_files_are_none_of_these():
    rows = [{"image": "a.png", "question": "?", "answers": ["yes"]}]  # a table of `datasets`
    assert not any(map(is_vizwiz, ([], {}, None, rows, [{"image": "a.png", "text": "b"}])))
