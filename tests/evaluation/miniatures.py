"""Miniatures of the paper's benchmarks, five samples each in their published layout, and what a model writes of them.

Lemmas and tokens of captions come from `protocol_tools.json`, which `record_protocol_tools.py` records with spaCy and
Java; whatever is not in it is an error, so a text that is changed here has to be recorded again.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import cached_assets_path
from PIL import Image

RECORDED = Path(__file__).with_name("protocol_tools.json")
COLORS = ["red", "green", "blue", "white", "black", "yellow"]


def picture(path: Path, number: int) -> None:
    """A picture of a color of its own; none is square, and all have other sizes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20 + 4 * number, 16), COLORS[number]).save(path, format="PNG")


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


# What the model writes, and what humans wrote, who all agree on one caption but of one picture. A caption that equals
# all references has CIDEr 10, one that shares no word with them 0; these five have 10, 10, 5, 0 and 0, 5 on average.
CAPTIONS = [
    ("a sign says stop. It is red.", ["A sign says 'STOP'!"]),
    ("the boys' bus isn't near no", ["The boys' bus isn't near: no"]),
    ("one old café on main street", ["One old café on Main Street", "several young women drink green tea together"]),
    ("my cat sleeps here today", ["Two dogs run in snow."]),
    ("her horse eats fresh grass", ["Some people (blurry) ride bikes -- very fast"]),
]
CIDER = 5.0


def coco(root: Path) -> None:
    images = [
        {
            "imgid": number,
            "cocoid": 100 + number,
            "filepath": "val2014",
            "filename": f"COCO_val2014_{100 + number:012d}.jpg",
            "split": "test",
            "sentences": [{"raw": text} for text in references],
        }
        for number, (_, references) in enumerate(CAPTIONS)
    ]
    other = {**images[0], "imgid": 9, "filename": "other.jpg", "split": "train"}
    write(root / "dataset_coco.json", {"images": [other, *images]})
    for number, image in enumerate(images):
        picture(root / "val2014" / image["filename"], number)


def nocaps(root: Path) -> None:
    images = [{"id": number, "file_name": f"{number:016x}.jpg"} for number in range(5)]
    texts = [(number, text) for number, (_, references) in enumerate(CAPTIONS) for text in references]
    annotations = [{"id": index, "image_id": number, "caption": text} for index, (number, text) in enumerate(texts)]
    write(root / "nocaps_val_4500_captions.json", {"images": images, "annotations": annotations})
    for number, image in enumerate(images):
        picture(root / "images" / image["file_name"], number)


def flickr30k(root: Path) -> None:
    images = [
        {"imgid": number, "filename": f"{number}.jpg", "split": "test", "sentences": [{"raw": t} for t in references]}
        for number, (_, references) in enumerate(CAPTIONS)
    ]
    write(root / "dataset_flickr30k.json", {"images": images})
    for number, image in enumerate(images):
        picture(root / "flickr30k-images" / image["filename"], number)


# The question, how it is put, what the model writes, ten human answers, and the accuracy of leaving each out: 1, 2, 3
# and 4 or more that agree are 30, 60, 90 and 100 percent.
Asked = tuple[str, str, str, list[str], int]
VQAV2: list[Asked] = [
    (
        "What are these?",
        "what are these?",
        " Two dogs, playing",  # -> two dogs -> two dog -> 2 dog
        ["2 dogs"] * 3 + ["two dogs"] * 4 + ["dogs"] * 3,  # the numbers of humans stay as they are written
        90,
    ),
    ('Is it "raining" (now)?', "is it raining now?", "Yes. Question: what", ["yes"] * 10, 100),
    ("What is he doing?", "what is he doing?", "skiing\nQuestion: what", ["skis"] * 4 + ["skiing"] * 6, 100),
    ("Where is the cat; a dog?", "where is the cat a dog?", "On the table", ["table"] * 2 + ["on table"] * 8, 60),
    ("What does it say?", "what does it say?", "it is stop", ["stop"] + ["go"] * 9, 30),
]
OKVQA: list[Asked] = [
    ("What sport is this?", "what sport is this?", "snowboarding", ["snowboarding"] * 10, 100),
    ("What are they for?", "what are they for?", "for boats", ["boats"] * 2 + ["ships"] * 8, 60),
    ("Who is she?", "who is she?", "", ["queen"] * 10, 0),
    ("When was it made?", "when was it made?", "1,000 years", ["1"] * 3 + ["1000"] * 7, 90),
    ("Which breed is it?", "which breed is it?", "Huskies", ["husky"] * 5 + ["wolf"] * 5, 100),
]


def vqa(root: Path, prefix: str, questions: Sequence[Asked]) -> None:
    names = {"data_subtype": "val2014"}
    asked = [
        {"question_id": 1000 + number, "image_id": number, "question": question}
        for number, (question, *_) in enumerate(questions)
    ]
    answered = [
        {
            "question_id": 1000 + number,
            "image_id": number,
            "answer_type": "other",
            "answers": [{"answer": answer, "answer_id": index + 1} for index, answer in enumerate(answers)],
        }
        for number, (_, _, _, answers, _) in enumerate(questions)
    ]
    write(root / f"{prefix}OpenEnded_mscoco_val2014_questions.json", {**names, "questions": asked})
    write(root / f"{prefix}mscoco_val2014_annotations.json", {**names, "annotations": answered})
    for number in range(len(questions)):
        picture(root / "val2014" / f"COCO_val2014_{number:012d}.jpg", number)


def vqav2(root: Path) -> None:
    vqa(root, "v2_", VQAV2)


def okvqa(root: Path) -> None:
    vqa(root, "", OKVQA)


GQA: list[Asked] = [
    ("What is the man holding?", "what is the man holding?", "Bats", ["bats"], 100),
    ("How many are there?", "how many are there?", "two", ["two"], 0),  # "2", and "two" is not normalized
    ("What is it?", "what is it?", "The chair.", ["chair"], 100),
    ("Is it tall?", "is it tall?", "no", ["yes"], 0),
    ("On which side is it?", "on which side is it?", "on left", ["left"], 0),  # "leave", as spaCy reads the truth
]


def gqa(root: Path) -> None:
    content = {
        f"20{number}": {
            "imageId": f"n{number}",
            "question": question,
            "answer": answer,
            "types": {"structural": "query"},
        }
        for number, (question, _, _, (answer,), _) in enumerate(GQA)
    }
    write(root / "testdev_balanced_questions.json", content)
    for number in range(len(GQA)):
        picture(root / "images" / f"n{number}.jpg", number)


VIZWIZ: list[Asked] = [
    ("What is this?", "what is this?", "a soda can", ["can"] * 6 + ["soda can"] * 4, 100),
    ("What color: is it?", "what color is it?", "blue", ["unanswerable"] * 10, 100),
    ("Is it on?", "is it on?", "yes", ["yes"] * 2 + ["unsuitable"] * 8, 0),
    ("Can you read it?", "can you read it?", "i don't know", ["unanswerable"] * 3 + ["text"] * 7, 90),
    ("Which bill is this?", "which bill is this?", "20 dollars", ["20 dollars"] * 3 + ["20"] * 7, 90),
]
# What the model writes when asked whether questions can be answered.
ANSWERABLE = ["yes", "No, it is not.", "not really", "yes", "yes"]


def vizwiz(root: Path) -> None:
    content = [
        {
            "image": f"VizWiz_val_{number:08d}.jpg",
            "question": question,
            "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers],
            "answer_type": "other",
            "answerable": 1,
        }
        for number, (question, _, _, answers, _) in enumerate(VIZWIZ)
    ]
    write(root / "val.json", content)
    for number, asked in enumerate(content):
        picture(root / "val" / asked["image"], number)


def coco_fid(root: Path) -> None:
    images = [{"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg"} for number in range(5)]
    annotations = [
        {"id": number, "image_id": number, "caption": references[0]} for number, (_, references) in enumerate(CAPTIONS)
    ]
    write(root / "annotations" / "captions_val2014.json", {"images": images, "annotations": annotations})
    for number, image in enumerate(images):
        picture(root / "val2014" / image["file_name"], number)


MINIATURES: dict[str, Callable[[Path], None]] = {
    "coco": coco,
    "nocaps": nocaps,
    "flickr30k": flickr30k,
    "vqav2": vqav2,
    "okvqa": okvqa,
    "gqa": gqa,
    "vizwiz": vizwiz,
    "coco-fid": coco_fid,
}
QUESTIONS = {"vqav2": VQAV2, "okvqa": OKVQA, "gqa": GQA, "vizwiz": VIZWIZ}


def written() -> dict[str, str]:
    """What the model writes after each prompt about questions."""
    prompts = {
        f"Question: {asked} Answer:": text for questions in QUESTIONS.values() for _, asked, text, _, _ in questions
    }
    for (_, asked, *_), text in zip(VIZWIZ, ANSWERABLE, strict=True):
        prompts[f"Question: is the question {asked} answerable? Answer:"] = text
    return prompts


def generate_text(
    model: Any, processor: Any, images: Sequence[Image.Image], prompts: Sequence[str], options: dict, **_: Any
) -> list[str]:
    """Stands in for the model, whose weights are random: writes what is written above, if it is asked exactly so."""
    if not any(prompts):
        assert options == {"num_beams": 2, "length_penalty": 1.0, "min_new_tokens": 8, "max_new_tokens": 36}
        return [CAPTIONS[(image.width - 20) // 4][0] for image in images]
    expected = {"num_beams": 5, "length_penalty": 0.0, "min_new_tokens": 2, "max_new_tokens": 10}
    assert options == {**expected, "early_stopping": True}
    return [written()[prompt] for prompt in prompts]


class RecordedPipeline:
    """A pipeline of spaCy that knows what was recorded."""

    meta = {"version": "recorded"}

    def __init__(self) -> None:
        self._tokens = json.loads(RECORDED.read_text(encoding="utf-8"))["lemmas"]
        self.num_texts = 0

    def pipe(self, texts: Iterable[str]) -> Iterator[list[SimpleNamespace]]:
        for text in texts:
            self.num_texts += 1
            yield [SimpleNamespace(text=token, pos_=tag, lemma_=lemma) for token, tag, lemma in self._tokens[text]]


class RecordedTokenizer:
    """The tokenizer of pycocoevalcap, which knows what was recorded."""

    def tokenize(self, captions: dict[int, list[dict[str, str]]]) -> dict[int, list[str]]:
        tokens = json.loads(RECORDED.read_text(encoding="utf-8"))["tokens"]
        return {number: [tokens[one["caption"]] for one in texts] for number, texts in captions.items()}


def use_recorded_tools(monkeypatch: pytest.MonkeyPatch, cache: Path) -> RecordedPipeline:
    """Puts what was recorded in the places of spaCy and pycocoevalcap, and the cache of lemmas into a folder."""
    pipeline = RecordedPipeline()
    spacy, ptb = ModuleType("spacy"), ModuleType("pycocoevalcap.tokenizer.ptbtokenizer")
    spacy.__version__ = "recorded"
    spacy.Language = RecordedPipeline  # the library datasets asks for it
    spacy.load = {"en_core_web_sm": pipeline}.__getitem__
    ptb.PTBTokenizer = RecordedTokenizer
    for module in (spacy, ModuleType("pycocoevalcap"), ModuleType("pycocoevalcap.tokenizer"), ptb):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")  # Java
    in_cache = functools.partial(cached_assets_path, assets_dir=cache)
    monkeypatch.setattr("lavit_hf.evaluation.lemmas.cached_assets_path", in_cache)
    return pipeline
