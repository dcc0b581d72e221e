"""The model card of a published checkpoint: what its owner wrote, and a block of facts that is made anew each time."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError  # type: ignore[import-untyped]

from ..data.scenes import PortableRng
from ..utils.public_text import is_path, one_line, public_name
from .facts import Facts, world_of_results
from .files import PublishError


@dataclass
class Origin:
    """Where weights come from, as far as their owner says; the card keeps what it said before of the rest.

    Attributes:
        license: Their license, as the Hub names it.
        base_models: What they were made of.
        datasets: What they were trained on.
        inherited_license: The license file of the weights they derive from, if there is one.
    """

    license: str | None = None
    base_models: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    inherited_license: str | None = None


_LICENSE = re.compile(r"[A-Za-z0-9][\w.+-]*")
_BEGIN, _END = "<!-- facts: made by lavit publish -->", "<!-- end of facts -->"
_BLOCK = re.compile(f"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)
# A section that its owner wrote; they know more than the metadata.
_TRAINING_DATA = re.compile(r"^#{1,6}[ \t]+training data[ \t:]*#*[ \t]*$", re.IGNORECASE | re.MULTILINE)
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
# What PEFT writes beside adapters: a form to be filled in.
_STUB = ("# Model Card for Model ID", "[More Information Needed]")
# What has a meaning in Markdown, HTML or a table; of underscores, those that are not inside a word.
_SPECIAL = re.compile(r"[\\`*\[\]<>|&~#!$]|(?<![^\W_])_|_(?![^\W_])")
# Tasks of `lavit evaluate` as the Hub calls them.
_TASKS = {
    "caption": "image-to-text",
    "vqa": "visual-question-answering",
    "text-to-image": "text-to-image",
    "reconstruction": "image-to-image",
    "editing": "image-to-image",
}
_INTRODUCTION = """# {name}

[LaVIT](https://arxiv.org/abs/2309.04669) reads images and text as one sequence: a visual tokenizer turns an image
into a variable number of tokens, and one language model reads and writes both kinds.
"""
_INTRODUCTION_OF_ADAPTER = """# {name}

What fine-tuning changed of [{base}](https://huggingface.co/{base}), a [LaVIT](https://arxiv.org/abs/2309.04669): an
adapter of [PEFT](https://huggingface.co/docs/peft), which is loaded on top of it.
"""
_ASK = """inputs = processor(images="picture.png", text="<image>Question: {question} Answer:", return_tensors="pt")
output = model.generate(**inputs, num_beams=5, length_penalty=0.0, max_new_tokens=10)
print(processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_USE = """## Use

With [transformers](https://huggingface.co/docs/transformers), and nothing else of LaVIT:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

repository = "{repository}"
model = AutoModelForImageTextToText.from_pretrained(repository, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)

{ask}```
"""
_USE_PIXELS = """
A pipeline of [diffusers](https://huggingface.co/docs/diffusers) draws prompts. The language model writes the tokens of
a picture, and a pixel decoder, `pipeline.pixel_decoder`, draws them:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(repository, trust_remote_code=True)
pipeline("{prompt}", guidance_scale={guidance_scale}).images[0].save("drawing.png")
```
"""
_USE_ADAPTER = """## Use

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "{repository}")
processor = AutoProcessor.from_pretrained("{processor}", trust_remote_code=True)

{ask}```
"""
_USE_TOKENIZER = """## Use

```python
from transformers import AutoModel

visual_tokenizer = AutoModel.from_pretrained("{repository}", trust_remote_code=True)
```
"""
_PACKAGE_FIRST = """
Where the package lavit-hf is installed, `import lavit_hf` registers the classes, and no remote code is run.
"""


def read_card(root: Path) -> tuple[ModelCardData, str]:
    """Metadata and text of the card that a checkpoint has; nothing of either if it has none."""
    path = root / "README.md"
    if not path.is_file():
        return ModelCardData(), ""
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PublishError(f"{path} cannot be read: {getattr(error, 'strerror', error)}.") from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError, YAMLError) as error:
        raise PublishError(f"{path}: the metadata at its top cannot be read: {error!r}") from error
    data = cast(ModelCardData, card.data)
    for name in ("license", "tags", "datasets", "base_model"):
        value = getattr(data, name, None)
        if value is not None and not all(isinstance(part, str) for part in _as_list(value)):
            raise PublishError(f"{path}: {name} in the metadata at its top is {value!r:.100}, which is no text.")
    _check_license(data.license, f"{path}: license in the metadata at its top")
    return data, card.text


def check_origin(origin: Origin) -> None:
    """Makes sure that all names are those of things on the Hub."""
    _check_license(origin.license, "--license")
    for option, names in (("--base-model", origin.base_models), ("--dataset", origin.datasets)):
        for name in names:
            if not is_hub_name(name):
                raise PublishError(f"{option} {name!r:.100} is no name on the Hub, which looks like user/name.")


def is_hub_name(name: str) -> bool:
    """Whether something on the Hub can have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def remove_paths(data: ModelCardData, text: str, base: str | None) -> tuple[str, list[str]]:
    """Takes the paths of models and datasets out of metadata, which is changed, and out of a text.

    Libraries write them there when they save what was made of something on a disk. `base` is a path whatever it looks
    like. Returns the text, and the paths.
    """
    paths = [] if base is None else [base]
    for name in ("base_model", "datasets"):
        values = _as_list(getattr(data, name))
        found = [value for value in values if is_path(value) or value == base]
        paths += [path for path in found if path not in paths]
        if found:
            rest = [value for value in values if value not in found]
            setattr(data, name, rest[0] if name == "base_model" and len(rest) == 1 else rest or None)
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, public_name(path))
    data["tags"] = [tag for tag in _as_list(data.tags) if not any(path in tag for path in paths)] or None
    return text, paths


def write_card(data: ModelCardData, text: str, facts: Facts, repository: str, origin: Origin) -> str:
    """The text of a card: metadata, which is changed, what its owner wrote, and the facts instead of earlier ones."""
    name = repository.split("/")[-1]
    _set_metadata(data, facts, origin)
    if facts.results:
        data.model_name, data.eval_results = name, _eval_results(facts)
    own_text = _BLOCK.sub("\n\n", text).strip()
    if facts.adapter is not None and all(part in own_text for part in _STUB):
        own_text = ""
    introduction = _INTRODUCTION if facts.adapter is None else _INTRODUCTION_OF_ADAPTER
    own_text = own_text or introduction.format(name=name, base=data.base_model).strip()
    block = "\n".join([_BEGIN, _facts_text(facts, repository, data, own_text).strip(), _END])
    return f"---\n{data.to_yaml()}\n---\n\n{own_text}\n\n{block}\n"


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _check_license(license: str | list[str] | None, where: str) -> None:
    for name in _as_list(license):
        if not _LICENSE.fullmatch(name):
            raise PublishError(f"{where} is {name!r:.100}, which no license is called on the Hub: see apache-2.0.")


def _set_metadata(data: ModelCardData, facts: Facts, origin: Origin) -> None:
    tags = {"lavit", *_as_list(data.tags)}
    if facts.adapter is None:
        data.library_name = "transformers"
        data.pipeline_tag = "image-text-to-text" if facts.is_whole else "image-feature-extraction"
        tags |= {"visual-tokenizer"} | ({"any-to-any"} if facts.is_whole else set())
    else:
        data.library_name, data.pipeline_tag = "peft", "image-text-to-text"
        data["base_model_relation"] = "adapter"
    data.tags = sorted(tags)
    data.license = origin.license or data.license
    if origin.inherited_license:
        data.license = "other"
        data.license_name = "lavit-community-license"
        data.license_link = origin.inherited_license
    if origin.base_models:
        data.base_model = origin.base_models[0] if len(origin.base_models) == 1 else origin.base_models
    if origin.datasets:
        data.datasets = origin.datasets


def _eval_results(facts: Facts) -> list[EvalResult]:
    found = []
    for result in facts.results:
        split: dict[str, Any] = {}
        if result.get("split"):
            split["dataset_split"] = one_line(result["split"])
        for name, measurement in result["metrics"].items():
            if measurement["value"] is not None:
                found.append(
                    EvalResult(
                        task_type=_TASKS.get(result["task"], one_line(result["task"])),
                        dataset_type=_data_name(result),
                        dataset_name=_data_name(result),
                        metric_type=one_line(name),
                        metric_name=one_line(name),
                        metric_value=measurement["value"],
                        **split,
                    )
                )
    return found


def _facts_text(facts: Facts, repository: str, data: ModelCardData, own_text: str) -> str:
    if facts.adapter is not None:
        use = _USE_ADAPTER
    elif facts.is_whole:
        use = _USE + (_USE_PIXELS if "" in facts.pixel_decoders else "")
    else:
        use = _USE_TOKENIZER
    names = {"base": data.base_model, "processor": repository if facts.has_processor else data.base_model}
    datasets = "\n".join(f"- {_escape(name)}" for name in _as_list(data.datasets)) or "Not stated."
    question, prompt = _words_of(facts)
    names |= {"ask": _ASK.format(question=question), "prompt": prompt}
    parts = [
        use.format(repository=repository, guidance_scale=facts.guidance_scale, **names) + _PACKAGE_FIRST,
        "## Architecture\n\n" + _table(["", ""], _architecture(facts)),
        "" if _TRAINING_DATA.search(_CODE.sub("", own_text)) else f"## Training data\n\n{datasets}",
        _metrics_text(facts),
    ]
    return "\n\n".join(part.strip() for part in parts if part)


def _words_of(facts: Facts) -> tuple[str, str]:
    """A question and a prompt; of a made world, if it was measured on one, as it may know no other words."""
    world = world_of_results(facts.results)
    if world is None:
        return "What is this?", "a cat on a red chair"
    scene = min((world.sample_scene(world.splits[1], 0, index) for index in range(24)), key=world.num_objects)
    question, _, _ = world.ask_questions(scene, PortableRng(0))[0]
    return question, world.write_caption(scene, PortableRng(0))


def _data_name(result: dict[str, Any]) -> str:
    return one_line(public_name(result["data"]))


def _architecture(facts: Facts) -> list[list[str]]:
    shared = [[f"Parameters, {part}", f"{count:,}"] for part, count in facts.parameters.items()]
    shared.append(["Precision", ", ".join(facts.dtypes)])
    if facts.adapter is not None:
        return [*([name, value] for name, value in facts.adapter.rows.items()), *shared]
    config: Any = facts.config
    visual = config.visual_tokenizer_config if facts.is_whole else config
    height, width = visual.image_size
    vision = visual.vision_config
    rows = [
        ["Image", f"{height} x {width} pixels, {visual.num_patches} patches: at most as many tokens"],
        ["Vision encoder", f"{vision.model_type}, {vision.num_hidden_layers} layers of width {vision.hidden_size}"],
        ["Token merger", f"{visual.merger_num_layers} layers"],
        ["Visual vocabulary", f"{visual.codebook_size} codes of width {visual.codebook_dim}"],
    ]
    if facts.is_whole:
        text = config.text_config
        rows += [
            ["Language model", f"{text.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size}"],
            ["Vocabulary", f"{text.vocab_size} ids: {config.boi_token_id} of text, start, end, codes"],
            ["Pixel decoders", ", ".join(facts.pixel_decoders.values()) or "none"],
        ]
    return [*rows, *shared]


def _metrics_text(facts: Facts) -> str:
    if not facts.results:
        return ""
    rows = [
        [
            result["task"],
            " ".join(filter(None, [_data_name(result), result.get("split")])),
            name,
            _readable(measurement),
            f"{measurement['n']} {measurement['unit']}",
        ]
        for result in facts.results
        for name, measurement in result["metrics"].items()
    ]
    header = ["Task", "Data", "Metric", "Value (95 % interval)", "Measured on"]
    return "## Evaluation\n\nBy `lavit evaluate`.\n\n" + _table(header, rows)


def _readable(measurement: dict[str, Any]) -> str:
    def write(value: float) -> str:
        return f"{100 * value:.1f}" if measurement.get("is_share") else f"{value:.3f}"

    value, interval = measurement["value"], measurement.get("interval")
    if value is None:
        return "-"
    unit = " %" if measurement.get("is_share") else ""
    between = f" ({write(interval[0])} to {write(interval[1])})" if interval else ""
    return f"{write(value)}{unit}{between}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", one_line(text))
