"""Every metric loads offline, by name and as a folder, in several processes at once, and leaves no files behind."""

import doctest
import multiprocessing
from importlib import import_module
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import evaluate
import pytest

import lavit_hf.evaluation.metrics
from evaluation.metrics.tiny_networks import save_mean_color, save_tiny_clip
from lavit_hf.evaluation.metrics import METRICS, load_metric

FOLDER = Path(lavit_hf.evaluation.metrics.__file__).parent
TEXTS = {"predictions": ["a cat", "two"], "references": [["a cat"] * 10, ["2"] * 9 + ["3"]]}
OF_TEXTS = ["bleu", "cider", "exact_match", "vqa_accuracy"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What users have to give."""
    folder = tmp_path_factory.mktemp("networks")
    return {
        "clip_score": {"model_name_or_path": str(save_tiny_clip(folder / "clip"))},
        "fid": {"inception_path": str(save_mean_color(folder / "mean_color.pt"))},
    }


def test_every_folder_is_listed() -> None:
    assert list(METRICS) == sorted(path.stem for path in FOLDER.glob("*/*.py") if path.stem == path.parent.name)


@pytest.mark.parametrize("name", METRICS)
def test_both_ways_of_loading(name: str, options: dict[str, dict], tmp_path: Path) -> None:
    by_name = load_metric(name, **options.get(name, {}))
    by_folder = evaluate.load(str(FOLDER / name), cache_dir=str(tmp_path), **options.get(name, {}))
    assert isinstance(by_name, evaluate.Metric) and by_folder.name == by_name.name
    for text in (by_name.description, by_name.citation, by_name.inputs_description, *by_name.reference_urls):
        assert text.strip()
    assert by_folder.features == by_name.features


@pytest.mark.parametrize("name", OF_TEXTS)
def test_examples(name: str) -> None:
    text = import_module(f"lavit_hf.evaluation.metrics.{name}.{name}")._KWARGS_DESCRIPTION
    examples = doctest.DocTestParser().get_doctest(text, {"load_metric": load_metric}, name, None, 0)
    assert examples.examples
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples).failed == 0


def compute_together(barrier: Barrier, results: SimpleQueue, cache_dir: str) -> None:
    for name in OF_TEXTS:
        metric = evaluate.load(str(FOLDER / name), cache_dir=cache_dir)  # on the disk, unlike `load_metric`
        barrier.wait(timeout=300)
        results.put((name, metric.compute(**TEXTS)))


def test_several_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    context = multiprocessing.get_context("fork")  # new interpreters would import everything anew
    barrier, results = context.Barrier(2), context.SimpleQueue()
    arguments = (barrier, results, str(tmp_path / "cache"))
    processes = [context.Process(target=compute_together, args=arguments, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
    assert [process.exitcode for process in processes] == [0, 0]
    found = [results.get() for _ in range(2 * len(OF_TEXTS))]
    for name in OF_TEXTS:
        assert [result for other, result in found if other == name] == [load_metric(name).compute(**TEXTS)] * 2
    assert list(work.iterdir()) == []


def test_batches_add_up_and_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metric = load_metric("exact_match", cache_dir=str(tmp_path / "cache"))
    metric.add_batch(predictions=["cat", "dog"], references=[["cat"], ["cat"]])
    metric.add(prediction="red", reference=["red"])
    assert metric.compute()["scores"] == [1.0, 0.0, 1.0]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_bad_names() -> None:
    with pytest.raises(ValueError, match="no metric rouge; known are bleu, cider"):
        load_metric("rouge")
    with pytest.raises(ValueError, match="cider has no option sigmaa"):
        load_metric("cider", sigmaa=3)
