"""The model card of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

_CARD = """---
{metadata}
---

# LaVIT for transformers

[LaVIT](https://arxiv.org/abs/2309.04669) reads images and text as one sequence: a visual tokenizer turns an image
into a variable number of tokens, and one language model reads and writes both kinds.

This checkpoint was converted from the original layout with `lavit convert`.

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
  the other one (both as far as the source had them). lavit-hf loads them as `LavitPixelDecoderPipeline`; without it,
  `DiffusionPipeline.from_pretrained(path, trust_remote_code=True)` uses the files of code beside them
- `original/`: what is needed to write the original layout back (`lavit convert --to-original`); nothing loads it

## License

The weights keep the licenses of the weights they were converted from; see the license and notice files beside this
card.
"""


def save_model_card(folder: Path) -> None:
    """Writes the model card."""
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license="other",
        tags=["lavit", "llama2", "any-to-any", "visual-tokenizer"],
    )
    (folder / "README.md").write_text(_CARD.format(metadata=metadata.to_yaml()), encoding="utf-8")
