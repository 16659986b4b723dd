"""Images from WebDataset shards or folders: splits, classes, robust decoding, reproducible views."""

from sitlib.data.decoding import ImageError, decode_image
from sitlib.data.index import DataError
from sitlib.data.prefetch import prefetch
from sitlib.data.sources import ImageSource, Record, open_images
from sitlib.data.views import held_out_views, training_views

__all__ = [
    "DataError",
    "ImageError",
    "ImageSource",
    "Record",
    "decode_image",
    "held_out_views",
    "open_images",
    "prefetch",
    "training_views",
]
