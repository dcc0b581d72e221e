"""Commands and training scripts, killed at any moment: nothing is half-written, and the next run makes it good."""

import hashlib
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

from fuzz.runner import blocks, check_all, seeded_rng
from lavit_hf import LavitForConditionalGeneration, LavitImageProcessorPil
from lavit_hf.data.scenes import make_scenes
from lavit_hf.training import get_lora_config
from tiny_models import build_visual_tokenizer
from tiny_pixel_decoders import EPSILON, build_token_decoder, build_vae, share_codes, unet_config

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
ORIGINAL = ROOT / "tests" / "data" / "tiny-original"
TINY = ROOT / "checkpoints" / "lavit-tiny-random"
OUT = "out"  # relative to the directory of a run
SECONDS = 600  # of one run
_PARTIAL = ("*.partial", "lavit-publish-*", ".*.png.*", "tmp*")


@dataclass
class Writer:
    """Something that writes.

    Attributes:
        job: What `Jobs` is to call.
        arguments: Its arguments, with `{inputs}` where the inputs are.
        appears: Whether the result is there only when it is complete.
        resume: What the next run is told about the directory that a killed one has left.
        results: Patterns of the files that have to be the same in the end.
        last: What is written last, complete or not at all, and never replaced: with it, there is nothing left to do.
    """

    job: str
    arguments: list[Any]
    appears: bool = False
    resume: Callable[[Path], list[str]] = lambda folder: []
    results: tuple[str, ...] = ("*",)
    last: str | None = None

    @property
    def is_command(self) -> bool:
        return self.job.endswith(":lavit")


def command(*arguments: Any, appears: bool = False) -> Writer:
    return Writer("fuzz.jobs:lavit", list(arguments), appears)


def script(path: str, *arguments: Any, **options: Any) -> Writer:
    return Writer("fuzz.jobs:script", [EXAMPLES / path, *arguments], **options)


def latest(folder: Path) -> list[str]:
    """What the recipe's runner and users pass to scripts: whatever is complete."""
    return ["--resume_from_checkpoint", "latest"]


def trainer_script(path: str, *arguments: Any, last: str | None = None) -> Writer:
    options = ["--output_dir", OUT, "--max_steps", 3, "--save_steps", 1, "--logging_steps", 1, "--report_to", "none"]
    options += ["--per_device_train_batch_size", 4, "--use_cpu", True, "--disable_tqdm", True]
    return script(path, *arguments, *options, resume=latest, results=("*.safetensors",), last=last)


_SIZES = ["--codebook_size", 24, "--codebook_dim", 6, "--num_layers", 1, "--cross_attention_dims", 32]
_SCENES = ["--dataset", "scenes", "--num_scenes", 12]
_PICTURE = "{inputs}/pictures/0.png"
_DRAWING = ["--model", TINY, "--steps", 3, "--seed", 1, "-o", f"{OUT}/drawing.png"]
_FEW_TOKENS = ["--max-new-tokens", 4, "--min-new-tokens", 1, "--beams", 1, "--steps", 2]
WRITERS = {
    "convert": command("convert", ORIGINAL, OUT, "--heads", "vision=4,merger=4,decoder=4", appears=True),
    "to-original": command("convert", "--to-original", TINY, OUT, appears=True),
    "export-llama": command("export-llama", TINY, OUT, appears=True),
    "assemble": command("assemble", TINY, TINY, OUT, appears=True),
    "merge": command("merge", "{inputs}/adapter", OUT, appears=True),
    "publish": command("publish", TINY, "user/name", "--dry-run", "--license", "apache-2.0"),
    "draw": command("draw", "a cat", *_DRAWING, appears=True),
    "reconstruct": command("reconstruct", _PICTURE, *_DRAWING, appears=True),
    "demo": command("demo", "--image", _PICTURE, "--model", TINY, "--output", f"{OUT}/demo.png", appears=True),
    "tokenize": command("tokenize", "{inputs}/pictures", OUT, "--model", TINY, "--shard-size", 3, "--batch-size", 2),
    "tokenize to tar": command(
        *("tokenize", "{inputs}/pictures", OUT, "--model", TINY, "--shard-size", 3, "--format", "webdataset")
    ),
    "evaluate": command(
        *("evaluate", TINY, "--task", "all", "--data", "scenes", "--output", OUT, "--num-samples", 6),
        *("--num-drawings", 4, "--batch-size", 2, *_FEW_TOKENS),
    ),
    "train_lm": trainer_script("train_lm.py", "--model", TINY, *_SCENES),
    "finetune_lora": trainer_script(
        *("finetune_lora.py", "--model", TINY, *_SCENES, "--merge_to", f"{OUT}/merged"), last=f"{OUT}/merged"
    ),
    "train_tokenizer": trainer_script(
        *("train_tokenizer.py", "--vision_config", "{inputs}/vision.json", *_SIZES, *_SCENES),
        *("--pooled_size", 0, "--kmeans_tokens_per_code", 1),
    ),
    "train_vision_encoder": trainer_script(
        *("worlds/train_vision_encoder.py", "--vision_config", "{inputs}/vision.json"),
        *("--num_scenes", 12, "--num_eval_scenes", 4),
    ),
    "train_autoencoder": trainer_script(
        *("train_autoencoder.py", *_SCENES, "--vae", "{inputs}/vae", "--validation_split", "validation"),
        *("--num_validation_rows", 4),
    ),
    "train_pixel_decoder": trainer_script(
        *("train_pixel_decoder.py", *_SCENES, "--token_decoder", "{inputs}/token_decoder", "--vae", "{inputs}/vae"),
        *("--unet_config", "{inputs}/unet.json", "--scheduler_config", "{inputs}/scheduler.json"),
        *("--visual_tokenizer", "{inputs}/tokenizer"),
    ),
    "fine-tuned pixel decoder": trainer_script(
        *("train_pixel_decoder.py", *_SCENES, "--pixel_decoder", TINY, "--visual_tokenizer", TINY),
    ),
    "carry_selector": script(
        *("worlds/carry_selector.py", "--visual_tokenizer", TINY, "--vision_model", TINY, "--output_dir", OUT),
        *("--max_steps", 6, "--batch_size", 4),
        results=("*.safetensors",),
    ),
    "make_dataset": script("worlds/make_dataset.py", "--output_dir", OUT, "--num_rows", 60, results=("*.arrow",)),
    "assemble a trained one": script(
        *("worlds/assemble.py", "--trained", "{inputs}/trained", "--output_dir", OUT), results=("*.safetensors",)
    ),
    "recipe": script(
        *("worlds/train.py", "--output_dir", OUT, "--recipe", "{inputs}/recipe.yaml"), results=("*.safetensors",)
    ),
}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, tiny parts of models, configurations."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "pictures").mkdir()
    rows = []
    for index, scene in enumerate(make_scenes(num_scenes=12)):
        scene["image"].save(folder / "pictures" / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": scene["text"]}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(rows))
    build_vae().save_pretrained(folder / "vae")
    tokenizer = build_visual_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    share_codes(build_token_decoder(), tokenizer).save_pretrained(folder / "token_decoder")
    LavitImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "tokenizer")
    model = LavitForConditionalGeneration.from_pretrained(TINY)
    get_peft_model(model, get_lora_config(model)).save_pretrained(folder / "adapter")
    (folder / "trained").mkdir()
    for part in ("lavit", "pixel_decoder"):
        (folder / "trained" / part).symlink_to(TINY)
    vision = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
    stage = {"script": "train_autoencoder.py", "options": {"vae": str(folder / "vae"), "dataset": "scenes"}}
    stage["options"] |= {"num_scenes": 12, "validation_split": "validation", "num_validation_rows": 4}
    stage["options"] |= {"max_steps": 3, "save_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True}
    files = {"vision.json": vision, "unet.json": unet_config(), "scheduler.json": EPSILON, "recipe.yaml": {"a": stage}}
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="session")
def undisturbed() -> dict[str, tuple[float, dict[str, str]]]:
    """By writer, how long it takes and what it writes; filled when it is needed."""
    return {}


def start(jobs: Any, writer: Writer, inputs: Path, folder: Path, more: list[str]) -> None:
    arguments = [str(one).format(inputs=inputs) for one in writer.arguments] + more
    jobs.start(writer.job, *arguments, cwd=folder)


def written(writer: Writer, folder: Path) -> dict[str, str]:
    """Digests of what a writer has made, without what is still in the making: the next run removes that."""
    found = {path for pattern in writer.results for path in (folder / OUT).rglob(pattern) if path.is_file()}
    names = {path.relative_to(folder).as_posix(): path for path in found if not is_partial(path.relative_to(folder))}
    # Training goes on from checkpoints, and may have removed or added some.
    kept = {name: path for name, path in names.items() if writer.is_command or "/checkpoint-" not in name}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(kept.items())}


def is_partial(path: Path) -> bool:
    """Whether a file, or a directory that it is in, has the name of something that is not complete yet."""
    return any(fnmatch(part, pattern) for part in path.parts for pattern in _PARTIAL)


def run_undisturbed(jobs: Any, writer: Writer, inputs: Path, folder: Path) -> tuple[float, dict[str, str]]:
    folder.mkdir()
    start(jobs, writer, inputs, folder, [])
    result = jobs.wait(SECONDS)
    assert result.code == 0, f"fails undisturbed with {result.code}: {result.stderr[-500:]}"
    found = written(writer, folder)
    assert found or not writer.appears, "writes nothing"
    return result.seconds, found


def check_kill(seed: int, jobs: Any, inputs: Path, undisturbed: dict, tmp_path: Path) -> None:
    rng = seeded_rng("kill", seed)
    name = list(WRITERS)[seed % len(WRITERS)]
    writer = WRITERS[name]
    if name not in undisturbed:
        undisturbed[name] = run_undisturbed(jobs, writer, inputs, tmp_path / f"undisturbed {seed}")
    duration, expected = undisturbed[name]
    folder = tmp_path / str(seed)
    folder.mkdir()
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    moment = max(0.05, rng.uniform(0.1, 1.05) * duration)
    start(jobs, writer, inputs, folder, [])
    if not jobs.is_over(moment):
        jobs.kill(number)
    killed = jobs.wait(SECONDS)
    shown = f"{name}, {number.name} after {moment:.2f} of {duration:.2f} s"
    assert killed.code is not None, f"{shown}: does not end"
    check_ending(shown, writer, killed, number)
    found = written(writer, folder)
    is_done = bool(found) if writer.appears else writer.last is not None and (folder / writer.last).exists()
    if writer.appears or is_done:
        assert not found or found == expected, f"{shown}: half-written {difference(found, expected)}"
    if not is_done:
        start(jobs, writer, inputs, folder, writer.resume(folder / OUT))
        again = jobs.wait(SECONDS)
        assert again.code is not None, f"{shown}: the next run hangs"
        assert again.code == 0, f"{shown}: the next run fails with {again.code}: {again.stderr[-500:]}"
        found = written(writer, folder)
        assert found == expected, f"{shown}: the next run writes something else: {difference(found, expected)}"
        left = [path for pattern in _PARTIAL for path in folder.rglob(pattern)]
        assert not left, f"{shown}: {left[0].relative_to(folder)} is still there after the next run"


def check_ending(shown: str, writer: Writer, killed: Any, number: signal.Signals) -> None:
    """Commands say in one line that they were interrupted."""
    if not writer.is_command or killed.code == 0:
        return
    if number == signal.SIGINT and "lavit_cli" in killed.stderr.partition("Traceback")[2]:
        raise AssertionError(f"{shown}: a traceback: {killed.stderr[-500:]}")
    if number == signal.SIGINT and "Traceback" not in killed.stderr:
        assert killed.code in (130, -signal.SIGINT), f"{shown}: ends with {killed.code}: {killed.stderr[-300:]}"
    elif number != signal.SIGINT:
        assert killed.code in (-number, 128 + number), f"{shown}: ends with {killed.code}: {killed.stderr[-300:]}"


def difference(found: dict[str, str], expected: dict[str, str]) -> str:
    names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    kinds = ["missing" if one not in found else "changed" if one in expected else "too much" for one in names]
    return ", ".join(f"{one} {kind}" for one, kind in zip(names[:4], kinds, strict=False)) + f" ({len(names)} in all)"


@blocks("kills")
def test_kills(seeds: list[int], jobs, inputs: Path, undisturbed: dict, tmp_path: Path) -> None:
    check_all(seeds, lambda seed: check_kill(seed, jobs, inputs, undisturbed, tmp_path), seconds=4 * SECONDS)
