"""Nodes of ComfyUI: load a LaVIT, describe pictures, ask about them, draw, and turn codes into pixels.

Pictures are ComfyUI's: tensors `[batch, height, width, 3]` in [0, 1]. Visual codes go from node to node as a list with
a tensor `[codes]` for each picture, so that the same codes can be drawn in several ways.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration, LavitTextToImagePipeline

_CATEGORY = "LaVIT"
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SHAPES = ("1:1", "4:3", "3:2", "16:9", "2:3", "3:4")
_SEED = ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True})
_STEPS = ("INT", {"default": 25, "min": 1, "max": 1000})


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """ComfyUI's pictures as those of PIL."""
    return [Image.fromarray((image.clamp(0, 1) * 255).round().byte().cpu().numpy()) for image in images]


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures of PIL as ComfyUI's."""
    return torch.stack([torch.from_numpy(np.asarray(one.convert("RGB")).astype(np.float32) / 255) for one in pictures])


def make_generators(seed: int, number: int) -> list[torch.Generator]:
    """One for each picture: what it becomes does not depend on how many there are."""
    return [torch.Generator().manual_seed((seed + index) % 2**64) for index in range(number)]


class LavitLoad:
    """Loads a checkpoint: a directory, or a name on the Hub."""

    CATEGORY, FUNCTION = _CATEGORY, "load"
    RETURN_TYPES: ClassVar = ("LAVIT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # ComfyUI calls it so
        """What ComfyUI asks for."""
        return {
            "required": {
                "checkpoint": ("STRING", {"default": "lavit-7b-v2"}),
                "device": (["auto", "cuda", "cpu"],),
                "dtype": (list(_DTYPES),),
            }
        }

    def load(self, checkpoint: str, device: str, dtype: str) -> tuple[LavitTextToImagePipeline]:
        """Loads model, processor and pixel decoder."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto" and device == "cpu":  # half precision is slow there
            dtype = "float32"
        model = LavitForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).eval()
        processor = ImageTextProcessor.from_pretrained(checkpoint, visual_tokenizer=model)
        pipeline = LavitTextToImagePipeline.from_pretrained(
            checkpoint, model=model, processor=processor, dtype=model.dtype
        )
        return (pipeline.to(device),)


class LavitCaption:
    """Describes pictures, or answers a question about each."""

    CATEGORY, FUNCTION = _CATEGORY, "caption"
    RETURN_TYPES: ClassVar = ("STRING",)
    OUTPUT_IS_LIST: ClassVar = (True,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for."""
        return {
            "required": {
                "lavit": ("LAVIT",),
                "images": ("IMAGE",),
                "question": ("STRING", {"default": "", "multiline": True}),
                "num_tokens": ("INT", {"default": 0, "min": 0, "max": 256, "tooltip": "Of a picture; 0: as it needs"}),
                "num_beams": ("INT", {"default": 2, "min": 1, "max": 16}),
                "max_new_tokens": ("INT", {"default": 36, "min": 1, "max": 512}),
            }
        }

    def caption(
        self, lavit: Any, images: torch.Tensor, question: str, num_tokens: int, num_beams: int, max_new_tokens: int
    ) -> tuple[list[str]]:
        """One text per picture."""
        asked = [{"type": "text", "text": question.strip()}] if question.strip() else []
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, *asked]}]
            for picture in to_pictures(images)
        ]
        inputs = lavit.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            processor_kwargs={"return_tensors": "pt", "padding": True, "num_image_tokens": num_tokens or None},
        ).to(lavit.model.device)
        output = lavit.model.generate(**inputs, num_beams=num_beams, max_new_tokens=max_new_tokens)
        new = output[:, inputs["input_ids"].shape[1] :]
        return ([text.strip() for text in lavit.processor.batch_decode(new, skip_special_tokens=True)],)


class LavitDraw:
    """Writes the codes of pictures, after text and, if there is one, a picture, and draws them."""

    CATEGORY, FUNCTION = _CATEGORY, "draw"
    RETURN_TYPES: ClassVar = ("IMAGE", "LAVIT_CODES")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for."""
        return {
            "required": {
                "lavit": ("LAVIT",),
                "prompt": ("STRING", {"default": "a cat on a red chair", "multiline": True}),
                "number": ("INT", {"default": 1, "min": 1, "max": 16}),
                "seed": _SEED,
                "steps": _STEPS,
                "guidance_scale": ("FLOAT", {"default": 4.0, "min": 0.0, "max": 20.0, "step": 0.1}),
                "aspect_ratio": (list(_SHAPES),),
            },
            "optional": {
                "negative_prompt": ("STRING", {"default": "", "multiline": True}),
                "image": ("IMAGE",),
            },
        }

    def draw(
        self,
        lavit: Any,
        prompt: str,
        number: int,
        seed: int,
        steps: int,
        guidance_scale: float,
        aspect_ratio: str,
        negative_prompt: str = "",
        image: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Pictures, and the codes that they were drawn from."""
        output = lavit(
            prompt if image is None else [*to_pictures(image), prompt],
            negative_prompt=negative_prompt or None,
            aspect_ratio=aspect_ratio,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=number,
            generator=make_generators(seed, number),
        )
        return to_tensor(output.images), output.codes


class LavitPixels:
    """Draws codes: those that were written, or those of a picture."""

    CATEGORY, FUNCTION = _CATEGORY, "draw"
    RETURN_TYPES: ClassVar = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for."""
        return {
            "required": {
                "lavit": ("LAVIT",),
                "codes": ("LAVIT_CODES",),
                "seed": _SEED,
                "steps": _STEPS,
                "guidance_scale": ("FLOAT", {"default": 7.0, "min": 0.0, "max": 20.0, "step": 0.1}),
                "aspect_ratio": (list(_SHAPES),),
            }
        }

    def draw(
        self, lavit: Any, codes: list[torch.Tensor], seed: int, steps: int, guidance_scale: float, aspect_ratio: str
    ) -> tuple[torch.Tensor]:
        """One picture for each tensor of codes."""
        output = lavit.pixel_decoder(
            codes,
            aspect_ratio=aspect_ratio,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=make_generators(seed, len(codes)),
        )
        return (to_tensor(output.images),)


class LavitCodes:
    """Turns pictures into codes."""

    CATEGORY, FUNCTION = _CATEGORY, "tokenize"
    RETURN_TYPES: ClassVar = ("LAVIT_CODES",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for."""
        budget = ("INT", {"default": 0, "min": 0, "max": 256, "tooltip": "Codes of a picture; 0: as it needs"})
        return {"required": {"lavit": ("LAVIT",), "images": ("IMAGE",), "num_tokens": budget}}

    def tokenize(self, lavit: Any, images: torch.Tensor, num_tokens: int) -> tuple[list[torch.Tensor]]:
        """The codes of each picture."""
        rows = lavit.processor.tokenize_images(to_pictures(images), num_image_tokens=num_tokens or None)
        offset = lavit.model.config.visual_token_offset
        return ([ids[1:-1].cpu() - offset for ids in rows],)  # without image start and end


NODE_CLASS_MAPPINGS = {
    "LavitLoad": LavitLoad,
    "LavitCaption": LavitCaption,
    "LavitDraw": LavitDraw,
    "LavitCodes": LavitCodes,
    "LavitPixels": LavitPixels,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LavitLoad": "LaVIT: load",
    "LavitCaption": "LaVIT: describe or answer",
    "LavitDraw": "LaVIT: draw",
    "LavitCodes": "LaVIT: picture to codes",
    "LavitPixels": "LaVIT: codes to picture",
}
