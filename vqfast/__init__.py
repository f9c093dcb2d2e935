"""vqfast: exact, fused vector quantization for PyTorch."""

from vqfast import _backends
from vqfast._backends import explain, use_backend
from vqfast.compat.convert import convert
from vqfast.ops.ema import CodeStats, code_stats, ema_update_
from vqfast.ops.gather import gather
from vqfast.ops.kmeans import KMeans, kmeans
from vqfast.ops.masked_conv import masked_conv2d
from vqfast.ops.nearest import Nearest, nearest
from vqfast.ops.quantize import Quantized, vector_quantize
from vqfast.ops.residual import residual_quantize

__version__ = "0.1.0"

__all__ = [
    "CodeStats",
    "KMeans",
    "Nearest",
    "Quantized",
    "code_stats",
    "convert",
    "ema_update_",
    "explain",
    "gather",
    "kmeans",
    "masked_conv2d",
    "nearest",
    "residual_quantize",
    "use_backend",
    "vector_quantize",
]

_backends.load_native()
