"""The benchmarks of the paper: where their files are, what is asked, and which numbers were published.

One declaration for each; `original_tasks.py` says how they are asked and scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A file or folder of a benchmark.

    Attributes:
        paths: Where it may be, relative to the directory of the benchmark: as archives unpack, and as people keep it.
        url: Where it is published.
    """

    paths: tuple[str, ...]
    url: str

    def find(self, root: Path) -> Path | None:
        """Returns the first of the paths that exists."""
        return next((root / path for path in self.paths if (root / path).exists()), None)


@dataclass(frozen=True)
class Benchmark:
    """A published number.

    Attributes:
        name: What it is called on the command line.
        task: Name of the task.
        metric: Name of the measurement that is published.
        published: The numbers of the original's versions, `scale` times as large as what is measured here.
        num_samples: How many it has; if its file has more, the first ones are taken.
        data: The file of captions or questions.
        images: The folder of images.
        annotations: The file of answers, where it is another one.
        split: Which split of the file, if it has several.
        scale: What published numbers are multiplied by.
        first_question: Put before each question; where the answer contains "no", the question counts as unanswerable.
        deviations: What is not known of the published number, or done in another way here.
    """

    name: str
    task: str
    metric: str
    published: Mapping[str, float]
    num_samples: int
    data: Source
    images: Source
    annotations: Source | None = None
    split: str | None = None
    scale: float = 100.0
    first_question: str | None = None
    deviations: tuple[str, ...] = ()

    def find(self, root: str | Path) -> dict[str, Path]:
        """Finds the files.

        Args:
            root: The directory that they are in.

        Returns:
            Paths by `"data"`, `"images"` and, where there is one, `"annotations"`.

        Raises:
            ValueError: Something is missing; says what, and where it is published.
        """
        sources = {"data": self.data, "images": self.images, "annotations": self.annotations}
        wanted = {name: source for name, source in sources.items() if source is not None}
        found = {name: source.find(Path(root)) for name, source in wanted.items()}
        missing = [
            f"{' or '.join(wanted[name].paths)} ({wanted[name].url})" for name, path in found.items() if path is None
        ]
        if missing:
            raise ValueError(f"{root} is not complete for the benchmark {self.name}. Missing: {'; '.join(missing)}.")
        return {name: path for name, path in found.items() if path is not None}


_COCO = "http://images.cocodataset.org"
_VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
_OKVQA = "https://okvqa.allenai.org/static/data"
_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
_VAL2014 = Source(("val2014", "images/val2014", "coco/val2014"), f"{_COCO}/zips/val2014.zip")

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "coco",
            task="caption",
            metric="cider",
            published={"v1": 134.6, "v2": 133.3},
            num_samples=5000,
            data=Source(("dataset_coco.json",), _KARPATHY),
            images=_VAL2014,
            split="test",
        ),
        Benchmark(
            "nocaps",
            task="caption",
            metric="cider",
            published={"v1": 113.1, "v2": 112.0},
            num_samples=4500,
            data=Source(
                ("nocaps_val_4500_captions.json", "annotations/nocaps_val_4500_captions.json"),
                "https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json",
            ),
            images=Source(("images", "val"), "the coco_url of every image in that file"),
        ),
        Benchmark(
            "flickr30k",
            task="caption",
            metric="cider",
            published={"v1": 83.2, "v2": 81.4},
            num_samples=1000,
            data=Source(("dataset_flickr30k.json",), _KARPATHY),
            images=Source(
                ("flickr30k-images", "flickr30k_images", "images"), "https://shannon.cs.illinois.edu/DenotationGraph/"
            ),
            split="test",
        ),
        Benchmark(
            "vqav2",
            task="vqa",
            metric="vqa_accuracy",
            published={"v1": 68.2, "v2": 68.3},
            num_samples=214_354,
            data=Source(("v2_OpenEnded_mscoco_val2014_questions.json",), f"{_VQA}/v2_Questions_Val_mscoco.zip"),
            annotations=Source(("v2_mscoco_val2014_annotations.json",), f"{_VQA}/v2_Annotations_Val_mscoco.zip"),
            images=_VAL2014,
        ),
        Benchmark(
            "okvqa",
            task="vqa",
            metric="vqa_accuracy",
            published={"v1": 55.7, "v2": 55.9},
            num_samples=5046,
            data=Source(
                ("OpenEnded_mscoco_val2014_questions.json",), f"{_OKVQA}/OpenEnded_mscoco_val2014_questions.json.zip"
            ),
            annotations=Source(("mscoco_val2014_annotations.json",), f"{_OKVQA}/mscoco_val2014_annotations.json.zip"),
            images=_VAL2014,
        ),
        Benchmark(
            "gqa",
            task="vqa",
            metric="exact_match",
            published={"v1": 48.0, "v2": 47.9},
            num_samples=12_578,
            data=Source(
                ("testdev_balanced_questions.json", "questions/testdev_balanced_questions.json"),
                "https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip",
            ),
            images=Source(("images",), "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"),
        ),
        Benchmark(
            "vizwiz",
            task="vqa",
            metric="vqa_accuracy",
            published={"v1": 45.3, "v2": 41.0},
            num_samples=4319,
            data=Source(
                ("val.json", "Annotations/val.json", "annotations/val.json"),
                "https://vizwiz.cs.colorado.edu/VizWiz_final/vqa_data/Annotations.zip",
            ),
            images=Source(("val", "images/val"), "https://vizwiz.cs.colorado.edu/VizWiz_final/images/val.zip"),
            first_question='Is the question: "{}" answerable?',
        ),
        Benchmark(
            "coco-fid",
            task="text-to-image",
            metric="fid",
            published={"v1": 7.2, "v2": 7.1},
            num_samples=30_000,
            data=Source(
                ("annotations/captions_val2014.json", "captions_val2014.json"),
                f"{_COCO}/annotations/annotations_trainval2014.zip",
            ),
            images=_VAL2014,
            scale=1.0,
            deviations=(
                "the first caption of each of the first images by number; which ones the original took is unknown",
            ),
        ),
    )
}


__all__ = ["BENCHMARKS", "Benchmark", "Source"]
