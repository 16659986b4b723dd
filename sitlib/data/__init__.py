"""Images from WebDataset shards or folders, captions, robust decoding, reproducible views."""

from sitlib.data.captions import CaptionedImages, emoji_captions, open_captioned
from sitlib.data.crops import degrade, held_out_positions, held_out_views, training_views
from sitlib.data.decode import ImageError, decode_image, decode_rgb, rgb_to_tensor
from sitlib.data.images import DataError, ImageSource, Record, open_images
from sitlib.data.loader import prefetch

__all__ = [
    "CaptionedImages",
    "DataError",
    "ImageError",
    "ImageSource",
    "Record",
    "decode_image",
    "decode_rgb",
    "degrade",
    "emoji_captions",
    "held_out_positions",
    "held_out_views",
    "open_captioned",
    "open_images",
    "prefetch",
    "rgb_to_tensor",
    "training_views",
]
