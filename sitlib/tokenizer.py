"""The Spectral Image Tokenizer: image -> coefficients -> tokens -> codes -> coefficients -> image (SIT, arXiv 2412.09607).

An image is taken apart by a DWT into scales, every scale is cut into the same number of tokens, a transformer encodes them, each token is
replaced by a code of its codebook (approximation or details), a second transformer decodes, and the inverse DWT returns pixels.
ViT-VQGAN (arXiv 2110.04627) is the case of zero levels: no DWT, one scale, pixel patches.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sitlib.checkpoint import load_model, save_model
from sitlib.config import TokenizerConfig
from sitlib.geometry import SpectralGeometry, band_statistics
from sitlib.quantizer import Codebook, Quantized
from sitlib.transformer import ScaleMixing, SequenceLayout, Transformer
from sitlib.wavelets import dwt2, idwt2


@dataclass
class TokenizerOutput:
    """Everything a training step needs of one pass."""

    reconstruction: Tensor  # [B, 3, H, W], about [0, 1], not clamped
    codes: Tensor  # [B, S, N] int64
    commitment_loss: Tensor  # scalar: mean squared distance of encoder outputs to their (fixed) codes
    codebook_loss: Tensor  # scalar: the same distance with the roles exchanged
    latents: Tensor  # [B, S, N, D] encoder outputs before the lookup, detached: dead codes restart there


class SpectralTokenizer(nn.Module):
    """The tokenizer of one `TokenizerConfig`.

    Attributes:
        config: its configuration.
        geometry: scales and patches.
        codebooks: one or two `Codebook`s; scale 1 uses the first, all others the last.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.geometry = geometry = SpectralGeometry(config.size, config.levels, config.grid)
        num_types = 2 if config.typed_parameters and config.levels > 0 else 1
        num_scales, num_tokens = geometry.num_scales, geometry.tokens_per_scale
        values = [geometry.values_per_token(scale) for scale in geometry.scales]

        width = config.encoder_width
        self.encoder_layout = SequenceLayout(num_scales, num_tokens, config.encoder_attention)
        self.embed = nn.ModuleList(nn.Linear(v, width) for v in values)
        self.encoder_position = nn.Parameter(_initial_positions(num_scales, config.grid, width))
        self.encoder_mixing = _mixing(config, width, config.encoder_attention)
        self.encoder = Transformer(
            config.encoder_layers, width, config.encoder_heads, config.mlp_ratio, num_types
        )
        num_codebooks = min(config.num_codebooks, num_scales)
        self.to_code = nn.ModuleList(_head(width, width, config.code_dim) for _ in range(num_codebooks))
        self.codebooks = nn.ModuleList(
            Codebook(config.num_codes, config.code_dim) for _ in range(num_codebooks)
        )

        width = config.decoder_width
        self.decoder_layout = SequenceLayout(num_scales, num_tokens, config.decoder_attention)
        self.from_code = nn.ModuleList(nn.Linear(config.code_dim, width) for _ in range(num_codebooks))
        self.decoder_position = nn.Parameter(_initial_positions(num_scales, config.grid, width))
        self.decoder_mixing = _mixing(config, width, config.decoder_attention)
        self.decoder = Transformer(
            config.decoder_layers, width, config.decoder_heads, config.mlp_ratio, num_types
        )
        self.to_values = nn.ModuleList(_head(width, width, v) for v in values)

        for linear in (
            *self.embed,
            *self.from_code,
        ):  # normalised values and unit vectors both become features of deviation 1
            nn.init.normal_(linear.weight, std=1.0 if linear in self.from_code else linear.in_features**-0.5)

        for scale in geometry.scales:  # mean and deviation of every band, measured on the training set
            shape = (geometry.scale_channels(scale), 1, 1)
            self.register_buffer(f"mean_{scale}", torch.zeros(shape))
            self.register_buffer(f"deviation_{scale}", torch.ones(shape))

    # -- coefficients and tokens ---------------------------------------------------------------------------------------------------

    def token_values(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] in [0, 1] -> normalised token values, [B, N, V_s] for every scale.

        Raises:
            ValueError: images of another shape than the tokenizer's.
        """
        size = self.config.size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"this tokenizer takes images [B, 3, {size}, {size}], it was given {list(images.shape)}."
            )
        coefficients = dwt2(images, self.config.wavelet, self.config.levels)
        return self.geometry.tokens(
            [(x - self._mean(s)) / self._deviation(s) for s, x in enumerate(coefficients, 1)]
        )

    def images(self, values: list[Tensor]) -> Tensor:
        """Inverse of `token_values`."""
        coefficients = self.geometry.coefficients(values)
        return idwt2(
            [x * self._deviation(s) + self._mean(s) for s, x in enumerate(coefficients, 1)],
            self.config.wavelet,
        )

    @torch.no_grad()
    def measure_normalisation(self, images: Tensor) -> None:
        """Sets mean and deviation of every band from training images [B, 3, H, W] in [0, 1]."""
        means, deviations = band_statistics(dwt2(images, self.config.wavelet, self.config.levels))
        for scale, (mean, deviation) in enumerate(zip(means, deviations, strict=True), 1):
            self._mean(scale).copy_(mean)
            self._deviation(scale).copy_(deviation)

    # -- codes ---------------------------------------------------------------------------------------------------------------------

    def latents(self, images: Tensor) -> Tensor:
        """Encoder outputs [B, S, N, D] in the lookup space, before normalisation and quantization."""
        values = self.token_values(images)
        x_BTC = torch.cat([embed(v) for embed, v in zip(self.embed, values, strict=True)], dim=1)
        x_BTC = self.encoder(self.encoder_mixing(x_BTC) + self.encoder_position, self.encoder_layout)
        x_BSNC = x_BTC.unflatten(1, (self.geometry.num_scales, self.geometry.tokens_per_scale))
        return self._per_codebook(self.to_code, x_BSNC)

    def quantize(self, latents: Tensor) -> Quantized:
        """Looks [B, S, N, D] up in the codebook of each scale, in float32 whatever the precision around it: near codes differ by little."""
        with torch.autocast(latents.device.type, enabled=False):
            pairs = zip(self.codebooks, self._split(latents.float()), strict=True)
            parts = [codebook(z) for codebook, z in pairs]
        names = Quantized.__dataclass_fields__
        return Quantized(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in names))

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, S, N, D] -> images [B, 3, H, W], not clamped."""
        x_BTC = self.decoder_mixing(self._per_codebook(self.from_code, vectors).flatten(1, 2))
        x_BTC = self.decoder(x_BTC + self.decoder_position, self.decoder_layout)
        x_BSNC = x_BTC.unflatten(1, vectors.shape[1:3])
        return self.images([head(x_BSNC[:, s]) for s, head in enumerate(self.to_values)])

    def forward(self, images: Tensor) -> TokenizerOutput:
        """One differentiable pass over images [B, 3, H, W] in [0, 1]."""
        latents = self.latents(images)
        quantized = self.quantize(latents)
        return TokenizerOutput(
            reconstruction=self.decode_vectors(quantized.vectors),
            codes=quantized.codes,
            commitment_loss=quantized.commitment_loss.mean(),
            codebook_loss=quantized.codebook_loss.mean(),
            latents=latents.detach().float(),
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> codes [B, S, N] int64, coarsest scale first, row-major inside a scale."""
        return self.quantize(self.latents(images)).codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, S, N] -> images [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: a shape or a code that this tokenizer cannot have produced.
        """
        shape = (self.geometry.num_scales, self.geometry.tokens_per_scale)
        if codes.ndim != 3 or codes.shape[1:] != shape:
            raise ValueError(f"codes must be [B, {shape[0]}, {shape[1]}], they are {list(codes.shape)}.")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.num_codes:
            raise ValueError(
                f"codes must lie in 0 ... {self.config.num_codes - 1}, they span {codes.min()} ... {codes.max()}."
            )
        vectors = [book.lookup(part) for book, part in zip(self.codebooks, self._split(codes), strict=True)]
        return self.decode_vectors(torch.cat(vectors, dim=1)).clamp(0, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """What is left of images [B, 3, H, W] after encoding and decoding."""
        return self.decode(self.encode(images))

    @torch.no_grad()
    def initialise_codebooks(self, images: Tensor) -> None:
        """Spreads the latents of training images [B, 3, H, W] over the sphere, then starts every codebook at their k-means centres.

        At the start the latents of photographs vary in hardly more than one direction (brightness), and a codebook that begins there
        learns the others slowly. So the last layer before the lookup is first changed to whiten the latents: mean 0, covariance I.
        """
        for head, z in zip(self.to_code, self._split(self.latents(images)), strict=True):
            _whiten(head[-1], z.flatten(0, 2))
        for codebook, z in zip(self.codebooks, self._split(self.latents(images)), strict=True):
            codebook.initialise(z.flatten(0, 2))

    def restart_dead_codes(self, output: TokenizerOutput, after: int) -> list[Tensor]:
        """Moves codes unused for `after` steps onto latents of this batch; their indices, one tensor a codebook."""
        parts = zip(self.codebooks, self._split(output.latents), self._split(output.codes), strict=True)
        return [codebook.restart_dead(z.flatten(0, 2), codes, after) for codebook, z, codes in parts]

    # -- files ---------------------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, **about: str) -> None:
        """Writes weights and configuration to one safetensors file."""
        save_model(path, self, self.config, about)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "SpectralTokenizer":
        """The tokenizer in a file that `save` wrote, in evaluation mode."""
        return load_model(path, cls, TokenizerConfig)

    # -- scales and their codebooks ------------------------------------------------------------------------------------------------

    def _split(self, x_BS: Tensor) -> tuple[Tensor, ...]:
        """[B, S, ...] -> the scales of each codebook: the first, then the others; all of them where there is one codebook."""
        return (x_BS,) if len(self.codebooks) == 1 else (x_BS[:, :1], x_BS[:, 1:])

    def _per_codebook(self, modules: nn.ModuleList, x_BS: Tensor) -> Tensor:
        return torch.cat(
            [module(part) for module, part in zip(modules, self._split(x_BS), strict=True)], dim=1
        )

    def _mean(self, scale: int) -> Tensor:
        return self.get_buffer(f"mean_{scale}")

    def _deviation(self, scale: int) -> Tensor:
        return self.get_buffer(f"deviation_{scale}")


def _head(width: int, hidden: int, out: int) -> nn.Sequential:
    """ViT-VQGAN's head after a transformer: two layers with tanh between (arXiv 2110.04627, section 3.1)."""
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out))


def _mixing(config: TokenizerConfig, width: int, attention: str) -> nn.Module:
    if not config.scale_mixing or config.num_scales == 1:
        return nn.Identity()
    return ScaleMixing(config.num_scales, width, causal=attention == "scale_causal")


def _initial_positions(num_scales: int, grid: int, width: int) -> Tensor:
    """Where the learned absolute positions [S N, C] start: a sine-cosine code of the place, the same for every scale, plus a random
    vector of the scale; so that tokens of one place resemble each other from the first step on."""
    frequency = torch.pi / grid * 2 ** torch.linspace(0, math.log2(grid), -(-width // 4))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (y, x)]
    place_NC = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)[
        :, :width
    ]
    scale_SC = torch.randn(num_scales, width)
    return 0.5 * (scale_SC[:, None] + place_NC).flatten(0, 1)


def _whiten(linear: nn.Linear, outputs: Tensor) -> None:
    """Changes a layer so that these of its outputs [M, D] would have had mean 0 and covariance I (symmetric whitening)."""
    mean = outputs.mean(0)
    variance, axes = torch.linalg.eigh(torch.cov(outputs.T))
    variance = variance.clamp_min(
        1e-4 * variance[-1]
    )  # directions that are as good as empty are not blown up
    whitening = axes @ torch.diag(variance.rsqrt()) @ axes.T
    linear.bias.copy_(whitening @ (linear.bias - mean))
    linear.weight.copy_(whitening @ linear.weight)
