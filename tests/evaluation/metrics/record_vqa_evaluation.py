"""Records what the official VQA evaluation says of some answers: vqa_evaluation.json.

Run by hand, `python record_vqa_evaluation.py VQA/PythonEvaluationTools`, with a checkout of GT-Vision-Lab/VQA (with
the parentheses of Python 3 after `print`, if it lacks them).
"""

import json
import random
import sys
from pathlib import Path

ANSWERS = """yes;no;Yes.;2;two;none;0;The cat;a cat;cat;t-shirt;t shirt;tshirt;dont walk;don't walk;100,978;100978
girl's;girls;2:50 pm;2:50 p.m.;3.5;3.5.;black/white;black white;black, white;"stop";stop;stop!;its;it's;somebody'd
couldnt've;couldn'tve;ten people;10 people;yall;y'all;(left);left;on the left;new\tyork;wii-mote,;a;the;on top_of
1,5 or 2;what?"""


class Data:
    """What the official code asks for."""

    def __init__(self, qa: dict):
        self.qa = qa

    def getQuesIds(self) -> list:
        return list(self.qa)


def make_questions() -> list[dict]:
    """Every answer meets humans who agree with it to some degree, or all agree on one answer."""
    answers = ANSWERS.replace("\n", ";").split(";")
    rng = random.Random(0)
    questions = []
    for count in range(11):  # how many of the ten gave the answer
        questions.append({"prediction": "blue", "answers": ["blue"] * count + ["red"] * (10 - count)})
    for prediction in answers:
        questions.append({"prediction": prediction, "answers": [prediction] * 10})
        for _ in range(3):
            pool = [prediction, *rng.sample(answers, 2)]
            questions.append({"prediction": rng.choice(answers), "answers": rng.choices(pool, k=10)})
            questions.append({"prediction": prediction, "answers": rng.choices(pool, k=10)})
    return questions


def record(folder: str) -> None:
    sys.path.insert(0, folder)
    from vqaEvaluation.vqaEval import VQAEval

    questions = make_questions()
    truth = {
        index: {
            "answers": [{"answer": answer, "answer_id": n} for n, answer in enumerate(question["answers"])],
            "question_type": "any",
            "answer_type": "any",
        }
        for index, question in enumerate(questions)
    }
    predictions = {index: {"answer": question["prediction"]} for index, question in enumerate(questions)}
    evaluation = VQAEval(Data(truth), Data(predictions), n=10)
    evaluation.evaluate()
    for index, question in enumerate(questions):
        text = question["prediction"].replace("\n", " ").replace("\t", " ").strip()
        question["normalized"] = evaluation.processDigitArticle(evaluation.processPunctuation(text))
        question["accuracy"] = evaluation.evalQA[index] / 100
    path = Path(__file__).with_name("vqa_evaluation.json")
    content = {"overall": evaluation.accuracy["overall"] / 100, "questions": questions}
    path.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(sys.argv[1])
