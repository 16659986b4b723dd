"""The model: wavelets, patches, transformer, quantizer, tokenizer, generator."""
