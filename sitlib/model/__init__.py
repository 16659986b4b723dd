"""The model: wavelets, patches, transformer, quantizer, tokenizer, generator."""

from sitlib.model import separate, transforms  # noqa: F401, they add what SIT is compared with
