"""Task `text-to-image`: draw what a caption says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..checkpoint import EvaluatedCheckpoint
from ..data.sample import EvaluationData, EvaluationSample
from ..measurement import Measurement, measure_mean
from ..metrics import load_metric
from .base import Prediction, Record, Shown, Task
from .drawing import open_picture, score_scenes, show_scene

# `None` is the pipeline's own choice: what the release draws single pictures with.
_PIPELINE = {
    "decoder": None,
    "num_inference_steps": None,
    "guidance_scale": None,
    "decoder_guidance_scale": None,
    "top_k": 50,
    "temperature": 1.0,
    "num_candidates": 1,
    "clip": None,
    "fid_weights": None,
}
# What the paper's FID on COCO was measured with: the best of four by CLIP.
_PAPER = {
    "decoder": "lowres",
    "num_inference_steps": 50,
    "guidance_scale": 1.5,
    "decoder_guidance_scale": 1.5,
    "top_k": 300,
    "num_candidates": 4,
}
_OF_PIPELINE = (
    "num_inference_steps",
    "guidance_scale",
    "decoder_guidance_scale",
    "top_k",
    "temperature",
)


class TextToImageTask(Task):
    """Draws the first caption of every sample."""

    name = "text-to-image"
    draws = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.options["num_candidates"] > 1 and self.options["clip"] is None:
            raise ValueError(
                f"The best of {self.options['num_candidates']} drawings is chosen by CLIP: --clip takes the directory "
                "of its weights, such as those of openai/clip-vit-large-patch14. Or draw one with --candidates 1."
            )

    @classmethod
    def default_options(cls, data: EvaluationData) -> dict[str, Any]:
        return dict(_PIPELINE) if data.is_scenes else {**_PIPELINE, **_PAPER}

    def predict(self, checkpoint: EvaluatedCheckpoint, samples: Sequence[EvaluationSample]) -> list[Prediction]:
        prompts = [sample.references[0] for sample in samples]
        count = self.options["num_candidates"]
        output = checkpoint.pipeline(self.options["decoder"])(
            prompts,
            num_images_per_prompt=count,
            generator=[self.generator(sample, "drawing", number) for sample in samples for number in range(count)],
            **{name: self.options[name] for name in _OF_PIPELINE},
        )
        pictures, codes = list(output.images), [of_image.tolist() for of_image in output.codes]
        best = self._choose(prompts, pictures)
        return [Prediction({"codes": codes[index]}, pictures[index]) for index in best]

    def _choose(self, prompts: list[str], pictures: list[Image.Image]) -> list[int]:
        """Which picture of each prompt is taken."""
        count = self.options["num_candidates"]
        if count == 1:
            return list(range(len(prompts)))
        texts = [prompt for prompt in prompts for _ in range(count)]
        scores = torch.tensor(self._clip_scores(pictures, texts)).view(len(prompts), count)
        return [index * count + int(best) for index, best in enumerate(scores.argmax(dim=1))]

    def score(
        self, checkpoint: EvaluatedCheckpoint, records: Sequence[Record], folder: Path
    ) -> dict[str, Measurement]:
        found = {"tokens/mean": measure_mean([len(record["codes"]) for record in records], "images")}
        if self.data.is_scenes:
            return {**score_scenes(self.data, records, folder), **found}
        pictures = [str(folder / record["picture"]) for record in records]
        if self.options["clip"] is not None:
            found["clip_score"] = measure_mean(self._clip_scores(pictures, [r["references"][0] for r in records]))
        if self.options["fid_weights"] is not None:
            originals = [sample.open_image() for sample in self.data.samples]
            fid = load_metric("fid", weights=self.options["fid_weights"])
            value = fid.compute(predictions=pictures, references=originals)["fid"]
            found["fid"] = Measurement(float(value), len(records))
        return found

    def _clip_scores(self, pictures: Sequence[Any], texts: Sequence[str]) -> list[float]:
        metric = load_metric("clip_score", weights=self.options["clip"])
        return metric.compute(predictions=list(pictures), references=list(texts))["scores"]

    def show(self, sample: EvaluationSample, record: Record, folder: Path) -> Shown:
        lines = [("prompt", record["references"][0])]
        return show_scene(self.data, sample, record, open_picture(record, folder), lines)


__all__ = ["TextToImageTask"]
