"""Records the tokens (of captions.txt) and scores of pycocoevalcap: pycocoevalcap.json.

Run by hand with Java and pycocoevalcap 1.2 (its wheel of 100 MB, most of it Java, keeps it from being a dependency of
the tests): `pip install --no-deps --target DIR pycocoevalcap==1.2 && PYTHONPATH=DIR python record_pycocoevalcap.py`.
"""

import json
import random
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

FOLDER = Path(__file__).parent
NOUNS = ["man", "woman", "dog", "cat", "bird", "child", "horse", "train", "pizza", "clock"]
ADJECTIVES = ["red", "blue", "small", "large", "old", "young", "wooden", "happy"]
VERBS = ["sits", "stands", "rides", "looks", "sleeps", "waits"]
PLACES = ["street", "table", "beach", "grass", "bench", "field", "kitchen"]


def write_caption(rng: random.Random, noun: str, place: str) -> str:
    """One of several ways to say about the same."""
    adjective, verb = rng.choice(ADJECTIVES), rng.choice(VERBS)
    return rng.choice(
        [
            f"a {adjective} {noun} {verb} on the {place}",
            f"a {noun} that {verb} near a {adjective} {place}",
            f"there is a {noun} in the {place}",
            f"the {noun} {verb} and the {noun} {verb} by the {place} with a {rng.choice(NOUNS)}",
            f"{adjective} {noun} on {place}",
            f"{noun}",
        ]
    )


def make_captions(num_images: int = 40) -> list[dict]:
    rng = random.Random(0)
    samples = []
    for index in range(num_images):
        noun, place = rng.choice(NOUNS), rng.choice(PLACES)
        references = [write_caption(rng, noun, place) for _ in range(1 + index % 5)]
        samples.append({"prediction": write_caption(rng, noun, place), "references": references})
    samples[3]["prediction"] = samples[3]["references"][0]
    samples[7]["prediction"] = ""
    samples[11]["prediction"] = "a a a a a a a a a a a a"
    samples[13]["prediction"] = "nothing else here shares words"
    return samples


def score(samples: list[dict]) -> dict:
    predictions = {index: [sample["prediction"]] for index, sample in enumerate(samples)}
    references = {index: sample["references"] for index, sample in enumerate(samples)}
    cider, scores = Cider().compute_score(references, predictions)
    bleu, _ = Bleu(4).compute_score(references, predictions, verbose=0)
    return {"samples": samples, "cider": float(cider), "cider_scores": scores.tolist(), "bleu": list(map(float, bleu))}


def tokenize(captions: list[str]) -> list[str]:
    tokens = PTBTokenizer().tokenize({index: [{"caption": caption}] for index, caption in enumerate(captions)})
    return [tokens[index][0] for index in range(len(captions))]


if __name__ == "__main__":
    captions = (FOLDER / "captions.txt").read_text(encoding="utf-8").splitlines()
    content = {**score(make_captions()), "tokenized": tokenize(captions)}
    path = FOLDER / "pycocoevalcap.json"
    path.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
