"""The benchmark of full size, at tiny size on a CPU."""

import importlib
import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from lavit_hf.conversion import plan

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"
STEPS = ("lora", "qlora", "stage_1", "stage_3")
ROWS = ("first_drawing", "codes", "text", "captions", "encode", "picture", "batch", *STEPS)
QUANTIZED = ("text_int8", "text_fp8", "text_int4", "text_nf4")


@pytest.fixture
def module(monkeypatch):
    """A module of the benchmark."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def run(python: str, folder: Path, *options: object) -> subprocess.CompletedProcess:
    command = [python, FOLDER / "run.py", "--tiny", "--device", "cpu", "--output", folder, *options]
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)


def test_every_row(python, tmp_path):
    result = run(python, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert tuple(found["rows"]) == (*ROWS, *QUANTIZED, "loading")
    for name in ("qlora", *QUANTIZED[1:]):  # no CPU does this
        (missing,) = found["rows"][name]["not_run"]
        assert missing["why"] == "needs CUDA" and f"| {missing['what']} | not run: needs CUDA |" in result.stdout
    int8 = found["rows"]["text_int8"]
    if find_spec("torchao"):
        assert 0 <= int8["results"][0]["notes"]["equal_ids"] <= 1
    else:
        assert int8["not_run"][0]["why"] == "torchao is not installed"
    assert found["size"] == "tiny" and found["device"] and found["versions"].keys() >= {"torch", "transformers"}
    assert Image.open(tmp_path / "results.png").size[0] > 1000
    results = [one for row in found["rows"].values() for one in row["results"]]
    for one in results:
        assert one["value"] > 0 and one["is_met"] is None and f"| {one['what']} |" in result.stdout
        assert one["timing"] is None or (len(one["timing"]["seconds"]), len(one["timing"]["warm_up"]) > 0) == (5, True)
        assert all(value > 0 for value in (*one["peers"].values(), one["floor"] or 1))
    assert {one["what"] for one in results if one["bar"]} >= {"guided codes, batch 1", "text, batch 1", "loading"}
    assert all(row["floors"]["bandwidth"] > 0 and row["floors"]["flops"] > 0 for row in found["rows"].values())

    # Again, one in a process of its own, and one that cannot: that is its result, and the others stay.
    (tmp_path / "file").touch()
    again = run(python, tmp_path, "--only", "text", "--only", "loading", "--isolate", "--scratch", tmp_path / "file")
    assert again.returncode == 1, again.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows["text"] != found["rows"]["text"] and rows["text"]["results"]
    assert rows["loading"]["error"].startswith("FileExistsError: ") and rows["loading"]["error"] in again.stdout
    assert {name: row for name, row in rows.items() if name not in ("text", "loading")} == {
        name: row for name, row in found["rows"].items() if name not in ("text", "loading")
    }


def test_it_is_the_published_layout(module):
    with torch.device("meta"):
        model = module("full_size").AutoModelForImageTextToText.from_config(module("full_size").Size().config)
    count, parameters = plan(ROOT / "tests/data/published-7b-manifest.json").models[""]
    assert (len(model.state_dict()), sum(one.numel() for one in model.state_dict().values())) == (count, parameters)


def test_shares_and_ratios(module):
    report = module("report")
    faster = report.Result("", 50.0, "codes/s", floor=200.0)
    shorter = report.Result("", 4.0, "s", floor=1.0)
    assert faster.share == shorter.share == 0.25
    assert report.compare(50.0, 25.0, "codes/s") == report.compare(2.0, 4.0, "s") == 2.0
    assert faster.require("more", faster.share > 0.5).is_met is False


def test_what_was_measured_before_an_error_stays(module, monkeypatch, tmp_path):
    report, run = module("report"), module("run")

    def broken(bench):
        yield report.Result("one", 1.0, "s")
        raise RuntimeError("CUDA out of memory.\nTried to allocate much.")

    monkeypatch.setitem(run.ROWS, "text", broken)
    given = run.parse(["--tiny", "--device", "cpu", "--output", str(tmp_path)])
    row = run.run_row("text", given)
    assert [one["what"] for one in row["results"]] == ["one"]
    assert row["error"] == "RuntimeError: CUDA out of memory."
    table = report.markdown({**run.environment(given), "rows": {"text": row}})
    assert "| one | 1 s |" in table and "| text | RuntimeError: CUDA out of memory. |" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "3", "--device", "cpu"], "a median of fewer says little"),
        (["--only", "nothing"], "invalid choice"),
        (["--device", "cpu", "--quantization", "fp8"], "a part of what --optimize"),
        pytest.param(
            [],
            "finds no such GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which it would start"),
        ),
    ],
)
def test_refusals(module, capsys, options, message):
    with pytest.raises(SystemExit):
        module("run").parse(options)
    assert message in capsys.readouterr().err
