"""LaVIT over datasets of any size, for an engine that maps over batches: Ray Data above all.

Each class loads a checkpoint once and is then called with batches, columns by name, to which it adds one of its own.
Scheduling, retries and resources are the engine's:

```python
>>> import ray
>>> from lavit_hf.batch import Captioner

>>> pictures = ray.data.read_binary_files("pictures/", include_paths=True)
>>> captions = pictures.map_batches(
...     Captioner,
...     fn_constructor_kwargs={"checkpoint": "lavit-7b-v2", "image_column": "bytes"},
...     batch_size=64,
...     num_gpus=1,
...     compute=ray.data.ActorPoolStrategy(size=8),
... )
>>> captions.drop_columns(["bytes"]).write_parquet("captions/")
```

A row that cannot be used stays, with `None` in the new column and the reason in `error`. One that comes with a reason
there, from another of these classes, is not worked on and keeps it. What is made of a row depends on the row alone
(but for the rounding of half precision), so that one that an engine repeats after a failure becomes the same.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .modeling.checkpoint_files import load_complete
from .modeling.modeling_lavit import LavitForConditionalGeneration
from .pipelines.image_to_text import CAPTION, first_sentence, generate_text, merge_options
from .processing.processing_lavit import ImageTextProcessor
from .processing.tokenization_lavit import check_text
from .training.dataset import check_learned_text, read_images
from .training.language_model.adapters import apply_adapter, find_adapter
from .training.language_model.data_collator import IGNORED, LavitDataCollator
from .utils.seeds import sample_seed

_Batch = Mapping[str, Any]


class _Worker:
    """A checkpoint, and what all batches have in common.

    Args:
        checkpoint: A LaVIT, or LoRA adapters of one: a directory or a name on the Hub.
        output_column: The new column.
        device: Where to compute; by default the first CUDA device (of those that the engine gives), or the CPU.
        dtype: That of the weights; by default float32 on a CPU, and as stored elsewhere.
        num_threads: Of torch; by default as many as it takes, which is too many where workers share a machine.
    """

    def __init__(
        self,
        checkpoint: str,
        output_column: str,
        device: str | None = None,
        dtype: str | None = None,
        num_threads: int | None = None,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.checkpoint, self.output_column = checkpoint, output_column
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or ("float32" if self.device.type == "cpu" else "auto")
        adapter = find_adapter(checkpoint)
        base, source = (checkpoint, checkpoint) if adapter is None else (adapter.base, adapter.processor)
        model = load_complete(LavitForConditionalGeneration, base, dtype=self.dtype)
        self.model = model if adapter is None else apply_adapter(model, adapter)
        self.model.to(self.device).eval()  # type: ignore[arg-type]  # its wrapper hides self
        self.processor = ImageTextProcessor.from_pretrained(source, visual_tokenizer=self.model)

    def __call__(self, batch: _Batch) -> dict[str, Any]:
        """
        Args:
            batch: Columns by name, as arrays or lists.

        Returns:
            The same, with the new column and `error`. Rows that have a text there already are not worked on, and keep
            it; to try them again, drop the column.

        Raises:
            KeyError: If a column is missing.
        """
        size = len(next(iter(batch.values()), ()))
        results: list[Any] = [None] * size
        errors = [_known_error(value) for value in batch.get("error", [None] * size)]
        good: list[int] = []
        inputs: list[Any] = []
        for index in range(size):
            if errors[index] is not None:
                continue
            try:
                inputs.append(self.read({name: values[index] for name, values in batch.items()}))
                good.append(index)
            except ValueError as error:
                errors[index] = str(error)
        if good:
            with torch.no_grad():
                outputs = self.work(inputs)
            for index, output in zip(good, outputs, strict=True):
                results[index] = output
        return {**batch, self.output_column: _column(results), "error": _column(errors)}

    def read(self, row: Mapping[str, Any]) -> Any:
        """What of a row is worked on.

        Raises:
            ValueError: If it cannot be used.
        """
        raise NotImplementedError

    def work(self, inputs: list[Any]) -> Sequence[Any]:
        """What becomes of each."""
        raise NotImplementedError


def _column(values: Sequence[Any]) -> np.ndarray:
    """Values of any kind and length, one per row, which numpy shall not stack."""
    column = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        column[index] = value
    return column


def _known_error(value: Any) -> str | None:
    """What another worker has said of a row; a column without any may hold NaN, too."""
    return value if isinstance(value, str) and value else None


def _take(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise KeyError(f"The batch has no column {name!r}; it has {', '.join(map(repr, row))}.")
    return row[name]


def _read_image(row: Mapping[str, Any], name: str) -> Any:
    """One image: bytes, an array, a path or URL, or what `datasets` stores."""
    images = read_images(_take(row, name))
    if len(images) != 1:
        raise ValueError(f"the row has {len(images)} images; one is wanted")
    return images[0]


class Captioner(_Worker):
    """Describes pictures in a sentence, by default as the original does.

    Args:
        checkpoint: As for all classes here: a LaVIT, or LoRA adapters of one.
        image_column: Where the pictures are: bytes, arrays, paths, or what `datasets` stores.
        output_column: The new column, of texts.
        prompt: Text the captions start from.
        num_image_tokens: How many tokens a picture becomes; by default the visual tokenizer decides.
        generation: Options for `generate`, such as `max_new_tokens`.
        options: `device`, `dtype` and `num_threads`.
    """

    def __init__(
        self,
        checkpoint: str,
        image_column: str = "image",
        output_column: str = "caption",
        prompt: str = "",
        num_image_tokens: int | None = None,
        generation: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(checkpoint, output_column, **options)
        self.image_column, self.prompt, self.num_image_tokens = image_column, prompt, num_image_tokens
        self.generation = merge_options(self.model, CAPTION, dict(generation or {}))

    def read(self, row: Mapping[str, Any]) -> Any:
        """The picture."""
        return _read_image(row, self.image_column)

    def work(self, inputs: list[Any]) -> list[str]:
        """Captions."""
        texts = generate_text(
            self.model,
            self.processor,
            inputs,
            [self.prompt] * len(inputs),
            self.generation,
            num_image_tokens=self.num_image_tokens,
        )
        return [first_sentence(text) for text in texts]


class Tokenizer(_Worker):
    """Turns pictures into codes, as `lavit tokenize` does; what `StreamedTrainingDataset` reads beside a text.

    Args:
        checkpoint: As for [`Captioner`].
        image_column: As for [`Captioner`].
        output_column: The new column: a list of codes for each image of a row, which is one.
        num_image_tokens: How many codes a picture becomes; by default the visual tokenizer decides.
        options: `device`, `dtype` and `num_threads`.
    """

    def __init__(
        self,
        checkpoint: str,
        image_column: str = "image",
        output_column: str = "codes",
        num_image_tokens: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(checkpoint, output_column, **options)
        self.image_column, self.num_image_tokens = image_column, num_image_tokens

    def read(self, row: Mapping[str, Any]) -> Any:
        """The picture."""
        return _read_image(row, self.image_column)

    def work(self, inputs: list[Any]) -> list[list[list[int]]]:
        """Codes."""
        offset = self.model.config.visual_token_offset
        ids = self.processor.tokenize_images(inputs, num_image_tokens=self.num_image_tokens)
        return [[(of_image[1:-1] - offset).tolist()] for of_image in ids]


class Scorer(_Worker):
    """How likely a text is after a picture: the mean logarithm of the probability of its ids, its end included.

    Args:
        checkpoint: As for [`Captioner`].
        image_column: As for [`Captioner`].
        text_column: Where the text is.
        output_column: The new column, of numbers below 0; higher ones fit better.
        options: `device`, `dtype` and `num_threads`.
    """

    def __init__(
        self,
        checkpoint: str,
        image_column: str = "image",
        text_column: str = "text",
        output_column: str = "score",
        **options: Any,
    ) -> None:
        super().__init__(checkpoint, output_column, **options)
        self.image_column, self.text_column = image_column, text_column
        self._collator = LavitDataCollator(self.processor, image_first_probability=1.0, condition_dropout=0.0)

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Picture and text, as a row to train on."""
        text = _take(row, self.text_column)
        check_learned_text(text)
        if self.processor.image_token in text:
            raise ValueError(f"the text has an {self.processor.image_token} placeholder: the image stands before it")
        return {"image": _read_image(row, self.image_column), "text": text, "sample_id": 0}

    def work(self, inputs: list[Any]) -> list[float]:
        """Scores."""
        batch = {name: value.to(self.device) for name, value in self._collator(inputs).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = self.model(**batch).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return (-losses.sum(1) / (labels != IGNORED).sum(1)).tolist()


class Drawer(_Worker):
    """Draws pictures from texts, with the defaults of `LavitTextToImagePipeline`.

    Args:
        checkpoint: As for [`Captioner`]; with a pixel decoder.
        prompt_column: Where the texts are.
        output_column: The new column, of PNG files as bytes.
        seed: With the prompt it decides what is drawn: equal prompts become equal pictures, whoever draws them.
        seed_column: A column of integers that take the place of `seed`, for several pictures of a prompt.
        drawing: Arguments of the pipeline's call, such as `num_inference_steps`.
        options: `device`, `dtype` and `num_threads`.
    """

    def __init__(
        self,
        checkpoint: str,
        prompt_column: str = "prompt",
        output_column: str = "picture",
        seed: int = 0,
        seed_column: str | None = None,
        drawing: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        from .pipelines import LavitTextToImagePipeline

        super().__init__(checkpoint, output_column, **options)
        self.prompt_column, self.seed, self.seed_column = prompt_column, seed, seed_column
        self.drawing = dict(drawing or {})
        adapter = find_adapter(checkpoint)
        self.pipeline = LavitTextToImagePipeline.from_pretrained(
            checkpoint if adapter is None else adapter.base,
            dtype=self.model.dtype,  # the pixel decoder's own would be float32
            model=self.model,
            processor=self.processor,
        ).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)

    def read(self, row: Mapping[str, Any]) -> tuple[str, int]:
        """The prompt and its seed."""
        prompt = _take(row, self.prompt_column)
        if not isinstance(prompt, str):
            raise ValueError(f"the prompt is of type {type(prompt).__name__}")
        check_text(prompt)
        if self.processor.image_token in prompt:
            raise ValueError(f"the prompt has an {self.processor.image_token} placeholder: no image stands for it")
        seed = self.seed if self.seed_column is None else _read_seed(_take(row, self.seed_column))
        return prompt, sample_seed(seed, 0, 0, prompt)

    def work(self, inputs: list[Any]) -> list[bytes]:
        """Pictures."""
        prompts, seeds = zip(*inputs, strict=True)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = self.pipeline(list(prompts), generator=generators, **self.drawing).images
        return [_png(image) for image in images]


def _read_seed(value: Any) -> int:
    """A seed from a column, where `None`, NaN and infinity are three different errors.

    Raises:
        ValueError: If it is no integer.
    """
    try:
        seed = int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the seed is no integer: {value!r}") from error
    if isinstance(value, (float, np.floating)) and seed != value:  # columns with gaps have floats for integers
        raise ValueError(f"the seed is no integer: {value!r}")
    return seed


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


__all__ = ["Captioner", "Drawer", "Scorer", "Tokenizer"]
