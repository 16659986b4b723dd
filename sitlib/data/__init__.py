"""Images from WebDataset shards or folders: splits, classes, captions, robust decoding, reproducible views."""

from sitlib.data.captions import CaptionedImages, emoji_captions, open_captioned
from sitlib.data.decoding import ImageError, decode_image, decode_rgb, rgb_to_tensor
from sitlib.data.degraded import degraded
from sitlib.data.index import DataError
from sitlib.data.prefetch import prefetch
from sitlib.data.sources import ImageSource, Record, open_images
from sitlib.data.views import held_out_positions, held_out_views, training_views

__all__ = [
    "CaptionedImages",
    "DataError",
    "ImageError",
    "ImageSource",
    "Record",
    "decode_image",
    "decode_rgb",
    "degraded",
    "emoji_captions",
    "held_out_positions",
    "held_out_views",
    "open_captioned",
    "open_images",
    "prefetch",
    "rgb_to_tensor",
    "training_views",
]
