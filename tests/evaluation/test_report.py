"""Metrics as text."""

from lavit_hf.evaluation.measurement import Measurement
from lavit_hf.evaluation.report import format_metrics


def test_a_table_per_task():
    def result(task: str, split: str | None, **metrics: Measurement) -> dict:
        found = {name: measurement.to_dict() for name, measurement in metrics.items()}
        return {"task": task, "data": "data", "split": split, "num_samples": 7, "metrics": found}

    share = Measurement(0.9512, 7, "scenes", (0.9, 1.0), is_share=True)
    text = format_metrics(
        {
            "results": [
                result("caption", "held_out", color=share, tokens=Measurement(9.5, 7, "images", (8.25, 10.0))),
                result("vqa", None, nothing=Measurement(None, 0), cider=Measurement(1.3333, 7)),
            ]
        }
    )
    assert text.splitlines() == [
        "caption (data, held_out, 7 samples)",
        "  color   95.1 %  [90.0, 100.0]    7 scenes",
        "  tokens   9.500  [8.250, 10.000]  7 images",
        "",
        "vqa (data, 7 samples)",
        "  nothing      -    0 samples",
        "  cider    1.333    7 samples",
    ]


def test_names_from_data_stay_on_their_line():
    measured = Measurement(0.5, 7, "a\x1b[2J\nb").to_dict()
    result = {"task": "vqa", "data": "my\ndata", "split": "te\rst", "num_samples": 7, "metrics": {"x\ny": measured}}
    title, row = format_metrics({"results": [result]}).split("\n")
    assert title == "vqa (my data, te st, 7 samples)"
    assert row == "  x y  0.500    7 a [2J b"
