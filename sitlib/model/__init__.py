"""The model: wavelets, patches, transformer, quantizer, tokenizer, generator."""

import sitlib.model.transforms  # noqa: F401, adds what SIT is compared with to TRANSFORMS
