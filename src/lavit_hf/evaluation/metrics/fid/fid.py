"""The Fréchet inception distance between drawn and real pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import evaluate  # type: ignore[import-untyped]
import numpy as np
import torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance  # type: ignore[import-untyped]

from lavit_hf.evaluation.metrics.images import choose_device, open_image

_DESCRIPTION = """
FID: the distance between two sets of pictures, as that of the normal distributions that InceptionV3's features of
either have. Lower is better. It takes thousands of pictures, and only distances with equally many of them compare.
"""
_CITATION = """
@inproceedings{heusel2017gans,
  title={{GANs} Trained by a Two Time-Scale Update Rule Converge to a Local {Nash} Equilibrium},
  author={Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017}
}
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions: Drawn images, as paths or PIL images; paths take next to no memory.
    references: As many real images.
Returns:
    fid: The distance; no mean over images, so without `scores`.
"""
_WHERE = (
    "The weights of InceptionV3 are the file inception-2015-12-05.pt (TorchScript, features as in the paper) from "
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt; download it "
    "and give its path: load_metric('fid', inception_path=...)."
)


class InceptionFeatures(torch.nn.Module):
    """InceptionV3 up to its pooled features, from the public TorchScript file.

    Args:
        path: The file. It resizes and scales images itself, as the paper's code did.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no TorchScript file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist. {_WHERE}")
        try:
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(f"{path} is no TorchScript file. {_WHERE}") from error

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features `[batch, 2048]` of images `[batch, 3, height, width]`, uint8."""
        return self.network(images, return_features=True)


def frechet_inception_distance(
    generated: Iterable[Image.Image],
    real: Iterable[Image.Image],
    inception_path: str | Path,
    device: str | None = None,
    batch_size: int = 32,
) -> float:
    """FID of two sets of images (Heusel et al., section 2). Only a batch of them is in memory.

    Args:
        generated: RGB images, two at least; may be an iterator.
        real: Likewise; need not be as many.
        inception_path: See `InceptionFeatures`.
        device: Where the network runs; a GPU if there is one, by default.
        batch_size: Images of the same size that go through the network together.

    Returns:
        The distance.

    Raises:
        FileNotFoundError: The weights are missing; says where to get them.
        ValueError: There are fewer than two images, or the file holds something else.
    """
    chosen = choose_device(device)
    distance = FrechetInceptionDistance(feature=InceptionFeatures(inception_path)).to(chosen)
    for images, is_real in ((real, True), (generated, False)):
        for batch in _batches(images, batch_size):
            distance.update(batch.to(chosen), real=is_real)
    if min(distance.real_features_num_samples, distance.fake_features_num_samples) < 2:
        raise ValueError("FID needs at least two generated and two real images, and thousands to mean anything.")
    return float(distance.compute())


def _batches(images: Iterable[Image.Image], batch_size: int) -> Iterator[torch.Tensor]:
    """Batches `[batch, 3, height, width]` of consecutive images of the same size."""
    for _, same_size in groupby(images, key=lambda image: image.size):
        while batch := [torch.from_numpy(np.array(image)) for image in islice(same_size, batch_size)]:
            yield torch.stack(batch).permute(0, 3, 1, 2)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Fid(evaluate.Metric):
    def __init__(
        self,
        *args: Any,
        inception_path: str | Path | None = None,
        device: str | None = None,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        if inception_path is None:
            raise ValueError(f"FID needs the weights of InceptionV3. {_WHERE}")
        super().__init__(*args, **kwargs)
        self.distance = partial(
            frechet_inception_distance, inception_path=inception_path, device=device, batch_size=batch_size
        )

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Image(decode=False), "references": datasets.Image(decode=False)}
            ),
            reference_urls=["https://arxiv.org/abs/1706.08500", "https://lightning.ai/docs/torchmetrics"],
        )

    def _compute(self, predictions: list[dict[str, Any]], references: list[dict[str, Any]]) -> dict[str, float]:
        return {"fid": self.distance(map(open_image, predictions), map(open_image, references))}
