"""ONNX: how the ops of an encoder in evaluation mode are written in standard operators, for runtimes that have no kernels of ours.

    torch.onnx.export(model.eval(), args, dynamo=True, custom_translation_table=vqfast.compat.onnx.translations())

The exported search is exact too, in float64, except where two codes are as near as float64 can tell; a runtime holds N x K scores in
it, since no standard operator searches without. Needs onnx and onnxscript; opset 18 or later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from vqfast import _border
from vqfast.ops import gather as _gather  # noqa: F401  (defines the op)
from vqfast.ops import nearest as _nearest  # noqa: F401
from vqfast.ops import quantize as _quantize  # noqa: F401
from vqfast.ops import residual as _residual  # noqa: F401

_FLOAT, _INT64, _DOUBLE = 1, 7, 11  # onnx.TensorProto


def translations() -> dict[Callable, Callable]:
    """Every op of an evaluation graph, under each backend's name -> its translation; for torch.onnx.export(dynamo=True).

    Raises:
        ModuleNotFoundError: onnxscript is not installed.
    """
    try:
        from onnxscript import opset18
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("ONNX export needs onnx and onnxscript: pip install onnx onnxscript") from error
    written = _Operators(opset18)
    ops = {"nearest": written.nearest, "gather": written.gather, "quantize": written.quantize, "residual": written.residual}
    return {_border.call(name, backend): _function(method) for name, method in ops.items() for backend in _border.BACKENDS}


def _function(method: Callable) -> Callable:
    """A plain function, on which the exporter can write its notes."""

    @functools.wraps(method)
    def translate(*args, **kwargs):
        return method(*args, **kwargs)

    return translate


class _Operators:
    """The ops on canonical shapes, x [B, G, N, D] and codebook [G, K, D]; `op` is an onnxscript opset."""

    def __init__(self, op):
        self.op = op

    # -- the ops ---------------------------------------------------------------------------------------------------------

    def nearest(self, x, codebook, metric: int, order=None, basis=None, guess=None):
        return self._nearest(x, codebook, tuple(codebook.shape), metric)

    def gather(self, codebook, indices):
        op = self.op
        valid = op.GreaterOrEqual(indices, op.Constant(value_int=0))
        rows = self._pick(codebook, tuple(codebook.shape), op.Where(valid, indices, op.Constant(value_int=0)))
        return op.Where(self._last(valid), rows, op.CastLike(op.Constant(value_float=0.0), codebook))

    def quantize(self, x, codebook, mask, metric: int, with_sums: bool, order=None, basis=None, guess=None):
        return self._quantize(x, codebook, tuple(codebook.shape), mask, metric, with_sums)

    def residual(self, x, codebooks, mask, metric: int, with_sums: bool, with_pull: bool):
        op = self.op
        rest, levels = op.Cast(x, to=_FLOAT), []
        for level in range(codebooks.shape[0]):
            codebook = op.Gather(codebooks, op.Constant(value_int=level), axis=0)
            levels.append(self._quantize(rest, codebook, tuple(codebooks.shape)[1:], mask, metric, with_sums))
            rest = op.Sub(rest, levels[-1][0])
        quantized = levels[0][0]
        for level in levels[1:]:
            quantized = op.Add(quantized, level[0])
        error = levels[0][1]
        for level in levels[1:]:
            error = op.Add(error, level[1])
        indices, counts = (
            op.Concat(*(op.Unsqueeze(level[at], op.Constant(value_ints=[0])) for level in levels), axis=0) for at in (2, 4)
        )
        return op.CastLike(quantized, x), error, indices, levels[0][3], counts, levels[0][5], levels[0][3]

    # -- their parts; `shape` is the codebook's, (G, K, D) ---------------------------------------------------------------

    def _nearest(self, x, codebook, shape, metric: int):
        op = self.op
        rows, finite = self._finite(op.Cast(x, to=_DOUBLE))
        codes, usable = self._finite(op.Cast(codebook, to=_DOUBLE))
        indices = self._argmin(rows, codes, usable, metric)
        chosen = self._pick(codes, shape, indices)
        if metric == 0:
            distance = self._sum(self._square(op.Sub(rows, chosen)))
        else:
            distance = op.Neg(self._sum(op.Mul(rows, chosen)))
            if metric == 1:
                lengths = op.Sqrt(op.Mul(self._sum(self._square(rows)), self._sum(self._square(chosen))))
                distance = op.Add(self._one(), op.Div(distance, self._positive(lengths)))
        distance = op.Cast(op.Where(finite, distance, self._constant(float("nan"))), to=_FLOAT)
        return distance, op.Where(finite, indices, op.Constant(value_int=0))

    def _quantize(self, x, codebook, shape, mask, metric: int, with_sums: bool):
        if with_sums:
            raise NotImplementedError("ONNX export is for evaluation; call model.eval() first.")
        op = self.op
        zero = op.Constant(value_int=0)
        _, found = self._nearest(x, codebook, shape, metric)
        _, finite = self._finite(op.Cast(x, to=_DOUBLE))
        valid, indices, nonfinite = finite, found, op.Not(finite)
        codes = op.CastLike(self._pick(codebook, shape, found), x)
        quantized = op.Where(self._last(finite), codes, op.CastLike(self._constant(float("nan")), x))
        if mask is not None:
            mask = op.Unsqueeze(mask, op.Constant(value_ints=[1]))
            valid, nonfinite = op.And(finite, mask), op.And(nonfinite, mask)
            indices = op.Where(mask, found, op.Constant(value_int=-1))
            quantized = op.Where(self._last(mask), quantized, op.CastLike(self._constant(0.0), x))
        rest = op.Sub(op.Cast(x, to=_DOUBLE), op.Cast(self._pick(codebook, shape, found), to=_DOUBLE))
        error = self._square(op.Where(self._last(valid), rest, self._constant(0.0)))
        error = op.Reshape(op.ReduceSum(error, keepdims=0), op.Constant(value_ints=[1]))
        count = op.ReduceSum(op.Cast(nonfinite, to=_INT64), keepdims=0)
        no_sums = op.ConstantOfShape(op.Constant(value_ints=[0]))
        counts = self._counts(op.Where(valid, found, zero), valid, shape)
        return quantized, op.Concat(error, error, axis=0), indices, no_sums, counts, count

    def _argmin(self, rows, codes, usable, metric: int):
        """Lowest index of the smallest score [B, G, N, K]; codes that are not finite score infinity."""
        op = self.op
        products = op.MatMul(rows, op.Transpose(codes, perm=[0, 2, 1]))
        squares = op.Unsqueeze(self._sum(self._square(codes)), op.Constant(value_ints=[1]))  # [G, 1, K]
        if metric == 0:
            scores = op.Sub(op.Mul(squares, self._constant(0.5)), products)
        elif metric == 1:
            scores = op.Neg(op.Div(products, self._positive(op.Sqrt(squares))))
        else:
            scores = op.Neg(products)
        usable = op.Unsqueeze(usable, op.Constant(value_ints=[1]))
        return op.ArgMin(op.Where(usable, scores, self._constant(float("inf"))), axis=-1, keepdims=0)

    def _pick(self, codebook, shape, indices):
        """Codes [B, G, N, D] of indices [B, G, N]."""
        op = self.op
        groups, size, dim = shape
        flat = op.Reshape(codebook, op.Constant(value_ints=[groups * size, dim]))
        offset = op.Reshape(op.Constant(value_ints=[g * size for g in range(groups)]), op.Constant(value_ints=[1, groups, 1]))
        return op.Gather(flat, op.Add(indices, offset), axis=0)

    def _counts(self, indices, valid, shape):
        """How many valid rows chose each code, [G, K]."""
        op = self.op
        groups, size, _ = shape
        offset = op.Reshape(op.Constant(value_ints=[g * size for g in range(groups)]), op.Constant(value_ints=[1, groups, 1]))
        flat = op.Reshape(op.Add(indices, offset), op.Constant(value_ints=[-1]))
        ones = op.Reshape(op.Cast(valid, to=_INT64), op.Constant(value_ints=[-1]))
        zeros = op.Constant(value_ints=[0] * (groups * size))
        return op.Reshape(op.ScatterElements(zeros, flat, ones, reduction="add"), op.Constant(value_ints=[groups, size]))

    def _finite(self, values):
        """values with rows that are not finite set to 0, and which rows are finite."""
        op = self.op
        zeros = self._sum(op.Mul(values, self._constant(0.0)))  # NaN where a row holds NaN or Inf
        finite = op.Not(op.IsNaN(zeros))
        return op.Where(self._last(finite), values, self._constant(0.0)), finite

    def _positive(self, lengths):
        """lengths with infinity for 0, so that dividing by them gives 0."""
        op = self.op
        return op.Where(op.Greater(lengths, self._constant(0.0)), lengths, self._constant(float("inf")))

    def _sum(self, values):
        return self.op.ReduceSum(values, self.op.Constant(value_ints=[-1]), keepdims=0)

    def _square(self, values):
        return self.op.Mul(values, values)

    def _last(self, values):
        return self.op.Unsqueeze(values, self.op.Constant(value_ints=[-1]))

    def _one(self):
        return self._constant(1.0)

    def _constant(self, value: float):
        return self.op.Cast(self.op.Constant(value_float=value), to=_DOUBLE)
