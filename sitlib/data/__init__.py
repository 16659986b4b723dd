"""Images from WebDataset shards or folders, captions, robust decoding, reproducible views."""

from sitlib.data.captions import CaptionedImages, emoji_captions, open_captioned
from sitlib.data.decode import DataError, ImageError, decode_image, decode_rgb, rgb_to_tensor
from sitlib.data.images import ImageSource, has_splits, hold_back, mixed, open_images
from sitlib.data.loader import (
    RESIZING,
    TokenShards,
    held_out_positions,
    held_out_views,
    make_shards,
    prefetch,
    read_manifest,
    training_views,
)
