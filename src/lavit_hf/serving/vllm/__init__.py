"""LaVIT in vLLM: a plug-in that it finds by its entry point, of the group `vllm.general_plugins`.

vLLM's front end has to know how many tokens a picture becomes (`processor.py`), before a worker runs the visual
tokenizer and the language model (`model.py`). So a picture becomes a fixed number of tokens. Where the picture is to
decide, the front end runs the visual tokenizer. `requests.py` reads what requests ask for.
"""

from __future__ import annotations

from ...modeling.modeling_lavit import LavitForConditionalGeneration

_MODEL = "lavit_hf.serving.vllm.model:LavitForVllm"


def register() -> None:
    """Makes vLLM know the model; harmless if called again.

    vLLM calls it in every process. It has imported the package then, so that the Auto classes know the rest.
    """
    from vllm import ModelRegistry

    name = LavitForConditionalGeneration.__name__
    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, _MODEL)  # by its name: nothing of it is imported in the front end


__all__ = ["register"]
