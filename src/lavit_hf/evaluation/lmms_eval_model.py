"""LaVIT as a model of lmms-eval, which has MMBench, SEED-Bench, MME, POPE and many more benchmarks.

lmms-eval finds it by an entry point as soon as both packages are installed: `lmms-eval --model lavit_hf --model_args
pretrained=CHECKPOINT --tasks pope`. Nothing else of this package imports this file, as it imports lmms-eval.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import Instance  # type: ignore[import-not-found]
from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

from ..modeling.modeling_lavit import LavitForConditionalGeneration
from ..pipelines.image_to_text import question_prompt
from ..processing.processing_lavit import ImageTextProcessor
from ..utils.distributed import process_state
from ..utils.progress import progress_bar

MANIFEST = ModelManifest("lavit_hf", simple_class_path=f"{__name__}.LavitForLmmsEval")
"""What the entry point names."""
# Of what tasks set, these go to `generate`; they set nothing else, but for other models.
_OPTIONS = ("max_new_tokens", "num_beams", "length_penalty", "top_p", "top_k")


class LavitForLmmsEval(lmms):
    """Answers the requests of lmms-eval.

    Args:
        pretrained: A checkpoint: a directory, or a name on the Hub.
        device: Where to compute; by default the GPU of this process, or the CPU.
        dtype: Precision, such as `"bfloat16"`; by default that of the checkpoint, on a CPU float32.
        batch_size: Questions at a time.
        num_image_tokens: How many tokens an image becomes; by default the selector decides.
        max_batch_size: Not used.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        num_image_tokens: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        state = process_state(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.device = state.device
        self._rank, self._world_size = state.process_index, state.num_processes
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size has to be a number here, got {batch_size!r}.")
        self._batch_size = int(batch_size)
        dtype = dtype or ("float32" if self.device.type == "cpu" else "auto")
        model = LavitForConditionalGeneration.from_pretrained(pretrained, dtype=dtype)
        self._model: Any = model.to(self.device).eval()
        self._processor = ImageTextProcessor.from_pretrained(pretrained)
        self._num_image_tokens = num_image_tokens

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers questions: one text per request, in their order. Long questions come first, to pad little."""
        groups = defaultdict(list)  # what is generated in another way cannot share a batch
        for index, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(index)
        answers = [""] * len(requests)
        with progress_bar("lavit_hf", len(requests), self.rank == 0, unit="question") as bar:
            for indices in groups.values():
                indices.sort(key=lambda index: len(requests[index].args[0]), reverse=True)
                for start in range(0, len(indices), self._batch_size):
                    batch = indices[start : start + self._batch_size]
                    for index, answer in zip(batch, self._answer([requests[index] for index in batch]), strict=True):
                        answers[index] = answer
                        self.cache_hook.add_partial("generate_until", requests[index].args[:2], answer)
                    bar.update(len(batch))
        return answers

    @torch.inference_mode()
    def _answer(self, requests: Sequence[Instance]) -> list[str]:
        token = self._processor.image_token
        images, texts = [], []
        for question, _, get_images, number, task, split in (request.args for request in requests):
            of_question = get_images(self.task_dict[task][split][number])
            images.extend(of_question)
            # Where tasks write images into the text, they mean the same ones.
            prompt = question_prompt(" ".join(question.replace(token, " ").split()))
            texts.append(token * len(of_question) + prompt)
        inputs = self._processor(
            images=images or None,
            text=texts,
            num_image_tokens=self._num_image_tokens,
            padding=True,
            return_tensors="pt",
        ).to(self.device)
        asked = requests[0].args[1]
        options = {name: asked[name] for name in _OPTIONS if asked.get(name) is not None}
        if temperature := asked.get("temperature"):
            options.update(do_sample=True, temperature=temperature)
        else:  # which top_p and top_k have no say in
            options = {**options, "do_sample": False, "top_p": None, "top_k": None}
        output = self._model.generate(**inputs, **options)
        new = output[:, inputs["input_ids"].shape[1] :]
        until = asked.get("until") or []
        ends = [until] if isinstance(until, str) else until
        return [_before(text, ends).strip() for text in self._processor.batch_decode(new, skip_special_tokens=True)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lavit_hf answers tasks that generate (output_type: generate_until), and no others.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("lavit_hf answers tasks with one round of questions, and no others.")


def _before(text: str, ends: Sequence[str]) -> str:
    """What stands before the first of these."""
    for end in filter(None, ends):
        text = text.partition(end)[0]
    return text


__all__ = ["MANIFEST", "LavitForLmmsEval"]
