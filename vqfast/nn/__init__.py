"""Quantizer layers."""

from vqfast.nn.residual import ResidualVectorQuantizer
from vqfast.nn.vector_quantizer import VectorQuantizer, VectorQuantizerEMA

__all__ = ["ResidualVectorQuantizer", "VectorQuantizer", "VectorQuantizerEMA"]
