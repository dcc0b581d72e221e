"""`lavit demo`."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from .draw import load_pipeline, make_generator
from .generation import ANSWER, CAPTION, answer_question, caption_images
from .loading import Lavit, load
from .pictures import check_files, fit_panel, grey_out_dropped, open_image, save_png, side_by_side

_RANDOM = (
    "Note: the weights of this checkpoint are random numbers. What follows shows that everything runs; caption, "
    "answer and drawings mean nothing, and the patches are kept for no reason."
)
_SEED = 0


def run(source: str, model: str, *, question: str, prompt: str, output: Path, device: str, dtype: str) -> None:
    """Prints what became of a picture, and writes a PNG that shows it."""
    check_files([source])
    image = open_image(source)
    lavit = load(model, device, dtype)
    print(f"Checkpoint  {model}")
    if lavit.random_weights:
        print(_RANDOM)
    masks = _keep_masks(lavit, image)
    grid = _grid(lavit)
    kept = {branch: int(mask.sum()) for branch, mask in masks.items()}
    print(f"Picture     {source} ({image.width} x {image.height} pixels, {grid[0]} x {grid[1]} patches)")
    for branch, use in (("continuous", "understanding"), ("discrete", "drawing")):
        print(f"Tokens      {kept[branch]} of {masks[branch].numel()} patches became tokens for {use} ({branch})")
    print(f"Caption     {caption_images(lavit, [image], '', CAPTION)[0]}")
    print(f"Question    {question}")
    print(f"Answer      {answer_question(lavit, image, question, ANSWER)}")
    panels = [("picture", fit_panel(image))]
    for branch, mask in masks.items():
        panels.append((f"{branch}: {kept[branch]} of {mask.numel()}", grey_out_dropped(panels[0][1], mask, grid)))
    panels += [
        (title, fit_panel(drawing, panels[0][1].size)) for title, drawing in _drawings(lavit, model, image, prompt)
    ]
    print(f"Drawing     {prompt} (seed {_SEED}); and the picture again, from its own tokens")
    save_png(side_by_side(panels), output)
    print(f"Wrote       {output} (dropped patches are grey)")


def _drawings(lavit: Lavit, model: str, image: Image.Image, prompt: str) -> list[tuple[str, Image.Image]]:
    """The prompt drawn, and the picture reconstructed from its tokens, each with its title."""
    pipeline = load_pipeline(lavit, model)
    _, generator = make_generator(_SEED)
    (drawing,) = pipeline(prompt, generator=generator).images
    (again,) = pipeline.reconstruct(image, generator=generator).images
    return [("reconstructed", again), ("drawn", drawing)]


@torch.no_grad()
def _keep_masks(lavit: Lavit, image: Image.Image) -> dict[str, torch.Tensor]:
    """Which patches either branch keeps, `[num_patches]` each."""
    tokenizer = lavit.model.visual_tokenizer
    pixel_values = lavit.processor.image_processor([image], return_tensors="pt")["pixel_values"].to(tokenizer.device)
    return {
        "continuous": tokenizer.embed(pixel_values).keep_mask[0],
        "discrete": tokenizer.encode(pixel_values).keep_mask[0],
    }


def _grid(lavit: Lavit) -> tuple[int, int]:
    """Rows and columns of patches."""
    config = lavit.model.config.visual_tokenizer_config
    height, width = config.image_size
    rows = round((config.num_patches * height / width) ** 0.5)
    return rows, config.num_patches // rows
