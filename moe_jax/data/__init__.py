"""Text in, rows of tokens out: builders, tokenizers, packing and the training order."""
