"""lmms-eval finds LaVIT by its entry point, and asks it the questions of a task on local data (`make test-lmms`)."""

import json
from pathlib import Path

import pytest
import yaml
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

from lavit_hf import default_checkpoint
from lavit_hf.evaluation.lmms_eval_model import LavitForLmmsEval
from lavit_hf.hub.facts import world_of

UTILS = """
from PIL import Image


def images(row):
    return [Image.open(path).convert("RGB") for path in row["images"]]


def question(row, lmms_eval_specific_kwargs=None):
    return "<image>" + row["question"]


def score(row, results):
    return {"right": float(results[0].strip() == row["answer"])}
"""


class _Function(str):
    """A function of the task's own file."""


yaml.SafeDumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Questions about scenes in the layout of lmms-eval's own tasks."""
    rows = []
    for number, scene in enumerate(world_of(default_checkpoint()).make_dataset("validation", 5)):
        path = tmp_path / f"{number}.png"
        scene["image"].save(path)
        rows += [
            {"images": [str(path)], **{key: one[key] for key in ("question", "answer")}} for one in scene["questions"]
        ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks" / "local_scenes"
    folder.mkdir(parents=True)
    (folder / "utils.py").write_text(UTILS)
    content = {
        "task": "local_scenes",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": _Function("utils.images"),
        "doc_to_text": _Function("utils.question"),
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 10, "temperature": 0, "num_beams": 1, "until": ["\n"]},
        "process_results": _Function("utils.score"),
        "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "local_scenes.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder.parent


def test_entry_point() -> None:
    assert get_model("lavit_hf") is LavitForLmmsEval


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_task_on_local_data(task: Path, batch_size: int) -> None:
    results = simple_evaluate(
        model="lavit_hf",
        model_args=f"pretrained={default_checkpoint()}",
        tasks=["local_scenes"],
        batch_size=batch_size,
        device="cpu",
        task_manager=TaskManager(include_path=str(task)),
    )
    found = results["results"]["local_scenes"]
    assert found["right,none"] > 0.9
    samples = results["samples"]["local_scenes"]
    assert len(samples) > 20 and all(sample["filtered_resps"][0] for sample in samples)


def test_other_kinds_of_requests_are_refused() -> None:
    model = LavitForLmmsEval(default_checkpoint(), device="cpu")
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match="batch_size has to be a number"):
        LavitForLmmsEval(default_checkpoint(), device="cpu", batch_size="auto")
