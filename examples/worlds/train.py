"""Trains a checkpoint from nothing on a made world, stage by stage, as a recipe says.

    python examples/worlds/train.py --recipe examples/lavit_scenes/recipe.yaml --output_dir out/lavit-scenes

Finished stages are skipped, and an interrupted one goes on from its last checkpoint: after an interruption, run the
same command again. Where a stage was changed or run anew, those made from it have to be removed. `--only` runs some
stages, for example those that do not need each other side by side.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import yaml

from lavit_hf.training import exit_on_write_errors

EXAMPLES = Path(__file__).resolve().parents[1]
_STATE = "trainer_state.json"
_DONE = (
    "finished.yaml"  # in the directory of a stage that is finished: what it was, what of, when, and how long it took
)


def main(arguments: list[str] | None = None) -> None:
    """Runs all stages that are not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where everything goes")
    parser.add_argument("--recipe", type=Path, required=True, help="the stages and their options")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages to run, by default all")
    args = parser.parse_args(arguments)
    stages = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    if not isinstance(stages, dict):
        parser.error(f"{args.recipe} holds no stages")
    if unknown := set(args.only or ()) - set(stages):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(stages)}")
    try:
        check_paths(stages, args.recipe)
    except ValueError as error:
        parser.error(str(error))
    for name in args.only or stages:
        run_stage(name, stages[name], args.output_dir, args.recipe.resolve().parent)


def check_paths(stages: dict[str, Any], recipe: Path) -> None:
    """Makes sure that stages run the scripts of these examples, and write into directories of their own.

    Raises:
        ValueError: One does not.
    """
    for name, stage in stages.items():
        if not re.fullmatch(r"\w+", str(name)):
            raise ValueError(f"{recipe}: {name!r} cannot be the name of a stage, which is also that of its directory.")
        script = stage.get("script") if isinstance(stage, dict) else None
        if not isinstance(script, str) or not (EXAMPLES / script).resolve().is_relative_to(EXAMPLES):
            raise ValueError(f"{recipe}: the stage {name} has no script of these examples, but {script!r}.")


def run_stage(name: str, stage: dict[str, Any], out: Path, here: Path) -> None:
    """Runs a stage as a process of its own, with a log beside its directory.

    Args:
        name: Its name, and that of its directory.
        stage: Its script and options.
        out: Where the directories of all stages are.
        here: Where the recipe is.

    Raises:
        SystemExit: If it fails, or was finished with other options or from other stages.
    """
    folder = out / name
    made_from = {source: finished(out / source)["at"] for source in sources(stage) if finished(out / source)}
    if before := finished(folder):
        if before["stage"] != stage or before["made_from"] != made_from:
            raise SystemExit(
                f"{name} finished before with other options, or from other stages: remove {folder} to run it again, "
                "or use another directory."
            )
        print(f"{name}: finished before")
        return
    folder.mkdir(parents=True, exist_ok=True)
    words = [*options(stage, out, here), "--output_dir", str(folder), *resume(folder)]
    command = [sys.executable, str(EXAMPLES / stage["script"]), *words]
    log, start = out / f"{name}.log", time.monotonic()
    print(f"{name}: {' '.join(command)} >> {log}", flush=True)
    with log.open("a", encoding="utf-8") as file:
        code = run_process(command, file)
    # At their end trainings save the trainer's state; one that got the signal itself has saved a checkpoint only.
    if code is None or (code == 0 and any(folder.glob("checkpoint-*")) and not (folder / _STATE).exists()):
        raise SystemExit(
            f"{name} was stopped by SIGTERM, after which scripts save. The same command goes on from there."
        )
    if code:
        raise SystemExit(
            f"{name} failed with exit status {code}; {log} says why. The same command goes on from there."
        )
    took = round(time.monotonic() - start)
    done = {"at": time.time(), "seconds_in_the_last_run": took, "made_from": made_from, "stage": stage}
    partial = folder / f".{_DONE}"
    partial.write_text(yaml.safe_dump(done, sort_keys=False), encoding="utf-8")
    partial.replace(folder / _DONE)


def run_process(command: list[str], log: IO[str]) -> int | None:
    """Runs a command, which gets SIGTERM as well; returns its exit status, or `None` if that signal came."""
    process, is_stopped = None, False

    def stop(number: int, frame: Any) -> None:
        nonlocal is_stopped
        is_stopped = True
        if process is not None:
            process.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        if is_stopped:  # while it was started
            process.terminate()
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    return None if is_stopped else code


def finished(folder: Path) -> dict[str, Any]:
    """What is noted about a finished stage; nothing if it is not finished."""
    path = folder / _DONE
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}


def sources(stage: dict[str, Any]) -> list[str]:
    """The stages that this one starts from."""
    return sorted(set(re.findall(r"\{out\}/(\w+)", yaml.safe_dump(stage))))


def options(stage: dict[str, Any], out: Path, here: Path) -> list[str]:
    """Options of a stage as words of a command line."""
    words = []
    for option, value in (stage.get("options") or {}).items():
        values = [str(one).format(out=out, here=here) for one in (value if isinstance(value, list) else [value])]
        words += [f"--{option}", *values]
    return words


def resume(folder: Path) -> list[str]:
    """What tells a script to go on from its last complete checkpoint; it knows best which that is."""
    return ["--resume_from_checkpoint", "latest"] if any(folder.glob("checkpoint-*")) else []


if __name__ == "__main__":
    with exit_on_write_errors():
        main()
