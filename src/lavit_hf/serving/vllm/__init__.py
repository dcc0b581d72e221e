"""LaVIT in vLLM: a plug-in that it finds by its entry point, of the group `vllm.general_plugins`.

vLLM's front end has to know how many tokens a picture becomes (`processor.py`), before a worker runs the visual
tokenizer and the language model (`model.py`). So a picture becomes a fixed number of tokens. Where the picture is to
decide, the front end runs the visual tokenizer. `requests.py` reads what requests ask for.
"""

from __future__ import annotations

_MODEL = "lavit_hf.serving.vllm.model:LavitForVllm"


def register() -> None:
    """Makes vLLM know LaVIT's configuration, tokenizer, processor and model; harmless if called again."""
    from vllm import ModelRegistry

    import lavit_hf  # for the Auto classes, in every process of vLLM

    name = lavit_hf.LavitForConditionalGeneration.__name__
    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, _MODEL)  # by its name: nothing of it is imported in the front end


__all__ = ["register"]
