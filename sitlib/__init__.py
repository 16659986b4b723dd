"""Spectral Image Tokenizer: wavelet pyramids as tokens, a vector-quantised tokenizer over them,
and autoregressive generation.
"""

__version__ = "0.1.0"
