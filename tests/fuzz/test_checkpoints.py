"""Checkpoints with a damaged or edited file: an error that names it, or the ids of the undamaged checkpoint."""

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fuzz.checkpoint_uses import ANSWER
from fuzz.runner import blocks, check_all, seeded_rng

NAME = "fuzzed-checkpoint"
ORIGINAL = Path(__file__).parents[1] / "data" / "tiny-original"
# Read by the tests of the original alone.
_NO_CHECKPOINT = ("golden.safetensors", "golden_merger.safetensors", "golden_meta.json", "dims.json", "README.md")
MEMORY = 2 * 2**30
SECONDS = 120  # of each use
_SHORT = 4  # a shorter value is in a message by chance
# The last one is of configurations, and names the field.
_CLEAR = {"ValueError", "TypeError", "OSError", "StrictDataclassFieldValidationError"}
WHOLE = ["model", "processor", "visual_tokenizer", "pixel_decoder", "text_to_image", "caption"]
TOOLS = ["to_original", "publish", "export_llama"]
VALUES = [
    *(None, True, False, 0, -1, 1, 7, 10**7, 2**31, 10**30, -(10**9), 0.5, 1e400, float("nan"), "", "7", "a"),
    *("../../x", "/etc/passwd", [], [1], [None], {}, {"a": 1}, "\ud800", "a" * 10000, [[[[]]]], "os.system"),
]


@dataclass
class Mutation:
    """What was done to a checkpoint.

    Attributes:
        file: Which file, relative to the checkpoint.
        what: What was done to it.
        names: What an error may name instead of the file.
        is_data: Whether weights themselves were changed, or texts that a tokenizer is made of: then results differ.
        is_setting: Whether a value of a configuration was changed, which may be meant so.
    """

    file: str
    what: str
    names: list[str]
    is_data: bool = False
    is_setting: bool = False


def uses_of(file: str) -> list[str]:
    """What reads a file."""
    if file.startswith(("token_decoder/", "unet/", "vae/", "scheduler/", "model_index")):
        return ["pixel_decoder", "text_to_image", "to_original", "publish"]
    if file.startswith(("original/", "lowres/")):
        return ["to_original", "publish"]
    return [*WHOLE, *TOOLS]


def mutate(rng: random.Random, folder: Path) -> Mutation:
    """Changes one file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".py")
    weights = [path for path in files if path.suffix in (".safetensors", ".bin", ".model")]
    texts = [path for path in files if path.suffix == ".json"]
    others = sorted(set(files) - set(weights) - set(texts))
    path = rng.choice(rng.choices([texts, weights, others], [6, 3, 1])[0] or files)
    content, name = path.read_bytes(), path.relative_to(folder).as_posix()
    mutation = Mutation(name, "", [path.name])
    kinds = ["flip", "flip", "cut", "empty", "remove", "append", "replace"]
    kind = rng.choice(["value"] * 12 + kinds if path in texts else kinds)
    path.unlink()  # a link to the original
    if kind == "remove":
        mutation.what = "removed"
        return mutation
    if kind == "value":
        content = change_value(rng, content, mutation)
    elif kind == "flip":
        content = flip(rng, content, mutation)
    else:
        mutation.what = kind
        end = {"cut": rng.randrange(len(content)), "empty": 0, "replace": 0, "append": len(content)}[kind]
        content = content[:end]
        if kind == "append":
            content += rng.randbytes(50)
        elif kind == "replace":
            content = rng.choice(
                [b"[]", b"null", b"{}", b"3", b'"a"', b"\xff\xfe", b"[" * 100_000, rng.randbytes(500)]
            )
    mutation.is_data |= name == "tokenizer.json" or path.suffix in (".bin", ".model", ".jinja", "")
    path.write_bytes(content)
    return mutation


def flip(rng: random.Random, content: bytes, mutation: Mutation) -> bytes:
    """Changes bytes, of weights in their header or in the numbers."""
    if not content:
        return b"x"
    changed, first = bytearray(content), 0
    if mutation.file.endswith(".safetensors"):
        header = 8 + int.from_bytes(content[:8], "little")
        mutation.is_data = rng.random() < 0.3
        first, last = (header, len(content)) if mutation.is_data else (0, header)
    else:
        last = len(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        position = rng.randrange(first, last)
        changed[position] ^= 1 << rng.randrange(8)
        mutation.what += f" byte {position} is {bytes(changed[position : position + 1])!r},"
    if mutation.file.endswith(".json"):
        mutation.is_setting = True  # what stays JSON is a value
        with contextlib.suppress(ValueError, RecursionError):
            before, after = leaves(json.loads(content)), leaves(json.loads(changed))
            mutation.names += [str(one) for place in dict(before ^ after) for one in place]
            mutation.names += [value.strip('"') for _, value in after - before if len(value) > _SHORT]
    return bytes(changed)


def leaves(value: Any, *place: Any) -> set[tuple[tuple, str]]:
    """Places and values of JSON that hold no others."""
    if isinstance(value, (dict, list)) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {leaf for key, part in items for leaf in leaves(part, *place, key)}
    return {(place, json.dumps(value))}


def change_value(rng: random.Random, content: bytes, mutation: Mutation) -> bytes:
    """Replaces, removes or repeats a value somewhere in JSON."""
    values = json.loads(content)
    places = [place for place in containers(values) if place]
    if not places:
        return b"{"
    container = rng.choice(places)
    key = rng.choice(list(container)) if isinstance(container, dict) else rng.randrange(len(container))
    before = container[key]
    mutation.names.append(str(key) if isinstance(container, dict) else repr(before))
    mutation.is_setting = True
    kind = rng.choice(["replace", "replace", "replace", "remove", "scale", "repeat"])
    if kind == "scale" and isinstance(before, (int, float)) and not isinstance(before, bool):
        container[key] = rng.choice([before + 1, -before, before * 2, before * 10**7, before - 1, float(before)])
    elif kind == "repeat" and isinstance(container, dict):
        repeated = json.dumps({f"{key}@": rng.choice(VALUES)})[1:-1].replace("@", "")
        mutation.what = f"{key} twice: {repeated[:80]}"
        text = json.dumps(values)
        position = text.find(json.dumps({key: before})[1:-1])
        return (text[:position] + repeated + ", " + text[position:]).encode("utf-8", "surrogatepass")
    elif kind == "remove":
        del container[key]
        mutation.what = f"without {key} ({before!r:.80})"
        return json.dumps(values).encode()
    else:
        container[key] = rng.choice(VALUES)
    if len(repr(container[key])) > _SHORT:
        mutation.names.append(str(container[key]))
    mutation.what = f"{key}: {container[key]!r:.80} instead of {before!r:.80}"
    return json.dumps(values).encode("utf-8", "surrogatepass")


def containers(value: Any) -> Iterator[Any]:
    """All objects and lists of JSON, those of a few values as often as those of many."""
    if isinstance(value, (dict, list)):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from containers(part)


def copy_checkpoint(source: Path, folder: Path) -> Path:
    """A copy that costs nothing; a file of it is replaced, never written to."""
    ignore = shutil.ignore_patterns(*_NO_CHECKPOINT) if source == ORIGINAL else None
    return Path(shutil.copytree(source, folder / NAME, copy_function=os.link, ignore=ignore))


def run(jobs: Any, folder: Path, uses: list[str]) -> dict[str, dict[str, Any]]:
    """The answers of a checkpoint's uses."""
    copied = str(folder / NAME)
    result = jobs.run(
        "fuzz.checkpoint_uses:use_all", uses, copied, cwd=folder, seconds=SECONDS * len(uses), memory=MEMORY
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith(ANSWER)]
    answers = {answer["use"]: answer for answer in (json.loads(line[len(ANSWER) :]) for line in lines)}
    missing = [name for name in uses if name not in answers]
    ending = "hangs" if result.code is None else f"ended with {result.code}: {result.stderr[-300:]}"
    assert not missing, f"{missing[0]} {ending}"
    return answers


@pytest.fixture(scope="module")
def sound(jobs: Any, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the undamaged checkpoint answers."""
    folders = [tmp_path_factory.mktemp("sound") for _ in range(2)]
    copy_checkpoint(tiny_checkpoint, folders[0])
    copy_checkpoint(ORIGINAL, folders[1])
    answers = run(jobs, folders[0], WHOLE + TOOLS) | run(jobs, folders[1], ["convert"])
    for name, answer in answers.items():
        assert "error" not in answer and answer.get("code", 0) == 0, f"{name}: {answer}"
    return answers


def problems(name: str, answer: dict[str, Any], sound: dict[str, Any], mutation: Mutation) -> Iterator[str]:
    """What is wrong about an answer."""
    if "error" in answer:
        kinds, message = answer["kinds"], answer["error"]
        is_raw = {"UnicodeError", "JSONDecodeError"} & set(kinds)
        if is_raw or not _CLEAR & set(kinds):
            yield f"raw {kinds[0]} at {answer['where']}: {message[:200]}"
        elif not is_named(message, mutation):
            yield f"{kinds[0]} names neither file nor value, at {answer['where']}: {message[:200]}"
    elif "code" in answer:
        yield from problems_of_command(answer, sound, mutation)
    else:
        log = answer["log"]
        is_told = any(word in log for word in ("newly initialized", "MISSING", "MISMATCH", "UNEXPECTED"))
        changed = [key for key, value in sound["ids"].items() if answer["ids"].get(key) != value]
        if mutation.is_data:
            changed = [key for key in changed if key != "input_ids"]
        if changed:
            key = changed[0]
            yield f"other ids without an error: {key} is {answer['ids'].get(key)!s:.80}, not {sound['ids'][key]!s:.80}"
        if not answer["is_finite"] and not mutation.is_data:
            yield "computes what is no number, without an error"
        if answer["values"] != sound["values"] and not (mutation.is_data or mutation.is_setting or is_told):
            yield "other results without an error"


def problems_of_command(answer: dict[str, Any], sound: dict[str, Any], mutation: Mutation) -> Iterator[str]:
    errors, code = answer["stderr"].strip(), answer["code"]
    if code == 0:
        missing = set(sound["written"] or []) - set(answer["written"] or [])
        if missing and mutation.what != "removed" and not mutation.is_setting:
            yield f"exits with 0, but did not write {min(missing)}"
        return
    last = errors.splitlines()[-1] if errors else ""
    if code != 1 or "Traceback" in errors or not last.startswith("lavit: error: "):
        yield f"exits with {code}: {errors[-300:]}"
    elif re.match(r"lavit: error: (?!StrictDataclassField)\w+(Error|Exception|StopIteration|Interrupt): ", last):
        yield f"raw error: {last[:250]}"
    elif not is_named(last, mutation):
        yield f"names neither file nor value: {last[:250]}"
    if answer["written"]:
        yield f"left {answer['written'][0]} behind"


def is_named(message: str, mutation: Mutation) -> bool:
    return any(name in message for name in (NAME, *mutation.names))


def check_checkpoint(seed: int, jobs: Any, sound: dict[str, Any], tiny_checkpoint: Path, folder: Path) -> None:
    rng = seeded_rng("checkpoint", seed)
    is_original = rng.random() < 0.15
    copied = copy_checkpoint(ORIGINAL if is_original else tiny_checkpoint, folder)
    mutation = mutate(rng, copied)
    uses = ["convert"] if is_original else uses_of(mutation.file)
    uses = rng.sample(uses, min(3, len(uses)))
    shown = f"{mutation.file} {mutation.what}"
    try:
        answers = run(jobs, folder, uses)
    except AssertionError as error:
        raise AssertionError(f"{shown}: {error}") from None
    found = [f"{name} {problem}" for name in uses for problem in problems(name, answers[name], sound[name], mutation)]
    strays = {path.name for path in folder.iterdir()} - {NAME, "picture.png"}
    found += [f"left behind: {', '.join(sorted(strays))}"] * bool(strays)
    shutil.rmtree(folder)
    assert not found, f"{shown}: " + " | ".join(found)


@blocks("checkpoints")
def test_checkpoints(seeds: list[int], jobs, sound, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def check(seed: int) -> None:
        (tmp_path / str(seed)).mkdir()
        check_checkpoint(seed, jobs, sound, tiny_checkpoint, tmp_path / str(seed))

    check_all(seeds, check, seconds=10 * SECONDS)
