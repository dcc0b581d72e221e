"""The networks: visual tokenizer, language model with images, token decoder. Knows no processing."""
