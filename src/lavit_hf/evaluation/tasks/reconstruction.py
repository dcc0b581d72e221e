"""Task `reconstruction`: an image to tokens, and these to an image again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import EvaluatedCheckpoint
from ..data.sample import EvaluationData, EvaluationSample
from ..measurement import Measurement
from ..tokens import measure_tokens, tokenize
from .base import Prediction, Record, Shown, Task
from .drawing import open_picture, score_scenes, show_scene


class ReconstructionTask(Task):
    """Draws images from their own tokens, without the language model."""

    name = "reconstruction"
    draws = True

    @classmethod
    def default_options(cls, data: EvaluationData) -> dict[str, Any]:
        return {"decoder": None, "num_inference_steps": 50, "decoder_guidance_scale": 5.0}

    def predict(self, checkpoint: EvaluatedCheckpoint, samples: Sequence[EvaluationSample]) -> list[Prediction]:
        images = [sample.open_image() for sample in samples]
        output = checkpoint.pipeline(self.options["decoder"]).reconstruct(
            images,
            num_inference_steps=self.options["num_inference_steps"],
            guidance_scale=self.options["decoder_guidance_scale"],
            generator=[self.generator(sample, "reconstruction") for sample in samples],
        )
        tokens = tokenize(checkpoint.model, checkpoint.processor, images)
        predictions = []
        for picture, codes, of_image in zip(output.images, output.codes, tokens, strict=True):
            num_tokens = {**of_image["num_tokens"], "discrete": len(codes)}
            predictions.append(Prediction({"codes": codes.tolist(), "num_tokens": num_tokens}, picture))
        return predictions

    def score(
        self, checkpoint: EvaluatedCheckpoint, records: Sequence[Record], folder: Path
    ) -> dict[str, Measurement]:
        found = score_scenes(self.data, records, folder) if self.data.is_scenes else {}
        return {**found, **measure_tokens(records, checkpoint.codebook_size)}

    def show(self, sample: EvaluationSample, record: Record, folder: Path) -> Shown:
        lines = [("tokens", str(len(record["codes"])))]
        return show_scene(self.data, sample, record, open_picture(record, folder), lines)


__all__ = ["ReconstructionTask"]
