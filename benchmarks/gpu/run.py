"""What LaVIT reaches at full size on one GPU, beside what the GPU could do, and what transformers and diffusers do.

    python benchmarks/gpu/run.py [--only codes --only picture] [--output out/gpu]
    python benchmarks/gpu/run.py --tiny --device cpu    # the same on any machine, to see whether it runs

The published 7B layout is built with random weights on the device itself, in seconds; nothing is downloaded. Each row
runs in a process of its own, so that what one leaves behind, or an error, does not touch the others. Its results are
in results.json of the output at once, with the device and all versions, and beside those of earlier calls on the same
machine; results.png shows them all. Times are medians of at least five calls after three that warm up; what these took
is given apart. The floors, copy bandwidth and the peak of products, are measured in the same process as the row, and
so are the peers. docs/performance.md says more.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from full_size import SIZES, Bench
from report import RESULTS, NotRun, markdown, plot, read_results, write_results
from rows import CHILDREN, ROWS

from lavit_hf.utils.json_files import read_json_object

PACKAGES = ("lavit-hf", "transformers", "diffusers", "peft", "triton", "torchao", "bitsandbytes")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=ROWS, help="a row to measure; may be given several times")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: whether it runs, not how fast")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="by default float32 on CPUs only")
    parser.add_argument("--repeats", type=int, default=5, help="calls that are measured, five at least")
    parser.add_argument(
        "--output", type=Path, default=Path("out/gpu"), help="directory of results.json and results.png"
    )
    parser.add_argument(
        "--scratch", type=Path, help="where loading writes its 17 GB and removes them; by default the output"
    )
    parser.add_argument(
        "--optimize",
        choices=("no", "blocks", "whole"),
        help="what pipelines compile of the U-Net; by default, nothing on a CPU and its blocks elsewhere",
    )
    parser.add_argument("--quantization", choices=("fp8", "int8"), help="of the U-Net, by torchao")
    parser.add_argument(
        "--isolate", action=argparse.BooleanOptionalAction, help="a process for each row; by default on GPUs"
    )
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.repeats < 5:
        parser.error("--repeats must be 5 at least: a median of fewer says little.")
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {given.device}: PyTorch finds no such GPU. On a CPU: --tiny --device cpu.")
    is_cpu = given.device == "cpu"
    given.dtype = given.dtype or ("float32" if is_cpu else "bfloat16")
    given.optimize = given.optimize or ("no" if is_cpu else "blocks")
    if given.quantization and given.optimize == "no":
        parser.error("--quantization is a part of what --optimize blocks and whole do.")
    given.isolate = not is_cpu if given.isolate is None else given.isolate
    given.scratch = given.scratch or given.output
    return given


def environment(given: argparse.Namespace) -> dict[str, Any]:
    """What the numbers belong to."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    if given.device.startswith("cuda"):
        name = torch.cuda.get_device_name(given.device)
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    else:
        name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    options = {"size": "tiny" if given.tiny else "7B", "dtype": given.dtype}
    options |= {"optimize": given.optimize, "quantization": given.quantization}
    return {"device": name, **options, "versions": versions}


def child_command(given: argparse.Namespace, *more: str) -> list[str]:
    """This program with the same options, in a process of its own."""
    options = ["--device", given.device, "--dtype", given.dtype, "--repeats", str(given.repeats)]
    options += ["--output", str(given.output), "--scratch", str(given.scratch)]
    options += ["--optimize", given.optimize, *(["--tiny"] if given.tiny else [])]
    options += ["--quantization", given.quantization] if given.quantization else []
    return [sys.executable, __file__, *options, *more]


def run_row(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measures a row here. An error is a part of its result, beside what was measured before."""
    bench = Bench(
        SIZES["tiny" if given.tiny else "7B"](),
        torch.device(given.device),
        getattr(torch, given.dtype),
        given.repeats,
        given.optimize,
        given.quantization,
        given.scratch,
        lambda *more: child_command(given, *more),
    )
    found: dict[str, Any] = {"results": []}
    try:
        found["floors"] = bench.floors._asdict()
        for result in ROWS[name](bench):
            if isinstance(result, NotRun):
                found.setdefault("not_run", []).append(asdict(result))
                continue
            if given.tiny:
                result.is_met = None  # the bars are for the full size
            found["results"].append(result.as_dict())
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        found["error"] = f"{type(error).__name__}: {lines[0]}"
    return found


def run_isolated(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measures a row in a process of its own, which a crash ends alone."""
    with tempfile.TemporaryDirectory() as folder:
        command = child_command(given, "--only", name, "--no-isolate", "--output", folder)
        status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        path = Path(folder) / RESULTS
        if not path.is_file():
            return {"results": [], "error": f"its process ended with exit status {status}"}
        return read_json_object(path)["rows"][name]


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    if given.child:
        CHILDREN[given.child](SIZES["tiny" if given.tiny else "7B"](), given)
        return 0
    given.output.mkdir(parents=True, exist_ok=True)
    found = read_results(given.output, environment(given))
    for name in given.only or ROWS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found["rows"][name] = (run_isolated if given.isolate else run_row)(name, given)
        write_results(given.output, found)
    plot(found, given.output / "results.png")
    print(markdown(found))
    return 1 if any("error" in found["rows"][name] for name in given.only or ROWS) else 0


if __name__ == "__main__":
    sys.exit(main())
