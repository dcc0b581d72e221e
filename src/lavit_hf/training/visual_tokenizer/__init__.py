"""Stage 1: the visual tokenizer learns to reconstruct what a vision encoder sees."""
