"""Evaluation: what a checkpoint says and draws, measured. `lavit evaluate` is this on the command line.

Example:

```python
>>> from lavit_hf.evaluation import TASKS, EvaluatedCheckpoint, evaluate, read_data

>>> task = TASKS["caption"](read_data("scenes", "caption", num_samples=100))
>>> metrics = evaluate(EvaluatedCheckpoint("my-lavit", model, processor), [task], "out/evaluation")
>>> metrics["results"][0]["metrics"]["fully_right"]
{'value': 0.95, 'n': 100, 'unit': 'scenes', 'interval': [0.888, 0.978]}
```
"""

from .benchmarks import BENCHMARKS, Benchmark
from .budget_curve import evaluate_budgets, format_curve
from .checkpoint import EvaluatedCheckpoint
from .data import EvaluationData, EvaluationSample, read_data
from .evaluator import EvaluationSettings, benchmark_settings, build_tasks, evaluate, format_metrics
from .facts import compare_facts, measure_facts, read_facts
from .lemmas import Lemmatizer
from .measurement import Measurement, bootstrap_interval, wilson_interval
from .protocol import (
    cut_original_answer,
    normalize_original_answer,
    original_exact_match,
    original_question,
    original_vqa_accuracy,
)
from .tasks import TASKS, Task

__all__ = [
    "BENCHMARKS",
    "TASKS",
    "Benchmark",
    "EvaluatedCheckpoint",
    "EvaluationData",
    "EvaluationSample",
    "EvaluationSettings",
    "Lemmatizer",
    "Measurement",
    "Task",
    "benchmark_settings",
    "bootstrap_interval",
    "build_tasks",
    "compare_facts",
    "cut_original_answer",
    "evaluate",
    "evaluate_budgets",
    "format_curve",
    "format_metrics",
    "measure_facts",
    "normalize_original_answer",
    "original_exact_match",
    "original_question",
    "original_vqa_accuracy",
    "read_data",
    "read_facts",
    "wilson_interval",
]
