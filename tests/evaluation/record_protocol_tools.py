"""Records what spaCy and the Java tokenizer say of the texts of `miniatures.py`, and of hard captions.

Run by hand in an environment with Java, spaCy, en_core_web_sm and pycocoevalcap 1.2:
`PYTHONPATH=src:tests python tests/evaluation/record_protocol_tools.py`
"""

import json
from pathlib import Path

import spacy
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from evaluation.miniatures import CAPTIONS, QUESTIONS, RECORDED, written
from lavit_hf.evaluation.protocol import cut_original_answer
from lavit_hf.evaluation.tasks import first_sentence

HARD = Path(__file__).parent / "metrics" / "hard_captions.json"
# Beside the miniatures, for the tests of lemmas.
ANSWERS = "dogs;women;he is skiing;geese;is;a dog's leash;don't know;left-handed;more;better;3 people".split(";")  # noqa: SIM905


def tokenize(captions: list[str]) -> list[str]:
    found = PTBTokenizer().tokenize({index: [{"caption": caption}] for index, caption in enumerate(captions)})
    return [found[index][0] for index in range(len(captions))]


if __name__ == "__main__":
    answers = {answer for questions in QUESTIONS.values() for *_, answers, _ in questions for answer in answers}
    texts = sorted(answers | {cut_original_answer(text) for text in written().values()} | set(ANSWERS))
    pipeline = spacy.load("en_core_web_sm")
    lemmas = {
        text: [[token.text, token.pos_, token.lemma_] for token in document]
        for text, document in zip(texts, pipeline.pipe(texts), strict=True)
    }
    captions = [first_sentence(text) for text, _ in CAPTIONS] + [text for _, texts in CAPTIONS for text in texts]
    content = {
        "versions": {"spacy": spacy.__version__, "en_core_web_sm": pipeline.meta["version"], "pycocoevalcap": "1.2"},
        "lemmas": lemmas,
        "tokens": dict(zip(captions, tokenize(captions), strict=True)),
    }
    RECORDED.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    hard = [row[0] for row in json.loads(HARD.read_text(encoding="utf-8"))["captions"]]
    tokens = tokenize(hard)
    # Each caption against the next five.
    references = {index: [tokens[(index + step) % len(hard)] for step in range(1, 6)] for index in range(len(hard))}
    predictions = {index: [text] for index, text in enumerate(tokens)}
    _, cider = Cider().compute_score(references, predictions)
    bleu, _ = Bleu(4).compute_score(references, predictions, verbose=0)
    scores = {"cider": cider.tolist(), "bleu": list(map(float, bleu))}
    rows = [json.dumps(row, ensure_ascii=False) for row in zip(hard, tokens, strict=True)]
    HARD.write_text(
        '{"captions": [\n' + ",\n".join(rows) + '\n],\n"scores": ' + json.dumps(scores) + "}\n", encoding="utf-8"
    )
