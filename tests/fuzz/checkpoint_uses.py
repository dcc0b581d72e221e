"""What users do with a checkpoint, as a job of a process of its own that prints what comes out as JSON."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXT = "What is </s><img>it? \u00e9"
ANSWER = "@@@"  # before the answer of a job
OUTPUT = "written"  # directory that commands write
HEADS = "vision=4,merger=4,decoder=4"


def use(name: str, folder: str) -> None:
    """A job: one use of a checkpoint."""
    try:
        answer = USES[name](Path(folder))
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        where = next((f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames) if "lavit_hf" in f.filename), "")
        kinds = [kind.__name__ for kind in type(error).__mro__]
        answer = {"error": str(error), "kinds": kinds, "where": where}
    print(ANSWER + json.dumps(answer))


def _load_everything(folder: Path) -> tuple[Any, Any]:
    from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration

    return LavitForConditionalGeneration.from_pretrained(folder).eval(), ImageTextProcessor.from_pretrained(folder)


def _picture() -> Any:
    from PIL import Image

    return Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 50).convert("RGB")


def use_model(folder: Path) -> dict[str, Any]:
    """Reads a picture with model and processor."""
    import torch

    model, processor = _load_everything(folder)
    inputs = processor(images=_picture(), text=f"<image>{TEXT}", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    config = model.config
    names = ("boi_token_id", "eoi_token_id", "visual_token_offset", "image_token_id")
    ids = {name: getattr(config, name) for name in names} | _ids(processor, inputs["input_ids"].tolist())
    return {"ids": ids, "values": _digest(logits), "is_finite": bool(logits.isfinite().all())}


def use_processor(folder: Path) -> dict[str, Any]:
    """Text to ids and a picture to codes, with the visual tokenizer that the processor loads by itself."""
    from lavit_hf import ImageTextProcessor

    processor = ImageTextProcessor.from_pretrained(folder)
    codes = processor.tokenize_images(_picture())[0]
    inputs = processor(images=_picture(), text=f"a<image>{TEXT}", return_tensors="pt")
    is_finite = bool(inputs["pixel_values"].isfinite().all())
    return {"ids": _ids(processor, inputs["input_ids"].tolist()), "values": codes.tolist(), "is_finite": is_finite}


def use_visual_tokenizer(folder: Path) -> dict[str, Any]:
    """A picture to codes and features."""
    import torch

    from lavit_hf import LavitVisualTokenizer

    tokenizer = LavitVisualTokenizer.from_pretrained(folder).eval()
    side = tokenizer.config.vision_config.image_size
    pixels = torch.linspace(-1, 1, 3 * side * side).reshape(1, 3, side, side)
    with torch.no_grad():
        features = tokenizer.embed(pixels).features
        codes = tokenizer.encode(pixels).codes
    values = [_digest(features), codes.tolist()]
    return {"ids": {}, "values": values, "is_finite": bool(features.isfinite().all())}


def use_pixel_decoder(folder: Path) -> dict[str, Any]:
    """Draws from ids."""
    import torch

    from lavit_hf.pipelines import LavitPixelDecoderPipeline

    pipeline = LavitPixelDecoderPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    image = pipeline(input_ids=[torch.tensor([300, 305, 340, 365, 301])], **options).images
    ids = {"offset": pipeline.config.visual_token_offset, "end": pipeline.config.eoi_token_id}
    return {"ids": ids, "values": _digest(image), "is_finite": bool(image.isfinite().all())}


def use_text_to_image(folder: Path) -> dict[str, Any]:
    """Draws from text."""
    import torch

    from lavit_hf.pipelines import LavitTextToImagePipeline

    pipeline = LavitTextToImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    image = pipeline("a cat", **options).images
    return {"ids": {}, "values": _digest(image), "is_finite": bool(torch.as_tensor(image).isfinite().all())}


def _run(*arguments: str) -> dict[str, Any]:
    """A command, and what it has written."""
    from typer.testing import CliRunner

    import lavit_cli

    result = CliRunner().invoke(lavit_cli.app, list(arguments))
    answer = {"code": result.exit_code, "stderr": result.stderr, "written": None}
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        answer["stderr"] += f"Traceback: {result.exception!r}"
    if Path(OUTPUT).exists():
        answer["written"] = sorted(str(path.relative_to(OUTPUT)) for path in Path(OUTPUT).rglob("*") if path.is_file())
    return answer


def use_convert(folder: Path) -> dict[str, Any]:
    return _run("convert", str(folder), OUTPUT, "--heads", HEADS)


def use_to_original(folder: Path) -> dict[str, Any]:
    return _run("convert", "--to-original", str(folder), OUTPUT)


def use_publish(folder: Path) -> dict[str, Any]:
    return _run("publish", str(folder), "user/name", "--dry-run", "--license", "apache-2.0")


def use_export_llama(folder: Path) -> dict[str, Any]:
    return _run("export-llama", str(folder), OUTPUT)


def use_caption(folder: Path) -> dict[str, Any]:
    _picture().save("picture.png")
    return _run("caption", "picture.png", "--model", str(folder), "--max-new-tokens", "3", "--min-new-tokens", "1")


def _ids(processor: Any, input_ids: list[list[int]]) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    names = ("boi_token_id", "eoi_token_id", "image_token_id", "codebook_size", "bos_token_id", "eos_token_id")
    return {"input_ids": input_ids, **{f"tokenizer's {name}": getattr(tokenizer, name) for name in names}}


def _digest(values: Any) -> str:
    import torch

    return hashlib.sha256(torch.as_tensor(values).float().contiguous().numpy().tobytes()).hexdigest()


USES: dict[str, Callable[[Path], dict[str, Any]]] = {
    name.removeprefix("use_"): function for name, function in dict(globals()).items() if name.startswith("use_")
}


def use_all(names: list[str], folder: str) -> None:
    """A job: several uses, one after another; what commands wrote is removed in between."""
    for name in names:
        before = os.fstat(2).st_size
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            use(name, folder)
        sys.stderr.flush()
        log = Path("/proc/self/fd/2").read_bytes()[before:]
        answer = json.loads(stdout.getvalue().rpartition(ANSWER)[2])
        answer["log"] = log.decode("utf-8", "replace")
        print(ANSWER + json.dumps({"use": name, **answer}), flush=True)
        shutil.rmtree(OUTPUT, ignore_errors=True)
