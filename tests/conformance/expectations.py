"""Every test of transformers that is skipped or fails here, and why.

A run fails if a test skips itself for a reason that is not in `SKIPPED`, if one fails that is not in
`EXPECTED_FAILURES`, or if one of these passes.
"""

# The reason a test gives for skipping itself, a regular expression, and what it means here. Without the GPU and with
# the same networks, the tests of transformers' own models skip themselves likewise.
SKIPPED = {
    # The machine
    r"requires (an )?accelerator|requires multiple accelerators|requires MPS": "there is no GPU",
    r"requires Flash Attention": "needs a GPU",
    r"requires (deepspeed|the kernels library)": "not installed; both are for GPUs",
    r"requires (librosa|Torchcodec)": "for audio and video, which LaVIT has not",
    r"less than 2 backends|torchvision backend is not available": "torchvision is not installed",
    # What a language model of Llama's kind has not
    r"not support grouped_mm|no sparse experts|no `output_router_logits`": "no mixture of experts",
    r"[Nn]o conversion found": "no checkpoint of an older layout has to be renamed when it is loaded",
    r"not an encoder-decoder|No sequence-to-sequence": "no encoder-decoder",
    r"not support sliding window mask": "`test_modeling_lavit.py` tests it with Mistral and Gemma",
    r"not have partial rope|not have RoPE|not support RoPE|no axial RoPE": "rotary positions are tested with Llama",
    r"not have position embeddings": "`test_composition.py` tests other image sizes",
    r"not support SDPA": "there is one test for models made of others, and one for the rest; the other one runs",
    # What the visual tokenizer and the token decoder have not
    r"No (decoder-only )?language modeling head|not have a TP plan": "no language model",
    r"not have both a non-text modality tower and a language": "no language model",
    r"doesn't use `inputs_embeds`|test_resize_embeddings is set to `False`": "no words, as in vision models",
    r"No model with a differentiable loss": "`LavitVisualTokenizerForPreTraining` has the loss",
    r"not (a )?composite|No subconfigs": "the token decoder is not made of other models",
    r"not support attentions|not (support )?output(_|\s)attentions": "the token decoder returns no weights",
    r"not support setting its attention dynamically": "the token decoder always uses torch's fused attention",
    r"has no _keep_in_fp32_modules": "no layer of the token decoder asks for fp32",
    # What is neither image nor text
    r"(audio_processor|video_processor|feature_extractor) attribute not present": "no video and no audio",
    r"no (video|audio) processor|doesn't accept videos": "no video and no audio",
    r"not support tools": "the original was trained on no calls of tools",
    r"No validation found for `preprocess`": "it is the base class that validates, as in all image processors",
    r"not have dict size or list image_mean": "the base class keeps them in other types, as in all image processors",
}

_OUT_OF_TABLE = (
    "the test embeds or clamps all ids, and a placeholder lies outside the embedding table, as it may in PaliGemma: "
    "the table has exactly the published rows. LavitDiscreteTest passes it"
)
_NO_ENCODER = (
    "the test watches the first layer that can be checkpointed: one of the vision encoder, which this form leaves "
    "out. LavitLightTest passes it"
)
_JANUS = "; Janus' visual tokenizer skips the test, too"

# Class, test, and why the model is right.
EXPECTED_FAILURES = {
    ("LavitLightTest", "test_inputs_embeds"): _OUT_OF_TABLE,
    ("LavitLightTest", "test_inputs_embeds_matches_input_ids"): _OUT_OF_TABLE,
    ("LavitLightTest", "test_resize_tokens_embeddings"): _OUT_OF_TABLE,
    ("LavitLightTest", "test_resize_embeddings_untied"): _OUT_OF_TABLE,
    ("LavitLightTest", "test_retain_grad_hidden_states_attentions"): (
        "rows are packed without dropped patches. The states that are returned were put back where the ids are, and "
        "lie beside the way to the output. LavitAttachedTest, where nothing is packed, passes it"
    ),
    ("LavitAttachedTest", "test_inputs_embeds"): _OUT_OF_TABLE,
    ("LavitAttachedTest", "test_inputs_embeds_matches_input_ids"): _OUT_OF_TABLE,
    ("LavitAttachedTest", "test_resize_tokens_embeddings"): _OUT_OF_TABLE,
    ("LavitAttachedTest", "test_resize_embeddings_untied"): _OUT_OF_TABLE,
    ("LavitAttachedTest", "test_training_gradient_checkpointing"): _NO_ENCODER,
    ("LavitAttachedTest", "test_training_gradient_checkpointing_use_reentrant_false"): _NO_ENCODER,
    ("LavitAttachedTest", "test_training_gradient_checkpointing_use_reentrant_true"): _NO_ENCODER,
    ("LavitDiscreteTest", "test_training_gradient_checkpointing"): _NO_ENCODER,
    ("LavitDiscreteTest", "test_training_gradient_checkpointing_use_reentrant_false"): _NO_ENCODER,
    ("LavitDiscreteTest", "test_training_gradient_checkpointing_use_reentrant_true"): _NO_ENCODER,
    ("LavitVisualTokenizerTest", "test_model_outputs_equivalence"): (
        f"its assertion's message subtracts outputs, which torch refuses for the boolean keep_mask{_JANUS}"
    ),
    ("LavitVisualTokenizerTest", "test_retain_grad_hidden_states_attentions"): (
        f"it goes back from the first output, which here are codes, integers{_JANUS}"
    ),
    ("LavitVisualTokenizerTest", "test_model_weights_reload_no_missing_tied_weights"): (
        "it loads a checkpoint without weights. A visual tokenizer with random weights gives plausible codes that "
        "mean nothing, so that a missing tensor is an error and no warning"
    ),
    ("ImageTextProcessorTest", "test_init_arguments_not_in_processor_kwargs"): (
        "`visual_mode` is a setting of the processor that a call may override, a case that the test itself calls fair"
    ),
    ("LavitImageProcessingTest", "test_pil_can_run_without_torchvision"): (
        "its script does not import this package, so that no Auto class knows the image processor. All tests here run "
        "without torchvision"
    ),
    ("LavitImageProcessingTest", "test_new_models_require_torchvision_backend"): (
        "the backend is there, but torchvision is not installed"
    ),
}
