"""The tasks of an evaluation: each asks a checkpoint for predictions, scores them, and shows samples.

`Task` is what they have in common; captions and answers come first, drawings after them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from ..data.worlds import WORLDS, World
from ..modeling.modeling_lavit_visual_tokenizer import move_pixels
from ..pipelines.image_to_text import (
    ANSWER,
    CAPTION,
    answer_of,
    answer_options,
    first_sentence,
    generate_text,
    question_prompt,
)
from ..processing.image_processing_pil_lavit import load_image
from ..utils.paths import resolve_inside
from ..utils.progress import Progress, progress_bar
from ..utils.seeds import sample_seed
from .checkpoint import EvaluatedCheckpoint
from .data.samples import EvaluationData, EvaluationSample
from .facts import WHOLE, Comparison, compare_facts, measure_facts, read_facts, wrong_parts
from .measurement import Measurement, measure_correlation, measure_mean, measure_share
from .metrics import load_metric
from .metrics.images import ClipSimilarity

Record = Mapping[str, Any]
"""A line of `predictions.jsonl`: the sample's texts, and what the model made of it."""

PLAIN = "plain"
BRANCHES = ("discrete", "continuous")

BUDGET = "num_image_tokens"
"""The option that says how many tokens an image becomes; `None` leaves it to the selector."""

VISUAL_MODE = "visual_mode"
"""The option that says how an image is read, as features or as codes; `None` leaves it to the processor."""

_ENTERING: dict[str, Any] = {BUDGET: None, VISUAL_MODE: None}


@dataclass
class Prediction:
    """What the model made of a sample.

    Attributes:
        values: What its record says beside the sample's own texts; has to be JSON.
        picture: What was drawn, if something was.
    """

    values: dict[str, Any]
    picture: Image.Image | None = None


@dataclass
class Shown:
    """How a sample looks on the page of samples.

    Attributes:
        pictures: Each with a title.
        lines: Texts, each with a title.
        is_right: Whether all of it is right; `None` if that cannot be told.
    """

    pictures: list[tuple[str, Image.Image]]
    lines: list[tuple[str, str]] = field(default_factory=list)
    is_right: bool | None = None


class Task(ABC):
    """Something that a checkpoint is asked to do with every sample, and how that is scored.

    Args:
        data: The samples that it is asked about.
        options: What the user set, by name. The task chooses the rest, and refuses what it does not know.
        seed: All random choices follow from it.
    """

    name: ClassVar[str]
    draws: ClassVar[bool] = False
    sees_images: ClassVar[bool] = True
    needs_world: ClassVar[bool] = False
    scoring_options: ClassVar[tuple[str, ...]] = ()
    """Options that predictions do not depend on."""
    protocol: ClassVar[str] = PLAIN
    """The protocol of benchmarks; `original_tasks.py` has the paper's."""
    own_options: ClassVar[tuple[str, ...]] = ()
    """Options for which checkpoints may have values of their own."""

    def __init__(
        self,
        data: EvaluationData,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.data = data
        self.seed = seed
        self.options = self.default_options(data)
        self._given = {name: value for name, value in (options or {}).items() if value is not None}
        for name in options or ():
            if name not in self.options:
                raise ValueError(f"The task {self.name} has no option {name!r}; it has {', '.join(self.options)}.")
        self.options.update(self._given)
        self._check_lengths()

    def _check_lengths(self) -> None:
        least, most = (self.options.get(name) for name in ("min_new_tokens", "max_new_tokens"))
        if least is not None and most is not None and least > most:
            raise ValueError(
                f"The task {self.name} writes at least {least} tokens (min_new_tokens), more than the {most} of "
                "max_new_tokens: texts would be cut before they may end. Set both."
            )

    @classmethod
    @abstractmethod
    def default_options(cls, data: EvaluationData) -> dict[str, Any]:
        """Returns all options, as the original code has them, or as the data needs them."""

    def follow(self, generation_config: Any) -> None:
        """Takes options that the user did not set from a checkpoint's generation config, as `lavit ask` does.

        Scenes and benchmarks are asked with the task's own options.
        """
        if self.data.is_scenes or self.data.is_benchmark:
            return
        own = {name: getattr(generation_config, name, None) for name in self.own_options}
        own = {name: value for name, value in own.items() if value is not None}
        self.options = {**self.default_options(self.data), **own, **self._given}
        self._check_lengths()

    @property
    def questions_per_sample(self) -> int:
        """How often the model is asked about each sample."""
        return 1

    def order(self) -> list[int]:
        """Returns the numbers of samples in the order in which they are asked about; neighbors share a batch."""
        return list(range(len(self.data.samples)))

    @abstractmethod
    def predict(self, checkpoint: EvaluatedCheckpoint, samples: Sequence[EvaluationSample]) -> list[Prediction]:
        """Asks the model about samples. What it says about one must not depend on the others."""

    @abstractmethod
    def score(
        self, checkpoint: EvaluatedCheckpoint, records: Sequence[Record], folder: Path
    ) -> dict[str, Measurement]:
        """Scores all predictions.

        Args:
            checkpoint: The checkpoint that made them.
            records: In the order of the data.
            folder: The folder that paths in records are relative to.
        """

    @abstractmethod
    def show(self, sample: EvaluationSample, record: Record, folder: Path) -> Shown:
        """Returns what the page of samples shows of one sample."""

    def metric_options(self) -> dict[str, dict[str, Any]]:
        """Returns the metrics of `lavit_hf.evaluation.metrics` that score predictions, with options to load each."""
        return {}

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """Metrics by name; they are loaded when they are first asked for."""
        return {name: load_metric(name, **options) for name, options in self.metric_options().items()}

    def settings(self) -> dict[str, Any]:
        """Returns what predictions depend on besides checkpoint and data."""
        options = {name: value for name, value in self.options.items() if name not in self.scoring_options}
        return {"task": self.name, "seed": self.seed, "options": options}

    def generator(self, sample: EvaluationSample, purpose: str, number: int = 0) -> torch.Generator:
        """Returns a generator that belongs to one sample, whatever is drawn before it or beside it."""
        seed = sample_seed(self.seed, number, 0, f"{sample.id}/{purpose}")
        return torch.Generator().manual_seed(seed)


@torch.no_grad()
def tokenize_images(
    model: Any, processor: Any, images: Sequence[Image.Image], num_image_tokens: int | None = None
) -> list[dict[str, Any]]:
    """Tokenizes images by both branches.

    Args:
        model: A `LavitForConditionalGeneration`.
        processor: Its processor.
        images: Any number.
        num_image_tokens: How many tokens each becomes; by default the selector decides.

    Returns:
        For each image its `codes`, and how many tokens it has in either branch, `num_tokens`.
    """
    visual_tokenizer = model.visual_tokenizer
    pixel_values = processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
    pixel_values = move_pixels(pixel_values, visual_tokenizer)
    discrete = visual_tokenizer.encode(pixel_values, num_tokens=num_image_tokens)
    continuous = visual_tokenizer.embed(pixel_values, num_tokens=num_image_tokens)
    codes = discrete.codes.split(discrete.num_tokens.tolist())
    return [
        {"codes": of_image.tolist(), "num_tokens": {"discrete": len(of_image), "continuous": count}}
        for of_image, count in zip(codes, continuous.num_tokens.tolist(), strict=True)
    ]


def measure_tokens(
    records: Sequence[Mapping[str, Any]], codebook_size: int, world: World | None = None
) -> dict[str, Measurement]:
    """Measures what [`tokenize_images`] has found.

    Args:
        records: Records with what it returned, and with `meta["scene"]` where scenes are evaluated.
        codebook_size: How many codes there are.
        world: The world of the scenes, by default colored shapes.

    Returns:
        Per branch mean and standard deviation of the number of tokens, and how that is correlated with the area of
        the objects in a scene; and the share of codes that occur, which is no estimate: more images use more codes.
    """
    found: dict[str, Measurement] = {}
    world = world or WORLDS["scenes"]
    scenes = [record["meta"]["scene"] for record in records if "scene" in record["meta"]]
    areas = [world.object_area(world.scene_from_dict(scene)) for scene in scenes]
    for branch in BRANCHES:
        counts = [record["num_tokens"][branch] for record in records]
        found[f"tokens/{branch}/mean"] = measure_mean(counts, "images")
        found[f"tokens/{branch}/std"] = Measurement(float(np.std(counts)), len(counts), "images")
        if areas:
            found[f"tokens/{branch}/r_with_object_area"] = measure_correlation(counts, areas, "images")
    used = {code for record in records for code in record["codes"]}
    found["live_codes"] = Measurement(len(used) / codebook_size, codebook_size, "codes", is_share=True)
    return found


def score_texts(name: str, metric: Any, records: Sequence[Record]) -> dict[str, Measurement]:
    """Computes all numbers of a metric; its mean over samples has an interval.

    Args:
        name: Name of the metric.
        metric: The metric.
        records: Records with `prediction` and `references`.
    """
    result = metric.compute(
        predictions=[record["prediction"] for record in records],
        references=[record["references"] for record in records],
    )
    scores = result.pop("scores", None)
    found = {key: Measurement(float(value), len(records)) for key, value in result.items()}
    if scores is not None:
        found[name] = measure_mean(scores)
    return found


# Captions of scenes are from 8 to 23 words, each of which may be several tokens.
_SCENE_CAPTIONS = {"min_new_tokens": 1, "max_new_tokens": 64}


def _split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for `generate`, and those that say how images enter."""
    writing = {name: value for name, value in options.items() if name not in _ENTERING}
    return writing, {name: options[name] for name in _ENTERING}


class CaptionTask(Task):
    """Describes images; of scenes, every fact is checked."""

    name = "caption"
    own_options = tuple(CAPTION)

    @classmethod
    def default_options(cls, data: EvaluationData) -> dict[str, Any]:
        return {**CAPTION, **(_SCENE_CAPTIONS if data.is_scenes else {}), **_ENTERING}

    def metric_options(self) -> dict[str, dict[str, Any]]:
        return {} if self.data.is_scenes else {name: {} for name in self.data.caption_metrics}

    def predict(self, checkpoint: EvaluatedCheckpoint, samples: Sequence[EvaluationSample]) -> list[Prediction]:
        model, processor = checkpoint.model, checkpoint.processor
        images = [sample.open_image() for sample in samples]
        options, entering = _split_options(self.options)
        texts = generate_text(model, processor, images, [""] * len(images), options, **entering)
        tokens = tokenize_images(model, processor, images, self.options[BUDGET])
        return [
            Prediction({"prediction": first_sentence(text), **of_image})
            for text, of_image in zip(texts, tokens, strict=True)
        ]

    def score(
        self, checkpoint: EvaluatedCheckpoint, records: Sequence[Record], folder: Path
    ) -> dict[str, Measurement]:
        found: dict[str, Measurement] = {}
        if self.data.world is not None:
            compared = (_compare_caption(record, self.data.world) for record in records)
            found.update(measure_facts(compared, world=self.data.world))
        else:
            for name, metric in self.metrics.items():
                found.update(score_texts(name, metric, records))
        return {**found, **measure_tokens(records, checkpoint.codebook_size, self.data.world)}

    def show(self, sample: EvaluationSample, record: Record, folder: Path) -> Shown:
        shown = Shown([("picture", sample.open_image())], [("caption", record["prediction"])])
        shown.lines += [("reference", text) for text in record["references"][:1]]
        if self.data.world is not None:
            wrong = wrong_parts(_compare_caption(record, self.data.world))
            shown.is_right = not wrong
            shown.lines += [("wrong", ", ".join(wrong))] if wrong else []
        return shown


def _compare_caption(record: Record, world: World) -> Comparison:
    truth = world.scene_from_dict(record["meta"]["scene"])
    return compare_facts(read_facts(record["prediction"], world), truth, world)


# Answers about scenes are one or two words, among which a search would find nothing better. The original does not end
# before the second token, which with words as tokens would be one word too many.
_SCENE_ANSWERS = {"num_beams": 1, "min_new_tokens": 1}
_RIGHT = 0.5  # from this score on an answer is not marked as wrong on the page of samples


class VqaTask(Task):
    """Answers questions; besides all of them, every kind of question is scored by itself."""

    name = "vqa"
    own_options = tuple(ANSWER)

    @classmethod
    def default_options(cls, data: EvaluationData) -> dict[str, Any]:
        return {**ANSWER, **(_SCENE_ANSWERS if data.is_scenes else {}), **_ENTERING}

    def metric_options(self) -> dict[str, dict[str, Any]]:
        return {self.data.answer_metric: {}}

    def predict(self, checkpoint: EvaluatedCheckpoint, samples: Sequence[EvaluationSample]) -> list[Prediction]:
        images = [sample.open_image() for sample in samples]
        texts = self.ask(checkpoint, images, [sample.question or "" for sample in samples])
        return [Prediction({"prediction": answer_of(text)}) for text in texts]

    def order(self) -> list[int]:
        """Longest questions first: batches pad little, and what does not fit into memory fails at once."""
        samples = self.data.samples
        return sorted(super().order(), key=lambda index: len(samples[index].question or ""), reverse=True)

    def ask(
        self, checkpoint: EvaluatedCheckpoint, images: Sequence[Image.Image], questions: Sequence[str]
    ) -> list[str]:
        """Asks a question about each image, and returns what the model writes."""
        options, entering = _split_options(self.options)
        return generate_text(
            checkpoint.model,
            checkpoint.processor,
            images,
            [question_prompt(question) for question in questions],
            answer_options(options),
            **entering,
        )

    def score(
        self, checkpoint: EvaluatedCheckpoint, records: Sequence[Record], folder: Path
    ) -> dict[str, Measurement]:
        metric, scores = self.data.answer_metric, self.score_answers(records)
        kinds = [record["meta"].get("kind") for record in records]
        images = [self.data.samples[index].image_key() for index in range(len(records))]
        found = {metric: measure_mean(scores, "questions", is_share=True, clusters=images)}
        for kind in dict.fromkeys(kind for kind in kinds if kind is not None):
            numbers = [number for number, its in enumerate(kinds) if its == kind]
            of_kind, their_images = [scores[number] for number in numbers], [images[number] for number in numbers]
            found[f"{metric}/{kind}"] = measure_mean(of_kind, "questions", is_share=True, clusters=their_images)
        return found

    def show(self, sample: EvaluationSample, record: Record, folder: Path) -> Shown:
        (score,) = self.score_answers([record])
        lines = [("question", record["question"]), ("answer", record["prediction"])]
        lines += [("right answer", ", ".join(dict.fromkeys(record["references"])))]
        return Shown([("picture", sample.open_image())], lines, is_right=score >= _RIGHT)

    def score_answers(self, records: Sequence[Record]) -> list[float]:
        """Scores each answer from 0 to 1."""
        result = self.metrics[self.data.answer_metric].compute(
            predictions=[record["prediction"] for record in records],
            references=[record["references"] for record in records],
        )
        return result["scores"]


def open_picture(record: Record, folder: Path) -> Image.Image:
    """Opens what was drawn of a sample.

    Raises:
        ValueError: The file is missing, no image, too large to be decoded safely, or elsewhere.
    """
    with load_image(picture_path(record, folder)) as picture:
        return picture.convert("RGB")


def picture_path(record: Record, folder: Path) -> Path:
    """Returns the path of what was drawn of a sample.

    Raises:
        ValueError: The record, which a file may hold from before, names a file elsewhere.
    """
    return resolve_inside(folder, record["picture"], f"The prediction of {record['id']}")


def score_scenes(
    data: EvaluationData, world: World, records: Sequence[Record], folder: Path
) -> dict[str, Measurement]:
    """Scores drawings of scenes by what a program that knows nothing of the model sees in them.

    The same program's opinion on the true pictures, `judge_on_truth`, is the most that drawings could reach.
    """
    drawn = [_compare_drawing(open_picture(record, folder), record, world) for record in records]
    true = [_compare_drawing(data.samples[index].open_image(), record, world) for index, record in enumerate(records)]
    return {**measure_facts(drawn, world=world), **measure_facts(true, "judge_on_truth/", world)}


def show_scene(
    data: EvaluationData, sample: EvaluationSample, record: Record, picture: Image.Image, lines: list[tuple[str, str]]
) -> Shown:
    """Shows a drawing beside the sample's own picture and, if that is a scene, what is wrong about it."""
    shown = Shown([("original", sample.open_image()), ("drawn", picture)], lines)
    if data.world is not None:
        wrong = wrong_parts(_compare_drawing(picture, record, data.world))
        shown.is_right = not wrong
        shown.lines += [("wrong", ", ".join(wrong))] if wrong else []
    return shown


def _compare_drawing(picture: Image.Image, record: Record, world: World) -> Comparison:
    seen = world.facts_of(world.judge(picture))
    return compare_facts(seen, world.scene_from_dict(record["meta"]["scene"]), world)


def blackened_of(output: Any) -> list[dict[str, bool]]:
    """What records of drawings say of a safety checker: whether it blackened them; nothing where there is none."""
    flags = output.nsfw_content_detected
    return [{} for _ in output.images] if flags is None else [{"blackened": bool(flag)} for flag in flags]


def measure_blackened(records: Sequence[Record]) -> dict[str, Measurement]:
    """The share of drawings that a safety checker blackened, which are wrong whatever was drawn."""
    flags = [record["blackened"] for record in records if "blackened" in record]
    return {"blackened": measure_share(sum(flags), len(flags), "images")} if flags else {}


# `None` is the pipeline's own choice: what the original code draws single pictures with.
_DRAWING = {
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
_PIPELINE_OPTIONS = (
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
    sees_images = False

    def __init__(self, data: EvaluationData, options: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        super().__init__(data, options, seed)
        count, inception = self.options["num_candidates"], self.options["fid_weights"]
        if count > 1 and self.options["clip"] is None:
            raise ValueError(
                f"The best of {count} drawings is chosen by CLIP: --clip takes the directory of its weights, such as "
                "those of openai/clip-vit-large-patch14. Or draw only one with --candidates 1."
            )
        if inception is not None and not Path(inception).is_file():
            raise ValueError(f"{inception} does not exist; --inception takes the TorchScript file of InceptionV3.")

    @property
    def scoring_options(self) -> tuple[str, ...]:  # type: ignore[override]
        """CLIP decides about predictions only if it has a choice."""
        return ("fid_weights",) if self.options["num_candidates"] > 1 else ("fid_weights", "clip")

    @classmethod
    def default_options(cls, data: EvaluationData) -> dict[str, Any]:
        return {**_DRAWING, **_PAPER} if data.is_benchmark else dict(_DRAWING)

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
            batch_size=max(len(prompts) // count, 1),  # or candidates would be so many pictures more at a time
            **{name: self.options[name] for name in _PIPELINE_OPTIONS},
        )
        pictures, codes = list(output.images), [of_image.tolist() for of_image in output.codes]
        blackened = blackened_of(output)
        chosen = []
        for number, prompt in enumerate(prompts):
            start = number * count
            best = 0 if count == 1 else self._clip.choose_best(pictures[start : start + count], prompt)
            chosen.append(
                Prediction({"codes": codes[start + best], **blackened[start + best]}, pictures[start + best])
            )
        return chosen

    @functools.cached_property
    def _clip(self) -> ClipSimilarity:
        return ClipSimilarity(self.options["clip"])

    def score(
        self, checkpoint: EvaluatedCheckpoint, records: Sequence[Record], folder: Path
    ) -> dict[str, Measurement]:
        found = {
            "tokens/mean": measure_mean([len(record["codes"]) for record in records], "images"),
            **measure_blackened(records),
        }
        if self.data.world is not None:
            return {**score_scenes(self.data, self.data.world, records, folder), **found}
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
        from .metrics.fid.fid import frechet_inception_distance

        drawn = (open_picture(record, folder) for record in records)
        real = (self.real_image(self.data.samples[index]) for index in range(len(self.data.samples)))
        with progress_bar("FID", len(records) + len(self.data.samples), unit="image") as bar:
            return frechet_inception_distance(
                _counted(drawn, bar.update), _counted(real, bar.update), self.options["fid_weights"]
            )

    def real_image(self, sample: EvaluationSample) -> Image.Image:
        """Opens the image that stands for a sample among those that drawings are compared with."""
        return sample.open_image()

    def show(self, sample: EvaluationSample, record: Record, folder: Path) -> Shown:
        lines = [("prompt", record["references"][0])]
        return show_scene(self.data, sample, record, open_picture(record, folder), lines)


def _counted(images: Iterable[Image.Image], progress: Progress) -> Iterator[Image.Image]:
    for image in images:
        yield image
        progress(1)


class ReconstructionTask(Task):
    """Draws images from their own tokens, without the language model."""

    name = "reconstruction"
    draws = True

    @classmethod
    def default_options(cls, data: EvaluationData) -> dict[str, Any]:
        return {"decoder": None, "num_inference_steps": 50, "decoder_guidance_scale": None, BUDGET: None}

    def predict(self, checkpoint: EvaluatedCheckpoint, samples: Sequence[EvaluationSample]) -> list[Prediction]:
        images = [sample.open_image() for sample in samples]
        output = checkpoint.pipeline(self.options["decoder"]).reconstruct(
            images,
            num_inference_steps=self.options["num_inference_steps"],
            guidance_scale=self.options["decoder_guidance_scale"],
            num_image_tokens=self.options[BUDGET],
            generator=[self.generator(sample, "reconstruction") for sample in samples],
        )
        tokens = tokenize_images(checkpoint.model, checkpoint.processor, images, self.options[BUDGET])
        predictions = []
        for picture, codes, of_image, blackened in zip(
            output.images, output.codes, tokens, blackened_of(output), strict=True
        ):
            num_tokens = {**of_image["num_tokens"], "discrete": len(codes)}
            values = {"codes": codes.tolist(), "num_tokens": num_tokens, **blackened}
            predictions.append(Prediction(values, picture))
        return predictions

    def score(
        self, checkpoint: EvaluatedCheckpoint, records: Sequence[Record], folder: Path
    ) -> dict[str, Measurement]:
        world = self.data.world
        found = {} if world is None else score_scenes(self.data, world, records, folder)
        found |= measure_blackened(records)
        return {**found, **measure_tokens(records, checkpoint.codebook_size, self.data.world)}

    def show(self, sample: EvaluationSample, record: Record, folder: Path) -> Shown:
        lines = [("tokens", str(len(record["codes"])))]
        return show_scene(self.data, sample, record, open_picture(record, folder), lines)


class EditingTask(Task):
    """Draws pictures of a world again, with one thing changed ("the same with a dog instead of the cat").

    Right is a drawing on which that is changed, and everything else is what and where it was.
    """

    name = "editing"
    draws = True
    needs_world = True

    @classmethod
    def default_options(cls, data: EvaluationData) -> dict[str, Any]:
        return {name: _DRAWING[name] for name in ("decoder", *_PIPELINE_OPTIONS)} | {BUDGET: None}

    def predict(self, checkpoint: EvaluatedCheckpoint, samples: Sequence[EvaluationSample]) -> list[Prediction]:
        output = checkpoint.pipeline(self.options["decoder"])(
            [[sample.open_image(), sample.references[0]] for sample in samples],
            num_image_tokens=self.options[BUDGET],
            generator=[self.generator(sample, "drawing") for sample in samples],
            **{name: self.options[name] for name in _PIPELINE_OPTIONS},
        )
        return [
            Prediction({"codes": codes.tolist(), **blackened}, picture)
            for picture, codes, blackened in zip(output.images, output.codes, blackened_of(output), strict=True)
        ]

    def score(
        self, checkpoint: EvaluatedCheckpoint, records: Sequence[Record], folder: Path
    ) -> dict[str, Measurement]:
        world = _world_of(self.data)
        seen = [world.facts_of(world.judge(open_picture(record, folder))) for record in records]
        after, before = (
            [world.scene_from_dict(record["meta"][name]) for record in records] for name in ("scene", "before")
        )
        drawn = [compare_facts(facts, scene, world) for facts, scene in zip(seen, after, strict=True)]
        on_truth = (world.facts_of(world.judge(world.render(scene))) for scene in after)
        true = [compare_facts(facts, scene, world) for facts, scene in zip(on_truth, after, strict=True)]
        is_copy = [facts == world.facts_of(scene) for facts, scene in zip(seen, before, strict=True)]
        found = measure_facts(drawn, world=world)
        kinds = [record["meta"]["kind"] for record in records]
        for kind in sorted(set(kinds)):
            right = [one[WHOLE][0] for one, its in zip(drawn, kinds, strict=True) if its == kind]
            found[f"{WHOLE}/{kind}"] = measure_share(sum(right), len(right), "scenes")
        found["unchanged"] = measure_share(sum(is_copy), len(is_copy), "scenes")
        found |= measure_blackened(records)
        return {**found, **measure_facts(true, "judge_on_truth/", world)}

    def show(self, sample: EvaluationSample, record: Record, folder: Path) -> Shown:
        lines = [("change", record["references"][0])]
        return show_scene(self.data, sample, record, open_picture(record, folder), lines)


def _world_of(data: EvaluationData) -> World:
    if data.world is None:
        raise ValueError(f"The task editing is for made scenes, which {data.name} is not.")
    return data.world


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (CaptionTask, VqaTask, TextToImageTask, ReconstructionTask, EditingTask)
}


def tasks_for(data: str) -> tuple[str, ...]:
    """Names the tasks that the data of a name may be for: all of a world, the others without editing."""
    return tuple(name for name, task in TASKS.items() if data in WORLDS or not task.needs_world)


__all__ = [
    "BUDGET",
    "PLAIN",
    "TASKS",
    "CaptionTask",
    "EditingTask",
    "Prediction",
    "ReconstructionTask",
    "Record",
    "Shown",
    "Task",
    "TextToImageTask",
    "VqaTask",
    "measure_tokens",
    "open_picture",
    "picture_path",
    "score_scenes",
    "score_texts",
    "show_scene",
    "tasks_for",
    "tokenize_images",
]
