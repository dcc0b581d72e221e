"""Images and text to model inputs: image processors, tokenizer, and the processor that joins them."""
