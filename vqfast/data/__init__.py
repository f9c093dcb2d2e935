"""Data sets of 8-bit pictures and a loader whose batches depend on (seed, step) alone.

Everything here gives uint8 [C, H, W]; `vqfast.models.pixels_to_float` turns it into what the models take.
"""

try:
    import numpy  # noqa: F401
    import PIL  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"vqfast.data needs {error.name}; install it with: pip install 'vqfast[train]'"
    ) from None

from .arrays import CIFAR10, MNIST, DataFileError
from .draws import Draws
from .fetch import SOURCES, DataError, default_folder, fetch
from .latents import TokenLatents, open_latents
from .loader import Loader
from .photographs import photographs
from .pictures import PictureError, PictureFolder, find_pictures, open_picture, save_picture

__all__ = [
    "CIFAR10",
    "MNIST",
    "SOURCES",
    "DataError",
    "DataFileError",
    "Draws",
    "Loader",
    "PictureError",
    "PictureFolder",
    "TokenLatents",
    "default_folder",
    "fetch",
    "find_pictures",
    "open_latents",
    "open_picture",
    "photographs",
    "save_picture",
]
