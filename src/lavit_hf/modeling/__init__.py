"""The networks: visual tokenizer, language model with images, token decoder. Knows nothing of processing or training."""
