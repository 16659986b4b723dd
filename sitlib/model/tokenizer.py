"""The Spectral Image Tokenizer: image -> coefficients -> tokens -> codes -> coefficients -> image (SIT, arXiv 2412.09607).

An image is taken apart by a DWT into scales, every scale is cut into the same number of tokens, a transformer encodes them, each token is
replaced by a code of its codebook (approximation or details), a second transformer decodes, and the inverse DWT returns pixels.
ViT-VQGAN (arXiv 2110.04627) is the case of zero levels: no DWT, one scale, pixel patches.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitlib.files import load_model, save_model
from sitlib.model.config import TokenizerConfig
from sitlib.model.patchify import band_statistics
from sitlib.model.precision import mixed, precisely
from sitlib.model.quantizer import Codebook, Quantized
from sitlib.model.scales import ScaleTransformer
from sitlib.model.tiling import tile_codes, tile_images, untile_codes, untile_images
from sitlib.model.transforms import Decomposition, decomposition
from sitlib.strict import to_dict

MEASURED_VALUES = 2**25  # of images that pass the encoder at a time before training: 170 of 256 px


@dataclass
class TokenizerOutput:
    """Everything a training step needs of one pass."""

    reconstruction: Tensor  # [B, 3, H, W], about [0, 1], not clamped
    codes: Tensor  # [B, S, N] int64
    commitment_loss: (
        Tensor  # scalar: mean squared distance of encoder outputs to their (fixed) codes
    )
    codebook_loss: Tensor  # scalar: the same distance with the roles exchanged
    latents: (
        Tensor  # [B, S, N, D] encoder outputs before the lookup, detached: dead codes restart there
    )
    preview: (
        tuple[Tensor, Tensor] | None
    )  # what the first scales alone give, [B, 3, h, h], and what the image's own would give


class SpectralTokenizer(nn.Module):
    """The tokenizer of one `TokenizerConfig`.

    Attributes:
        config: its configuration.
        geometry: how images are taken apart into scales and patches.
        codebooks: one `Codebook` that all scales share; two, for the first scale and all others; or one for every scale.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.geometry = geometry = _geometry(config, config.size, config.levels)
        num_codebooks = min(config.num_codebooks, geometry.num_scales)
        values = [geometry.patch_dim(scale) for scale in geometry.scales]

        width = config.encoder_width
        self.embed = nn.ModuleList(nn.Linear(v, width) for v in values)
        self.encoder = _transformer(config, "encoder")
        self.pre_quant = nn.ModuleList(_head(width, config.code_dim) for _ in range(num_codebooks))
        learning = (config.code_learning, config.code_decay, config.code_gradient)
        self.codebooks = nn.ModuleList(
            Codebook(config.num_codes, config.code_dim, *learning) for _ in range(num_codebooks)
        )
        self.post_quant = nn.ModuleList(
            nn.Linear(config.code_dim, config.decoder_width) for _ in range(num_codebooks)
        )
        self.decoder = _transformer(config, "decoder")
        self.unembed = nn.ModuleList(_head(config.decoder_width, v) for v in values)

        # Normalized values and unit vectors both become features of deviation 1.
        for linear in self.embed:
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for linear in self.post_quant:
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight)

        for (
            scale
        ) in geometry.scales:  # mean and deviation of every band, measured on the training set
            shape = (geometry.scale_channels(scale), 1, 1)
            self.register_buffer(f"mean_{scale}", torch.zeros(shape))
            self.register_buffer(f"deviation_{scale}", torch.ones(shape))
        self.encoder_is_frozen = False  # see `freeze_encoder_from`

    @property
    def device(self) -> torch.device:
        return self.encoder.position.device

    # -- sizes ---------------------------------------------------------------------------------------------------------------------

    @property
    def sizes(self) -> list[int]:
        """Sides in px of the square images that `encode` takes, ascending; the last is the size it was trained at.

        A scale-causal encoder takes smaller images too: they have fewer scales, of the same number of tokens.
        """
        one_size = self.config.encoder_attention == "full" or self.config.transform == "raster"
        smallest = self.config.levels if one_size else 0
        return [self._unit(levels + 1) for levels in range(smallest, self.config.levels + 1)]

    def num_scales(self, height: int, width: int) -> int:
        """How many scales an image of `height` x `width` px is encoded to: as many as its sides permit.

        Raises:
            ValueError: sides that are no multiples of any of `sizes`.
        """
        for scales in range(
            self.geometry.num_scales, self.geometry.num_scales - len(self.sizes), -1
        ):
            if (
                height > 0
                and width > 0
                and height % self._unit(scales) == width % self._unit(scales) == 0
            ):
                return scales
        accepted = " or ".join(map(str, self.sizes))
        raise ValueError(
            f"this tokenizer takes images whose sides are multiples of {accepted} px; an image of {height} x {width} px has to be "
            f"resized, or padded with sitlib.model.tiling.pad(images, {self.sizes[-1]})."
        )

    def _unit(self, num_scales: int) -> int:
        """Side in px of the square that the grid of tokens of the first `num_scales` scales covers."""
        return self.config.size >> (self.geometry.num_scales - num_scales)

    # -- coefficients and tokens ---------------------------------------------------------------------------------------------------

    def normalized_patches(self, images: Tensor) -> list[Tensor]:
        """Square images [B, 3, H, H] in [0, 1], H of `sizes` -> normalized token values, [B, N, V_s] for every scale they have.

        Raises:
            ValueError: images of another shape.
        """
        _check_images(images)
        if images.shape[2] != images.shape[3] or images.shape[2] not in self.sizes:
            accepted = " or ".join(map(str, self.sizes))
            raise ValueError(
                f"token values are of squares of {accepted} px, not of {tuple(images.shape[2:])}."
            )
        levels = self.num_scales(*images.shape[2:]) - 1
        geometry = _geometry(self.config, images.shape[2], levels)
        return geometry.patchify(
            [
                (x - self._mean(s)) / self._deviation(s)
                for s, x in enumerate(geometry.split(images), 1)
            ]
        )

    def images(self, values: list[Tensor]) -> Tensor:
        """Inverse of `normalized_patches`; the first k scales give an image of 1 / 2^(S - k) of the full size."""
        coefficients = self.geometry.unpatchify(values)
        return self.geometry.merge(
            [x * self._deviation(s) + self._mean(s) for s, x in enumerate(coefficients, 1)]
        )

    @torch.no_grad()
    def fit_normalization(self, images: Tensor) -> None:
        """Sets mean and deviation of every band from training images [B, 3, H, W] in [0, 1]."""
        means, deviations = band_statistics(self.geometry.split(images))
        for scale, (mean, deviation) in enumerate(zip(means, deviations, strict=True), 1):
            self._mean(scale).copy_(mean)
            self._deviation(scale).copy_(deviation)

    # -- codes ---------------------------------------------------------------------------------------------------------------------

    def latents(self, images: Tensor) -> Tensor:
        """Encoder outputs [B, k, N, D] in the lookup space, before normalization and quantization, of square images with k scales."""
        values = self.normalized_patches(images)
        x_BTC = torch.cat(
            [precisely(embed, v) for embed, v in zip(self.embed, values, strict=False)], dim=1
        )
        x_BTC = self.encoder(x_BTC)
        return self._per_codebook(self.pre_quant, x_BTC.unflatten(1, (len(values), -1)))

    def quantize(self, latents: Tensor) -> Quantized:
        """Looks [B, S, N, D] up in the codebook of each scale, in float32 whatever the precision around it: near codes differ by little."""
        with torch.autocast(latents.device.type, enabled=False):
            pairs = zip(self.codebooks, self.by_codebook(latents.float()), strict=True)
            parts = [codebook(z) for codebook, z in pairs]
        names = Quantized.__dataclass_fields__
        return Quantized(
            *(torch.cat([getattr(part, name) for part in parts], dim=1) for name in names)
        )

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Unit vectors [B, k, N, D] of codes [B, k, N]."""
        pairs = zip(self.codebooks, self.by_codebook(codes), strict=True)
        return torch.cat([cast(Codebook, book).lookup(part) for book, part in pairs], dim=1)

    def decode_latents(self, vectors: Tensor) -> list[Tensor]:
        """Code vectors [B, k, N, D] of the first k scales of squares -> their token values, which `images` turns into pixels."""
        x_BTC = self.decoder(self._per_codebook(self.post_quant, vectors).flatten(1, 2))
        x_SBNC = x_BTC.unflatten(1, vectors.shape[1:3]).unbind(1)
        return [precisely(head, x_BNC) for head, x_BNC in zip(self.unembed, x_SBNC, strict=False)]

    def forward(
        self, images: Tensor, quant_ratio: float = 1.0, preview_scales: int = 0
    ) -> TokenizerOutput:
        """One differentiable pass over square images [B, 3, H, H] in [0, 1].

        Args:
            quant_ratio: 1.0 decodes codes, 0.0 the encoder's outputs (on the sphere, as codes are), between them a mixture: early in
                training, while codes say little, the decoder learns more from a part of what they leave out.
            preview_scales: also return the image of this many scales, for which the decoder has to be scale-causal: then no scale is decoded
                again for it; 0: do not.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_is_frozen):
            latents = self.latents(images)
            quantized = self.quantize(latents)
            vectors = quantized.vectors
            if quant_ratio < 1.0:
                vectors = F.normalize(latents.float(), dim=-1).lerp(vectors, quant_ratio)
        values = self.decode_latents(vectors)
        pair = None
        if preview_scales:
            pair = (
                self.images(values[:preview_scales]),
                self.images(self.normalized_patches(images)[:preview_scales]),
            )
        return TokenizerOutput(
            reconstruction=self.images(values),
            codes=quantized.codes,
            commitment_loss=quantized.commitment_loss.mean(),
            codebook_loss=quantized.codebook_loss.mean(),
            latents=latents.detach().float(),
            preview=pair,
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> codes [B, k, N] int64, coarsest scale first, row-major inside a scale.

        Sides are multiples of one of `sizes`; an image larger than the largest is encoded in squares of that size, independently, and
        has N = (H / side) (W / side) grid^2 codes in each scale, row-major over the whole image. k is `num_scales(H, W)`.

        With Haar and a scale-causal encoder the codes of an image of one square are, at half its size (averaged), its first k - 1 scales.

        Raises:
            ValueError: images of another shape, values far outside [0, 1] or not finite, or a size that is not accepted; the message says
                which are.
        """
        _check_images(images)
        images = images.to(self.encoder.position)  # its device and type
        low, high = images.aminmax() if images.numel() else (0.0, 1.0)
        if not -0.5 <= float(low) <= float(high) <= 1.5:  # also where one of them is not a number
            raise ValueError(
                f"images must lie in [0, 1], these span {float(low):.3g} ... {float(high):.3g}."
            )
        side = self._unit(self.num_scales(*images.shape[2:]))
        squares, (rows, columns) = tile_images(images, side)
        with mixed(images.device):
            codes = self.quantize(self.latents(squares)).codes
        return untile_codes(codes, rows, columns, self.config.grid)

    @torch.no_grad()
    def decode(
        self, codes: Tensor, scales: int | None = None, token_grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Codes [B, k, N] of the first k scales -> images [B, 3, H, W] in [0, 1].

        Args:
            codes: as `encode` returns them.
            scales: how many of their scales to use, all by default: the image then has 1 / 2^(S - scales) of the full size. Fewer than
                the model's S need a scale-causal decoder, in which a scale knows nothing of finer ones.
            token_grid: rows and columns of tokens, for codes of images of more than one square.

        Raises:
            ValueError: a shape, a number of scales or a code that this tokenizer cannot have produced.
        """
        codes, (rows, columns) = tile_codes(
            self._checked(codes, scales), self.config.grid, token_grid
        )
        with mixed(codes.device):
            squares = self.images(self.decode_latents(self.embed_codes(codes)))
        return untile_images(squares, rows, columns).clamp(0, 1)

    def reconstruct(self, images: Tensor, scales: int | None = None) -> Tensor:
        """What is left of images [B, 3, H, W] after encoding and decoding, from the first `scales` scales only if these are given."""
        codes = self.encode(images)
        patch = (
            self._unit(codes.shape[1]) // self.config.grid
        )  # px of the image that a token stands for, along a side
        return self.decode(codes, scales, (images.shape[2] // patch, images.shape[3] // patch))

    @torch.no_grad()
    def initialize_codebooks(self, images: Tensor) -> None:
        """Spreads the latents of training images [B, 3, H, W] over the sphere, then starts every codebook at their k-means centres.

        At the start the latents of photographs vary in hardly more than one direction (brightness), and a codebook that begins there
        learns the others slowly. So the last layer before the lookup is first changed to whiten the latents: mean 0, covariance I.
        """
        at_a_time = max(1, MEASURED_VALUES // images[0].numel())

        def latents() -> tuple[Tensor, ...]:
            return self.by_codebook(
                torch.cat([self.latents(part) for part in images.split(at_a_time)])
            )

        for head, z in zip(self.pre_quant, latents(), strict=True):
            _whiten(cast(nn.Linear, cast(nn.Sequential, head)[-1]), z.flatten(0, 2))
        for codebook, z in zip(self.codebooks, latents(), strict=True):
            cast(Codebook, codebook).initialize(z.flatten(0, 2))

    def update_codebooks(self, output: TokenizerOutput, restart_after: int) -> list[Tensor]:
        """What codebooks do after a training step besides following the gradient.

        Codes that learn by moving averages follow the latents that chose them; codes unused for `restart_after` steps move onto latents
        of this batch (0: never).

        Returns:
            Which codes were moved, bool [num_codes] for each codebook.
        """
        moved = []
        parts = zip(
            self.codebooks,
            self.by_codebook(output.latents),
            self.by_codebook(output.codes),
            strict=True,
        )
        for codebook, z, codes in parts:
            assert isinstance(codebook, Codebook)
            codebook.ema_update(z, codes)
            moved.append(codebook.reset_dead_codes(z, codes, restart_after))
        return moved

    def freeze_encoder_from(self, other: "SpectralTokenizer") -> None:
        """Takes over normalization, encoder and codebooks of another tokenizer and freezes them: only the decoder is left to learn.

        Raises:
            ValueError: the other tokenizer has another geometry, encoder or codebooks.
        """
        ours, theirs = to_dict(self.config), to_dict(other.config)
        different = [
            key for key in ours if ours[key] != theirs[key] and not key.startswith("decoder_")
        ]
        if different:
            raise ValueError(
                f"these codes cannot be taken over: {', '.join(different)} of the two tokenizers differ; only decoder_* may."
            )
        state = {name: value for name, value in other.state_dict().items() if not _of_decoder(name)}
        self.load_state_dict(state, strict=False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(_of_decoder(name))
        self.encoder_is_frozen = True

    # -- files ---------------------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, **about: str) -> None:
        """Writes weights and configuration to one safetensors file."""
        save_model(path, self, **about)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "SpectralTokenizer":
        """The tokenizer in a file that `save` wrote, in evaluation mode."""
        return load_model(path, cls)

    # -- scales and their codebooks ------------------------------------------------------------------------------------------------

    def _checked(self, codes: Tensor, scales: int | None) -> Tensor:
        """The first `scales` scales of codes [B, k, N], or all of them; refuses what `decode` cannot take."""
        num_scales, tokens = self.geometry.num_scales, self.geometry.tokens_per_scale
        if codes.ndim != 3 or codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(
                f"codes must be integers [B, k, N], they are {codes.dtype} {list(codes.shape)}."
            )
        available = codes.shape[1]
        if codes.shape[2] % tokens or not 1 <= available <= num_scales:
            raise ValueError(
                f"codes must be [B, k, N] with k in 1 ... {num_scales} and N a multiple of {tokens}, they are {list(codes.shape)}."
            )
        scales = available if scales is None else scales
        if not isinstance(scales, int) or isinstance(scales, bool) or not 1 <= scales <= available:
            raise ValueError(
                f"scales must be a whole number in 1 ... {available}, the scales of these codes, it is {scales}."
            )
        if scales < num_scales and self.config.decoder_attention == "full":
            raise ValueError(
                f"{scales} of {num_scales} scales cannot be decoded alone: this decoder attends to all of them. Give all scales, or train "
                "with decoder_attention: scale_causal."
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.num_codes:
            raise ValueError(
                f"codes must lie in 0 ... {self.config.num_codes - 1}, they span {codes.min()} ... {codes.max()}."
            )
        return codes[:, :scales].to(self.encoder.position.device, torch.int64)

    def by_codebook(self, x_BS: Tensor) -> tuple[Tensor, ...]:
        """[B, k, ...] -> the scales of each codebook: all of them for one codebook; the first, then the others; or each by itself."""
        count = len(self.codebooks)
        edges = [*range(count), max(count, x_BS.shape[1])]
        return tuple(x_BS[:, start:stop] for start, stop in pairwise(edges))

    def _per_codebook(self, modules: nn.ModuleList, x_BS: Tensor) -> Tensor:
        return torch.cat(
            [
                precisely(module, part)
                for module, part in zip(modules, self.by_codebook(x_BS), strict=True)
            ],
            dim=1,
        )

    def _mean(self, scale: int) -> Tensor:
        return self.get_buffer(f"mean_{scale}")

    def _deviation(self, scale: int) -> Tensor:
        return self.get_buffer(f"deviation_{scale}")


def _geometry(config: TokenizerConfig, size: int, levels: int) -> Decomposition:
    """Scales of images of `size` px with `levels` of the levels of the configuration."""
    return decomposition(
        config.transform,
        size,
        levels,
        config.grid,
        config.wavelet,
        config.patch_local and levels > 0,
    )


def _transformer(config: TokenizerConfig, part: str) -> ScaleTransformer:
    names = ("attention", "layers", "width", "heads")
    attention, layers, width, heads = (getattr(config, f"{part}_{name}") for name in names)
    num_types = 2 if config.typed_parameters and config.levels > 0 else 1
    sides: dict[str, Literal["before", "after"]] = {"encoder": "before", "decoder": "after"}
    neighbours = sides[part] if config.neighbour_mixing else None
    return ScaleTransformer(
        config.num_scales,
        config.grid,
        attention,
        layers,
        width,
        heads,
        config.mlp_ratio,
        num_types,
        config.scale_mixing,
        neighbours,
    )


def _head(width: int, out: int) -> nn.Sequential:
    """ViT-VQGAN's head after a transformer: two layers with tanh between (arXiv 2110.04627, section 3.1)."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))


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


def _of_decoder(name: str) -> bool:
    """Whether a parameter or buffer belongs to the decoder rather than to what determines codes."""
    return name.split(".")[0] in ("post_quant", "decoder", "unembed")


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point [B, 3, H, W] in [0, 1], they are {images.dtype} {list(images.shape)}."
        )
