"""Stage 2 and LoRA: the language model learns to read and write images."""
