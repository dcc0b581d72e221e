"""The model card of a converted checkpoint, and the licenses that its weights inherit."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from yaml import YAMLError  # type: ignore[import-untyped]

from ..utils.paths import resolve_inside

if TYPE_CHECKING:
    from .original import OriginalCheckpoint

_CARD = """---
{metadata}
---

# LaVIT for transformers

[LaVIT](https://arxiv.org/abs/2309.04669) reads images and text as one sequence: a visual tokenizer turns an image
into a variable number of tokens, and one language model reads and writes both kinds.

{origin}

```python
import lavit_hf  # registers the classes
from transformers import AutoModelForImageTextToText, AutoProcessor

path = "path/to/this/directory"
model = AutoModelForImageTextToText.from_pretrained(path)
processor = AutoProcessor.from_pretrained(path, visual_tokenizer=model.visual_tokenizer)

inputs = processor(images="picture.png", text="<image>Question: What is this? Answer:", return_tensors="pt")
output = model.generate(**inputs, num_beams=5, length_penalty=0.0, max_new_tokens=10)
print(processor.batch_decode(output[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

## Contents

- `config.json`, `model*.safetensors`: language model and visual tokenizer
- `model_index.json`, `token_decoder/`, `unet/`, `vae/`, `scheduler/`: the high-resolution pixel decoder; `lowres/`:
  the other one (both as far as the source had them). lavit-hf loads them as `LavitPixelDecoderPipeline`, and with the
  language model as `LavitTextToImagePipeline`. Without it, the latter is what
  `DiffusionPipeline.from_pretrained(path, trust_remote_code=True)` makes of the files of code beside them
{more_contents}
## License

The weights keep the licenses of the weights they were {made} from; see the license and notice files beside this
card.
"""


_ORIGINAL = (
    "- `original/`: what is needed to write the original layout back (`lavit convert --to-original`); "
    "nothing loads it\n"
)
_TAGS = ["lavit", "any-to-any", "visual-tokenizer"]


def save_model_card(folder: Path) -> None:
    """Writes the model card."""
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license="other",
        tags=["lavit", "llama2", "any-to-any", "visual-tokenizer"],
    )
    origin = "This checkpoint was converted from the original layout with `lavit convert`."
    _write(folder, metadata, origin=origin, more_contents=_ORIGINAL, made="converted")


def save_derived_card(folder: Path, origin: str, sources: Sequence[str]) -> None:
    """Writes the model card of a checkpoint that was made of others; it takes over license and tags of the first."""
    inherited = _metadata_of(sources[0])
    names = [source for source in sources if not os.path.isdir(source)]  # a path means nothing elsewhere
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=names or inherited.get("base_model"),
        **{name: inherited.get(name) for name in ("license", "license_name", "license_link", "datasets")},
        tags=list(dict.fromkeys([*(inherited.get("tags") or []), *_TAGS])),
    )
    _write(folder, metadata, origin=origin, more_contents="", made="made")


def describe_source(source: str) -> str:
    """How a card calls a directory or repository."""
    return f"`{os.path.basename(os.path.abspath(source))}`" if os.path.isdir(source) else f"`{source}`"


def _metadata_of(source: str) -> ModelCardData:
    path = os.path.join(source, "README.md")
    if os.path.isdir(source) and not os.path.isfile(path):
        return ModelCardData()
    try:
        return cast(ModelCardData, ModelCard.load(path if os.path.isdir(source) else source).data)
    except (OSError, ValueError, YAMLError):
        return ModelCardData()


def _write(folder: Path, metadata: ModelCardData, **texts: str) -> None:
    (folder / "README.md").write_text(_CARD.format(metadata=metadata.to_yaml(), **texts), encoding="utf-8")


# Licenses, notices and use policies.


_KINDS = ("licen[cs]e", "notice", "use[-_]policy")
# Something may stand before: the name of a model, or that of the folder it was in before `lavit convert`.
LICENSE, NOTICE, POLICY = (re.compile(rf"(^|[-_]){kind}", re.IGNORECASE) for kind in _KINDS)
_TEXT_FILE = re.compile(r"[^.]*(\.\d+)*(\.(html?|md|pdf|rst|rtf|txt))?", re.IGNORECASE)
_ON_THE_HUB = [f"*{name}*" for kind in _KINDS for name in (kind, kind.upper())]
_NOTICE = """The weights in this directory were converted from LaVIT weights, which derive from Llama 2
weights. Only their layout was changed.

No license files were found beside the source. Whoever passes these weights on has to add
the LaVIT community license, and the Llama 2 Community License Agreement with its notice
("Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms,
Inc. All Rights Reserved.") and its acceptable use policy. The pixel decoders derive from
Stable Diffusion weights, whose licenses apply to them.
"""


def is_notice(name: str) -> bool:
    """Whether a file is a license, a notice or a use policy, by its name."""
    return bool(_TEXT_FILE.fullmatch(name)) and any(kind.search(name) for kind in (LICENSE, NOTICE, POLICY))


def copy_notices(source: OriginalCheckpoint, folder: Path) -> dict[str, str]:
    """Copies licenses, notices and use policies, or says in a notice which are needed; returns their new names."""
    copied: dict[str, str] = {}
    for notice in source.notices():
        name = Path(notice).name
        content = (source.root / notice).read_bytes()
        if (folder / name).is_file() and (folder / name).read_bytes() != content:
            name = notice.replace("/", "-")
        shutil.copyfile(source.root / notice, folder / name)
        copied[notice] = name
    if not copied:
        (folder / "NOTICE").write_text(_NOTICE, encoding="utf-8")
    return copied


def copy_notices_of(source: str | os.PathLike[str], folder: Path) -> None:
    """Copies licenses, notices and use policies of a checkpoint to one that was made of it.

    Args:
        source: Directory, or id of a repository.
        folder: The new directory; a file that it has stays.

    Raises:
        ValueError: One of them is a link that leads out of the directory.
    """
    root = Path(source if os.path.isdir(source) else snapshot_download(os.fspath(source), allow_patterns=_ON_THE_HUB))
    for path in sorted(root.iterdir()):
        if is_notice(path.name) and path.is_file() and not (folder / path.name).exists():
            shutil.copyfile(resolve_inside(root, path.name, str(source)), folder / path.name)
