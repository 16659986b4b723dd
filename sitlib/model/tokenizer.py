"""Spectral Image Tokenizer: image -> wavelet scales -> patches -> codes, and back.

SIT, arXiv 2412.09607. With zero levels it is ViT-VQGAN (arXiv 2110.04627): pixel patches.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitlib.model.config import TokenizerConfig
from sitlib.model.pretrained import Pretrained
from sitlib.model.quantizer import QUANTIZERS, Codebook, Quantized
from sitlib.model.transformer import ADTransformer, in_weight_dtype, inference_autocast
from sitlib.model.transforms import TRANSFORMS
from sitlib.model.wavelets import check_images
from sitlib.strict import require

# Codes do not depend on these.
DECODER_MODULES = ("post_quant", "decoder", "unembed", "refine")


@dataclass
class TokenizerOutput:
    """Results of a forward pass that a training step needs."""

    reconstruction: Tensor  # [B, 3, H, H], about [0, 1], not clamped
    codes: Tensor  # [B, S, N] int64
    commitment_loss: Tensor  # scalar: mean squared distance of latents to their (fixed) codes
    codebook_loss: Tensor  # scalar: the same distance with the roles exchanged
    latents: Tensor  # [B, S, N, D], detached: the codebook's upkeep needs them
    preview: tuple[Tensor, Tensor] | None  # image of the first scales [B, 3, h, h], and its target


class BandNorm(nn.Module):
    """Standardization of a scale's coefficients by mean and deviation of each band."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        return (x - self.mean) / self.std

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean

    def fit(self, x: Tensor) -> None:
        self.mean.copy_(x.mean(dim=(0, 2, 3), keepdim=True)[0])
        std = x.std(dim=(0, 2, 3), keepdim=True)[0]
        self.std.copy_(std.clamp_min(torch.finfo(x.dtype).eps))


class Refinement(nn.Module):
    """What two convolutions over blocks of 2 x 2 pixels add to an image; at first nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.read, self.write = (
            nn.Conv2d(12, width, 3, padding=1),
            nn.Conv2d(width, 12, 3, padding=1),
        )
        for parameter in self.write.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, H], about [0, 1]
        hidden = F.gelu(self.read(F.pixel_unshuffle(4 * images - 2, 2)))
        return images + F.pixel_shuffle(self.write(hidden), 2)


class SpectralTokenizer(Pretrained):
    """Encoder, codebooks and decoder of one `TokenizerConfig`.

    Shapes: B images of H x H px; S scales, of which smaller images have only the first k;
    N = grid_size^2 tokens in each; patches of P_s values; latents of D dimensions.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = c = config
        # A scale-causal encoder also takes smaller images, which have fewer scales.
        one_size = c.encoder_attention == "full"
        shape = (c.grid_size, c.wavelet, c.grid_sizes)
        self.geometries = {
            c.size >> n: TRANSFORMS[c.transform](c.size >> n, c.levels - n, *shape)
            for n in range(0 if one_size else c.levels, -1, -1)
        }
        self.geometry = geometry = self.geometries[c.size]
        patch_dims = [geometry.patch_dim(scale) for scale in geometry.scales]
        # One for each scale, or the last for the rest.
        book_sizes = [*dict(zip(c.codebook_of, c.codebook_sizes, strict=True)).values()]
        num_types = 2 if c.typed_parameters and len(patch_dims) > 1 else 1

        def transformer(width, layers, heads, attention) -> ADTransformer:
            shape = (c.num_scales, c.grid_size, width, layers, heads, c.mlp_ratio)
            options = (attention, num_types, c.scale_mixing, c.typed_parameters)
            return ADTransformer(*shape, *options, geometry.grids)

        bands = (BandNorm(geometry.scale_channels(scale)) for scale in geometry.scales)
        self.norm = cast(list[BandNorm], nn.ModuleList(bands))
        self.embed = nn.ModuleList(nn.Linear(P, c.encoder_width) for P in patch_dims)
        self.encoder = transformer(
            c.encoder_width, c.encoder_layers, c.encoder_heads, c.encoder_attention
        )
        self.pre_quant = nn.ModuleList(_head(c.encoder_width, c.code_dim) for _ in book_sizes)
        books = (QUANTIZERS[c.quantizer](num_codes, c.code_dim) for num_codes in book_sizes)
        self.codebooks = cast(list[Codebook], nn.ModuleList(books))
        self.post_quant = nn.ModuleList(nn.Linear(c.code_dim, c.decoder_width) for _ in book_sizes)
        self.decoder = transformer(
            c.decoder_width, c.decoder_layers, c.decoder_heads, c.decoder_attention
        )
        written = geometry.written_dim if c.overlap else geometry.patch_dim
        heads = (_head(c.decoder_width, written(scale)) for scale in geometry.scales)
        self.unembed = nn.ModuleList(heads)
        self.refine = Refinement(c.refine) if c.refine else None

        # How often training views have each code [S, K]: see `count_codes`.
        counts = torch.zeros(c.num_scales, max(c.codebook_sizes), dtype=torch.int32)
        self.register_buffer("code_counts", counts)

        # Standardized patches and unit vectors both become features of deviation 1.
        for linear, P in zip(self.embed, patch_dims, strict=True):
            nn.init.normal_(linear.get_parameter("weight"), std=P**-0.5)
        for linear in self.post_quant:
            nn.init.normal_(linear.get_parameter("weight"))

    # -- image -> latents -> codes -> patches -> image ---------------------------------------------

    def forward(self, images: Tensor, preview_scales: int = 0) -> TokenizerOutput:
        """One differentiable pass over square images [B, 3, H, H] in [0, 1].

        `preview_scales`: also return the image of so many scales, if the decoder is scale-causal.
        """
        latents = self.latents(images)  # [B, S, N, D]
        quantized = self.quantize(latents)
        patches = self.decode_latents(quantized.vectors)  # [B, N, P_s] of each scale
        preview = None
        if preview_scales:
            targets = self.normalized_patches(images)[:preview_scales]
            preview = self.to_images(patches[:preview_scales]), self.to_images(targets)
        return TokenizerOutput(
            reconstruction=self.shown(patches),
            codes=quantized.codes,
            commitment_loss=quantized.commitment_loss.mean(),
            codebook_loss=quantized.codebook_loss.mean(),
            latents=latents.detach().float(),
            preview=preview,
        )

    def normalized_patches(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, H] in [0, 1] -> standardized patches [B, N, P_s] of each scale."""
        H, W = images.shape[2:]
        sizes = f"square images of {' or '.join(map(str, self.sizes))} px, not {H} x {W}"
        remedy = "resize them, or use sitlib.model.tiling for images of any size."
        require(H == W and H in self.geometries, f"this tokenizer takes {sizes}: {remedy}")
        coefficients = self.geometries[H].forward(images)  # dwt2: [B, C_s, h_s, w_s]
        standardized = [norm(x) for norm, x in zip(self.norm, coefficients, strict=False)]
        return self.geometries[H].patchify(standardized)

    def latents(self, images: Tensor) -> Tensor:
        """Square images -> encoder outputs [B, k, N, D], before l2 normalization and lookup."""
        patches = self.normalized_patches(images)  # [B, N, P_s] of each scale
        tokens = [in_weight_dtype(embed, x) for embed, x in zip(self.embed, patches, strict=False)]
        x = self.encoder(torch.cat(tokens, dim=1))  # [B, k N, C]
        heads = [partial(in_weight_dtype, head) for head in self.pre_quant]
        return self._per_codebook(heads, x.unflatten(1, (-1, self.config.tokens_per_scale)))

    def quantize(self, latents: Tensor) -> Quantized:
        """Look latents [B, k, N, D] up in the codebook of each scale, in float32 at least."""
        z = latents.to(torch.promote_types(latents.dtype, torch.float32))
        books = zip(self.codebooks, self.by_codebook(z), strict=True)
        with torch.autocast(latents.device.type, enabled=False):
            results = [vars(codebook(z)) for codebook, z in books]
        return Quantized(**{name: torch.cat([r[name] for r in results], 1) for name in results[0]})

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes [B, k, N] -> unit vectors [B, k, N, D]."""
        return self._per_codebook([codebook.lookup for codebook in self.codebooks], codes)

    def decode_latents(self, vectors: Tensor) -> list[Tensor]:
        """Quantized latents [B, k, N, D] -> standardized patches [B, N, P_s] of each scale."""
        layers = [partial(in_weight_dtype, linear) for linear in self.post_quant]
        x = self._per_codebook(layers, vectors)  # [B, k, N, C]
        x = self.decoder(x.flatten(1, 2))  # [B, k N, C]
        borders = [end for end in self.geometry.ends if end < x.shape[1]]
        heads = zip(self.unembed, x.tensor_split(borders, dim=1), strict=False)
        patches = [in_weight_dtype(head, x_BNC) for head, x_BNC in heads]
        return self.geometry.add_overlaps(patches) if self.config.overlap else patches

    def to_images(self, patches: list[Tensor]) -> Tensor:
        """Inverse of `normalized_patches`; k scales give 1 / 2^(S - k) of the full size."""
        maps = self.geometry.unpatchify(patches)
        coefficients = [norm.inverse(x) for norm, x in zip(self.norm, maps, strict=False)]
        return self.geometry.inverse(coefficients)  # idwt2

    def shown(self, patches: list[Tensor]) -> Tensor:
        """`to_images` of a decoder's patches, refined where these are of all scales."""
        images = self.to_images(patches)
        if self.refine is None or images.shape[-1] < self.config.size:
            return images
        return in_weight_dtype(self.refine, images)

    def by_codebook(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, k, ...] -> slices of the scales of each codebook: all; 1 and k - 1; or 1 each."""
        first = map(self.config.codebook_of.index, range(1, len(self.codebooks)))
        return x.tensor_split([*first], dim=1)

    def _per_codebook(self, functions: Iterable[Callable], x: Tensor) -> Tensor:
        """Apply each codebook's function to its scales of [B, k, N, ...]."""
        pairs = zip(functions, self.by_codebook(x), strict=True)
        return torch.cat([function(part) for function, part in pairs], dim=1)

    # -- a trained tokenizer -----------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Square images [B, 3, H, H] in [0, 1] -> codes [B, k, N] int64, coarsest scale first.

        H is one of `sizes`. With Haar and a scale-causal encoder, codes of an image at half its
        size are the first scales of its codes.
        """
        check_images(images, channels=3)
        images = images.to(self.encoder.pos_emb)  # its device and dtype
        low, high = images.aminmax() if images.numel() else (0.0, 1.0)
        if not -0.5 <= float(low) <= float(high) <= 1.5:  # also if one of them is NaN
            raise ValueError(f"pixels must lie in [0, 1], these span {low:.3g} ... {high:.3g}.")
        with inference_autocast(self.device):
            return self.quantize(self.latents(images)).codes

    @torch.no_grad()
    def decode(self, codes: Tensor, scales: int | None = None) -> Tensor:
        """Codes [B, k, N] of the first k scales -> images [B, 3, H, H] in [0, 1].

        With `scales`, of so many of the k scales: the image has 1 / 2^(S - scales) of the full
        size. Fewer than S need a scale-causal decoder.
        """
        S, N = self.geometry.num_scales, self.geometry.tokens_per_scale
        k = codes.shape[1] if codes.ndim == 3 and codes.shape[2] == N else 0
        if not 1 <= k <= S or not are_integers(codes):
            given = f"{codes.dtype} {list(codes.shape)}"
            raise ValueError(f"codes must be integers [B, 1 ... {S}, {N}], not {given}.")
        scales = k if scales is None else scales
        if scales not in range(1, k + 1):
            raise ValueError(f"scales must be in 1 ... {k}, the scales of these codes: {scales}.")
        alone = f"{scales} of {S} scales cannot be decoded alone, as this decoder attends to all"
        remedy = "give all scales, or train with decoder_attention: scale_causal."
        is_full = self.config.decoder_attention == "full"
        require(scales == S or not is_full, f"{alone}: {remedy}")
        codes = codes.long()  # uint16, as shards hold them, cannot be compared
        check_codes(codes, self.config.codebook_sizes)
        with inference_autocast(self.device):
            vectors = self.embed_codes(codes[:, :scales].to(self.device))
            return self.shown(self.decode_latents(vectors)).clamp(0, 1)

    def reconstruct(self, images: Tensor, scales: int | None = None) -> Tensor:
        """Encode and decode square images [B, 3, H, H]."""
        return self.decode(self.encode(images), scales)

    @property
    def sizes(self) -> list[int]:
        """Sides in px of images that `encode` takes, ascending; the last is the full size."""
        return [*self.geometries]

    @property
    def device(self) -> torch.device:
        return self.encoder.pos_emb.device

    def count_codes(self, images: Tensor) -> None:
        """Count how often training images [B, 3, H, H] have each code: in the files of
        `sitlib.codec` frequent ones take fewer bits."""
        self.code_counts.zero_()
        for batch in images.split(64):
            for counts, codes in zip(self.code_counts, self.encode(batch).unbind(1), strict=True):
                counts += torch.bincount(codes.flatten(), minlength=len(counts)).to(counts)

    @torch.no_grad()
    def fit_normalization(self, images: Tensor) -> None:
        """Set mean and deviation of every band from training images [B, 3, H, H] in [0, 1]."""
        for norm, x in zip(self.norm, self.geometry.forward(images), strict=True):
            norm.fit(x)
            if not self.config.standardize:  # only take pixels to [-1, 1]: details have no shift
                norm.mean.fill_(0.5 if norm is self.norm[0] else 0.0)
                norm.std.fill_(0.5)


def codes_digest(tokenizer: SpectralTokenizer) -> str:
    """16 hexadecimal digits of all weights but the decoder's: those on which codes depend.

    Of their values in float32, whatever dtype holds them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if name.split(".")[0] not in DECODER_MODULES:
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def are_integers(codes: Tensor) -> bool:
    """Codes and ids are integers of any width; a mask, for instance, is none."""
    return not (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool)


def check_codes(codes: Tensor, codebook_sizes: Sequence[int]) -> None:
    """Raise ValueError unless codes [B, k, ...] lie in 0 ... K_s - 1 in every scale."""
    scales = zip(codes.unbind(1), codebook_sizes, strict=False) if codes.numel() else ()
    for scale, (of_scale, K) in enumerate(scales, 1):
        low, high = (int(x) for x in of_scale.aminmax())
        sentence = f"codes of scale {scale} must lie in 0 ... {K - 1}, these span {low} ... {high}."
        require(0 <= low <= high < K, sentence)


def _head(dim: int, out: int) -> nn.Sequential:
    """ViT-VQGAN's head after a transformer (arXiv 2110.04627, section 3.1)."""
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out))
