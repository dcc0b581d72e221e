"""What a checkpoint computes, with the package or, run as a script, where it cannot be imported.

python standalone.py CHECKPOINT PICTURE FOLDER [REVISION]
"""

import sys
from pathlib import Path

import torch


class BlockPackage:
    """Makes `import lavit_hf` fail as if it were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lavit_hf", "lavit_cli"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@torch.no_grad()
def compute(model, processor, pixel_decoder, picture: str) -> dict[str, torch.Tensor]:
    """Outputs of model, processor and pixel decoder in their ways of use."""
    found = {}
    budget = {"num_image_tokens": 3, "regions": [(0, 0, 8, 8)]}
    for mode in ("continuous", "discrete"):
        for kind, chosen in ((mode, {}), (f"{mode} with a budget", budget)):
            options = {"visual_mode": mode, "return_tensors": "pt", **chosen}
            inputs = processor(images=picture, text="<image>What is it?", **options)
            found |= {f"{kind} {name}": value for name, value in inputs.items()}
            found[f"{kind} logits"] = model(**inputs).logits
            found[f"{kind} text"] = model.generate(**inputs, max_new_tokens=6)
    processor.visual_tokenizer = model
    found["ids of a picture"] = processor.tokenize_images(picture)[0]
    inputs = processor(text="it is <point>there</point>", return_tensors="pt")
    found |= {"own tokens": inputs["input_ids"], "own logits": model(**inputs).logits}
    inputs = processor(text="a cat", generation_mode="image", return_tensors="pt")
    options = {"guidance_scale": 4.0, "do_sample": True, "generator": torch.Generator().manual_seed(0)}
    ids = model.generate(**inputs, generation_mode="image", max_new_tokens=12, **options)
    found["drawn"] = ids
    pixel_decoder.set_progress_bar_config(disable=True)
    drawing = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return {**found, "pixels": pixel_decoder(input_ids=ids, **drawing).images}


def points_to_the_package(part) -> bool:
    """Whether a class of remote code says who composes new models."""
    try:
        part.from_vision_text_pretrained("vision", "text")
    except ImportError as error:
        return "Install the package, lavit-hf" in str(error)
    return False


def main(checkpoint: str, picture: str, folder: str, revision: str | None = None) -> None:
    """Computes with remote code, saves everything, also with more tokens, and computes with what was saved."""
    sys.meta_path.insert(0, BlockPackage())
    from diffusers import DiffusionPipeline
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options = {"trust_remote_code": True, **({"revision": revision} if revision else {})}
    pixel_decoder = DiffusionPipeline.from_pretrained(checkpoint, **options).pixel_decoder
    saved, own = Path(folder) / "saved", Path(folder) / "own-tokens"
    for name, source in (("first", checkpoint), ("again", saved), ("own-tokens", own)):
        model = AutoModelForImageTextToText.from_pretrained(source, **options)
        processor = AutoProcessor.from_pretrained(source, **options)
        torch.save(compute(model, processor, pixel_decoder, picture), Path(folder) / f"{name}.pt")
        if name == "first":
            assert points_to_the_package(model) and points_to_the_package(processor)
            model.save_pretrained(saved)
            processor.save_pretrained(saved)
            processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<point>", "</point>"]})
            model.resize_token_embeddings(len(processor.tokenizer))
            model.save_pretrained(own)
            processor.save_pretrained(own)
        assert not any(module.partition(".")[0] == "lavit_hf" for module in sys.modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
