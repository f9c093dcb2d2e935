"""sample: runs an autoregressive network over maps of codes, each position computed once, in the canonical arithmetic.

The network is a program of int64 words, built by `vqfast.models.program`; `vqfast.reference_sample` names its words in
order and runs it in plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqfast import _backends, _border, reference_sample
from vqfast.reference_sample import DRAW, SCORE

__all__ = ["DRAW", "SCORE", "run_program"]

# The threads meet after every layer of every position; more of them would wait longer than they work.
_THREADS = 8

_border.define(
    "sample_",
    "(Tensor(a!) workspace, Tensor(b!) tokens, Tensor(c!) evaluated, Tensor(d!)? logits, Tensor(e!)? log_prob,"
    " Tensor program, Tensor weights, Tensor? given, Tensor? condition, Tensor? labels, int start, int stop, int task,"
    " int lookahead, int seed, int first_image, float temperature, int top_k, float top_p, int threads) -> ()",
    family="sample",
    reference=reference_sample.sample,
    fake=lambda *args: None,
)


def run_program(
    program: Tensor,
    weights: Tensor,
    tokens: Tensor,
    *,
    workspace: Tensor | None = None,
    logits: Tensor | None = None,
    log_prob: Tensor | None = None,
    given: Tensor | None = None,
    condition: Tensor | None = None,
    labels: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
    mode: int = DRAW,
    lookahead: int = 1,
    seed: int = 0,
    first_image: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, int]:
    """Runs positions start..stop-1 (raster order) of the program; writes tokens in place.

    **Shapes**: tokens [B, H, W] int64, given [B, H, W] bool, condition [B, H, W, C] float32, labels [B] int64,
    logits [B, H, W, K] float32, log_prob [B, H, W] float64, workspace [n] float32.

    Args:
        program, weights: see `vqfast.reference_sample`.
        tokens: codes; read where given or before `start`, else written. -1 is allowed where a token is drawn.
        workspace: state between calls that continue one another; made when None (then start must be 0).
        logits, log_prob: where to write the canonical logits, and the log-probability of each token under the
        untempered model.
        given: True keeps the token that is there. In mode SCORE all tokens are kept.
        mode: DRAW, or SCORE: whole rows at a time, nothing drawn.
        lookahead: columns evaluated at one time on guesses (exact: wrong guesses are evaluated again). 1: no guesses.
        seed, first_image: the noise is a hash of (seed, first_image + b, position, code).
        temperature: 0 takes the likeliest code. top_k: 0 for all. top_p: 1 for all.

    Returns:
        (workspace, number of positions for which the network was evaluated).

    Raises:
        ValueError: the program is malformed or an argument out of range.
    """
    tokens_shape = tuple(tokens.shape)
    if tokens.dtype != torch.int64 or len(tokens_shape) != 3 or not tokens.is_contiguous():
        raise ValueError(f"tokens must be contiguous [B, H, W] int64, got {list(tokens_shape)} {tokens.dtype}.")
    if not temperature >= 0 or not 0 < top_p <= 1 or top_k < 0 or lookahead < 1:
        raise ValueError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}, lookahead {lookahead}: they must satisfy"
            " temperature >= 0, top_k >= 0, 0 < top_p <= 1, lookahead >= 1."
        )
    if workspace is None:
        if start:
            raise ValueError(
                f"start is {start}: a call that does not begin the map needs the workspace of the call before it."
            )
        # Not filled here: the first call clears it, each thread its own share.
        workspace = torch.empty(workspace_size(program, *tokens_shape), dtype=torch.float32, device=weights.device)
    chosen = _backends.choose("sample", backend, weights)
    evaluated = torch.zeros(1, dtype=torch.int64, device=tokens.device)
    stop = tokens_shape[1] * tokens_shape[2] if stop is None else stop
    _border.call("sample_", chosen)(
        workspace,
        tokens,
        evaluated,
        logits,
        log_prob,
        program,
        weights,
        given,
        condition,
        labels,
        start,
        stop,
        mode,
        lookahead,
        seed,
        first_image,
        float(temperature),
        top_k,
        float(top_p),
        min(torch.get_num_threads(), _THREADS),
    )
    return workspace, int(evaluated)


def workspace_size(program: Tensor, batch: int, height: int, width: int) -> int:
    """Floats of workspace that a program needs for maps of this size."""
    return reference_sample.Machine(program, batch, height, width).size
