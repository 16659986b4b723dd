"""What the paper reports, as far as it is compared with here (SIT, arXiv 2412.09607): reconstruction of ImageNet's validation set, FID."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reported:
    """One row of the paper's reconstruction table; None where it gives no number.

    Attributes:
        variant: our name of the model.
        size: side in px.
        lpips, psnr, fid, inception_score: as reported.
    """

    variant: str
    size: int
    lpips: float
    psnr: float | None = None
    fid: float | None = None
    inception_score: float | None = None


RECONSTRUCTION = (
    Reported("vit_vqgan", 256, 0.163, 23.8, 1.20, 194.6),
    Reported("sit4", 256, 0.144, 24.0, 1.20, 199.5),
    Reported("sit5", 256, 0.135, 24.5, 0.97, 202.3),
    Reported("sit5_sc", 256, 0.161),
    Reported("sit5_sc", 128, 0.159, 27.1, 2.13),
    Reported("sit5_sc", 64, 0.111, 31.3, 1.39),
    Reported("sit5_sc", 32, 0.029, 36.8, 0.31),
    Reported("sit5_sc", 16, 0.013),
    Reported("vit_vqgan", 16, 0.127),
)
FULL_SIZE = 256

# (our name of the model, of its baseline) -> their FID: ImageNet 256, 650M parameters; MS-COCO 256, 350M, with the scale-causal decoder.
CLASS_FID = {("ar_sit4", "ar_vit_vqgan"): (6.95, 8.37)}
TEXT_FID = {("ar_captioned_sit4_sc", "ar_captioned_vit_vqgan"): (12.6, 12.4)}
