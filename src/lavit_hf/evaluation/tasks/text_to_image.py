"""Task `text-to-image`: draw what a caption says."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...utils.progress import Progress, progress_bar
from ..checkpoint import EvaluatedCheckpoint
from ..data.sample import EvaluationData, EvaluationSample
from ..measurement import Measurement, measure_mean
from ..metrics.clip_similarity import ClipSimilarity
from .base import Prediction, Record, Shown, Task
from .drawing import open_picture, picture_path, score_scenes, show_scene

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

    def __init__(self, data: EvaluationData, options: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        super().__init__(data, options, seed)
        count, inception = self.options["num_candidates"], self.options["fid_weights"]
        if count > 1 and self.options["clip"] is None:
            raise ValueError(
                f"The best of {count} drawings is chosen by CLIP: --clip takes the directory of its weights, such as "
                "those of openai/clip-vit-large-patch14. Or draw only one with --candidates 1."
            )
        if inception is not None and not Path(inception).is_file():
            raise ValueError(f"{inception} does not exist; --fid-weights takes the TorchScript file of InceptionV3.")

    @property
    def scoring_options(self) -> tuple[str, ...]:  # type: ignore[override]
        """CLIP decides about predictions only if it has a choice."""
        return ("fid_weights",) if self.options["num_candidates"] > 1 else ("fid_weights", "clip")

    @classmethod
    def default_options(cls, data: EvaluationData) -> dict[str, Any]:
        return {**_PIPELINE, **_PAPER} if data.is_benchmark else dict(_PIPELINE)

    def metric_options(self) -> dict[str, dict[str, Any]]:
        if self.data.is_scenes or self.options["clip"] is None:
            return {}
        return {"clip_score": {"model_name_or_path": self.options["clip"]}}

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
        chosen = []
        for number, prompt in enumerate(prompts):
            start = number * count
            best = 0 if count == 1 else self._clip.choose_best(pictures[start : start + count], prompt)
            chosen.append(Prediction({"codes": codes[start + best]}, pictures[start + best]))
        return chosen

    @functools.cached_property
    def _clip(self) -> ClipSimilarity:
        return ClipSimilarity(self.options["clip"])

    def score(
        self, checkpoint: EvaluatedCheckpoint, records: Sequence[Record], folder: Path
    ) -> dict[str, Measurement]:
        found = {"tokens/mean": measure_mean([len(record["codes"]) for record in records], "images")}
        if self.data.is_scenes:
            return {**score_scenes(self.data, records, folder), **found}
        if "clip_score" in self.metrics:
            pictures = [str(picture_path(record, folder)) for record in records]
            prompts = [record["references"][0] for record in records]
            scores = self.metrics["clip_score"].compute(predictions=pictures, references=prompts)["scores"]
            found["clip_score"] = measure_mean(scores, "images")
        if self.options["fid_weights"] is not None:
            found["fid"] = Measurement(self._fid(records, folder), len(records), "images")
        return found

    def _fid(self, records: Sequence[Record], folder: Path) -> float:
        # Not the module of `evaluate`, which would hold all images in memory.
        from ..metrics.fid.fid import frechet_inception_distance

        drawn = (open_picture(record, folder) for record in records)
        real = (self.data.samples[index].open_image() for index in range(len(self.data.samples)))
        with progress_bar("FID", len(records) + len(self.data.samples), unit="image") as bar:
            return frechet_inception_distance(
                _counted(drawn, bar.update), _counted(real, bar.update), self.options["fid_weights"]
            )

    def show(self, sample: EvaluationSample, record: Record, folder: Path) -> Shown:
        lines = [("prompt", record["references"][0])]
        return show_scene(self.data, sample, record, open_picture(record, folder), lines)


def _counted(images: Iterable[Image.Image], progress: Progress) -> Iterator[Image.Image]:
    for image in images:
        yield image
        progress(1)


__all__ = ["TextToImageTask"]
