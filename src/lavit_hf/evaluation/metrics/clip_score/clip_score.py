"""The CLIP score of pictures and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import evaluate  # type: ignore[import-untyped]

from lavit_hf.evaluation.metrics import mean_and_scores
from lavit_hf.evaluation.metrics.images import ClipSimilarity, open_image

_DESCRIPTION = """
CLIPScore: 2.5 * max(cosine, 0) of CLIP's embeddings of an image and of "A photo depicts " and a text. The paper used
`openai/clip-vit-base-patch32`. With `weight=100, prefix=""` it is what torchmetrics and many papers on drawing report.
"""
_CITATION = """
@inproceedings{hessel2021clipscore,
  title={{CLIPScore}: A Reference-free Evaluation Metric for Image Captioning},
  author={Hessel, Jack and Holtzman, Ari and Forbes, Maxwell and Le Bras, Ronan and Choi, Yejin},
  booktitle={Conference on Empirical Methods in Natural Language Processing},
  year={2021}
}
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions: Images, as paths or PIL images.
    references: One text per image.
Returns:
    clip_score: Mean over images, between 0 and 2.5.
    scores: The score of each image.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ClipScore(evaluate.Metric):
    def __init__(
        self,
        *args: Any,
        model_name_or_path: str | Path | None = None,
        weight: float = 2.5,
        prefix: str = "A photo depicts ",
        device: str | None = None,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        if model_name_or_path is None:
            raise ValueError(
                "The CLIP score needs a CLIP checkpoint, a directory or a name on the Hub; the usual one is "
                "load_metric('clip_score', model_name_or_path='openai/clip-vit-base-patch32')."
            )
        super().__init__(*args, **kwargs)
        self.weight = weight
        self.prefix = prefix
        self.clip = ClipSimilarity(model_name_or_path, device, batch_size)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Image(decode=False), "references": datasets.Value("string")}
            ),
            reference_urls=["https://arxiv.org/abs/2104.08718", "https://github.com/jmhessel/clipscore"],
        )

    def _compute(self, predictions: list[dict[str, Any]], references: list[str]) -> dict[str, Any]:
        cosines = self.clip.compare(map(open_image, predictions), [self.prefix + text for text in references])
        return mean_and_scores("clip_score", [self.weight * max(cosine, 0.0) for cosine in cosines])
