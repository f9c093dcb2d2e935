"""Drawing codes from a prior: each position computed once, in one canonical arithmetic, so every mode gives the
same tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from vqfast import _backends, _border, reference_sample
from vqfast.ops import sample as op
from vqfast.ops.masked_conv import GATES

from .prior_blocks import ConditionStack
from .priors import CodePrior
from .program import Program

# Floats of weights that no longer fit the second cache level of one core (2 MiB).
_LARGE = 1 << 19

MODES = ("incremental", "naive", "cached", "network")


def compile_prior(prior: CodePrior) -> Program:
    """The prior's network, with its present weights, as a program of the sampler.

    Raises:
        NotImplementedError: this kind of prior has none.
    """
    return prior.program()


@torch.no_grad()
def sample_codes(
    prior: CodePrior,
    count: int,
    height: int,
    width: int,
    *,
    labels: Tensor | None = None,
    condition: Tensor | None = None,
    given: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    first_image: int = 0,
    lookahead: int | None = None,
    mode: str | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """Draw maps of codes from a prior.

    The token at a position is the argmax of logit / temperature + noise, where the noise is a hash of (seed,
    first_image + b,
    position, code). So the tokens do not depend on batch_size, lookahead, threads or SIMD level, nor on the mode,
    except that
    "cached" and "network" use torch's arithmetic, which may decide near-ties differently.

    **Shapes**: labels [count], condition [count, height / scale, width / scale], given [count, height, width] ->
    [count, height, width].

    Args:
        prior: any prior of this package; its training mode does not matter (dropout is never applied).
        labels, condition: as the prior's forward.
        given: codes to keep, -1 where one is to be drawn (inpainting in raster order: a drawn code knows the
        codes before it).
        temperature: 0 takes the likeliest code each time.
        top_k: draw from the k likeliest codes only. top_p: from the fewest codes that hold this probability
        (after top_k).
        lookahead: columns evaluated at one time on guesses; a wrong guess is evaluated again, so the tokens stay.
        None: what a
            pass over the weights does not pay for anyway (about 6 rows of a small matrix product).
        mode: "incremental" (default on CPU with native kernels), "naive" (the same arithmetic, everything
        recomputed for each position, for
            checks), "cached" (default elsewhere: each position once, torch's arithmetic), "network" (the ordinary
            loop).
        batch_size: maps computed together.
        progress: show a bar, when tqdm is installed.

    Returns:
        int64 codes on the prior's device.

    Raises:
        ValueError: labels, condition, given or an option do not fit the prior.

    Source: caching: Ramachandran et al. 2017 (1704.06001); lookahead: predictive sampling, Wiggers & Hoogeboom 2020.
    """
    device = next(prior.parameters()).device
    mode = mode or ("cached" if _backends.reasons("sample", "cpu", next(prior.parameters())) else "incremental")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; use one of {', '.join(MODES)}.")
    options = dict(temperature=temperature, top_k=top_k or 0, top_p=1.0 if top_p is None else top_p, seed=seed)
    _check_options(**options, batch_size=batch_size, lookahead=lookahead)
    tokens = _start_tokens(prior, given, count, height, width, device)
    prior.check(tokens.clamp_min(0), labels, condition)
    run = {"incremental": _incremental, "naive": _naive, "cached": _cached, "network": _network}[mode]
    program = None if mode == "network" else compile_prior(prior).to(device)
    with _bar(progress, count * height) as advance:
        for begin in range(0, count, batch_size):
            part = slice(begin, min(count, begin + batch_size))
            of = lambda t: None if t is None else t[part]  # noqa: E731
            job = _Job(
                prior,
                program,
                tokens[part],
                of(labels),
                of(condition),
                first_image + begin,
                options,
                lookahead,
                advance,
            )
            run(job)
    return tokens


def canonical_logits(
    prior: CodePrior, codes: Tensor, labels: Tensor | None = None, condition: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits and log-probabilities of given codes in the sampler's arithmetic: the numbers that sampling and
    coding use.

    **Shapes**: codes [B, H, W] -> logits [B, H, W, K] float32, log_prob [B, H, W] float64 (nats).
    """
    prior.check(codes, labels, condition)
    program = compile_prior(prior).to(codes.device)
    logits = torch.empty(*codes.shape, prior.config.codebook_size, device=codes.device)
    log_prob = torch.empty(codes.shape, dtype=torch.float64, device=codes.device)
    inputs = canonical_inputs(prior, condition, *codes.shape)
    op.run_program(
        program.words,
        program.weights,
        codes.contiguous().clone(),
        logits=logits,
        log_prob=log_prob,
        condition=inputs,
        labels=_contiguous(labels),
        mode=op.SCORE,
    )
    return logits, log_prob


class Stepper:
    """The canonical logits of one position after the other, for a coder that decides the codes itself.

    Example:
        >>> stepper = Stepper(prior, 1, 8, 8)
        >>> for position, logits in stepper:          # logits [B, K] float32
        ...     stepper.put(position, codes_of(logits))
    """

    def __init__(
        self,
        prior: CodePrior,
        count: int,
        height: int,
        width: int,
        labels: Tensor | None = None,
        condition: Tensor | None = None,
    ):
        device = next(prior.parameters()).device
        self.tokens = torch.full((count, height, width), -1, dtype=torch.int64, device=device)
        prior.check(self.tokens.clamp_min(0), labels, condition)
        self._program = compile_prior(prior).to(device)
        self._inputs, self._labels = canonical_inputs(prior, condition, count, height, width), _contiguous(labels)
        self._logits = torch.empty(count, height, width, prior.config.codebook_size, device=device)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        workspace = None
        _, height, width = self.tokens.shape
        for position in range(height * width):
            workspace, _ = op.run_program(
                self._program.words,
                self._program.weights,
                self.tokens,
                workspace=workspace,
                logits=self._logits,
                condition=self._inputs,
                labels=self._labels,
                start=position,
                stop=position + 1,
                temperature=0.0,
            )
            yield position, self._logits[:, position // width, position % width]

    def put(self, position: int, codes: Tensor) -> None:
        width = self.tokens.shape[2]
        self.tokens[:, position // width, position % width] = codes


# ---- modes -------------------------------------------------------------------------------------------------


class _Job:
    """One batch: tokens is a view that the run fills."""

    def __init__(self, prior, program, tokens, labels, condition, first_image, options, lookahead, advance):
        self.prior, self.program, self.tokens, self.labels = prior, program, tokens, _contiguous(labels)
        self.condition, self.first_image, self.options, self.advance = condition, first_image, options, advance
        self.given = tokens >= 0
        # Weights beyond the caches are read once for six rows of accumulators at the cost of one row; small
        # networks gain nothing.
        large = program is not None and program.weights.numel() >= _LARGE
        self.lookahead = lookahead or (max(1, min(6 // max(len(tokens), 1), tokens.shape[2])) if large else 1)

    def draw(self, logits: Tensor, image: int, row: int, column: int) -> None:
        """Sets one token from logits [K], as the native code would."""
        if self.given[image, row, column]:
            return
        o, position = self.options, row * self.tokens.shape[2] + column
        self.tokens[image, row, column] = reference_sample.draw_token(
            logits.float(), o["seed"], self.first_image + image, position, o["temperature"], o["top_k"], o["top_p"]
        )


def _incremental(job: _Job) -> None:
    count, height, width = job.tokens.shape
    inputs = canonical_inputs(job.prior, job.condition, count, height, width)
    workspace = None
    # One call per row shows progress and can be interrupted; it costs a few dozen microseconds.
    for row in range(height):
        workspace, _ = op.run_program(
            job.program.words,
            job.program.weights,
            job.tokens,
            workspace=workspace,
            given=job.given,
            condition=inputs,
            labels=job.labels,
            start=row * width,
            stop=(row + 1) * width,
            lookahead=job.lookahead,
            first_image=job.first_image,
            **job.options,
        )
        job.advance(count)


def _naive(job: _Job) -> None:
    count, height, width = job.tokens.shape
    inputs = canonical_inputs(job.prior, job.condition, count, height, width)
    for row in range(height):
        for column in range(width):
            logits = torch.empty(count, height, width, job.program.codebook_size, device=job.tokens.device)
            op.run_program(
                job.program.words,
                job.program.weights,
                job.tokens.clamp_min(0),
                logits=logits,
                condition=inputs,
                labels=job.labels,
                stop=(row + 1) * width,
                mode=op.SCORE,
            )
            for image in range(count):
                job.draw(logits[image, row, column], image, row, column)
        job.advance(count)


def _cached(job: _Job) -> None:
    count, height, width = job.tokens.shape
    machine = reference_sample.Machine(job.program.words, count, height, width)
    workspace = torch.empty(machine.size, device=job.tokens.device)
    features = job.prior.condition_features(job.condition)
    inputs = job.prior.spatial_inputs(features, count, height, width)
    o = job.options
    for row in range(height):
        reference_sample.sample(
            workspace,
            job.tokens,
            torch.zeros(1, dtype=torch.int64),
            None,
            None,
            job.program.words,
            job.program.weights,
            job.given,
            inputs,
            job.labels,
            row * width,
            (row + 1) * width,
            op.DRAW,
            1,
            o["seed"],
            job.first_image,
            o["temperature"],
            o["top_k"],
            o["top_p"],
            1,
            arithmetic=reference_sample.Fast,
        )
        job.advance(count)


def _network(job: _Job) -> None:
    count, height, width = job.tokens.shape
    training = job.prior.training
    job.prior.eval()
    for row in range(height):
        for column in range(width):
            logits = job.prior(job.tokens.clamp_min(0), job.labels, job.condition)[:, :, row, column]
            for image in range(count):
                job.draw(logits[image], image, row, column)
        job.advance(count)
    job.prior.train(training)


# ---- the condition in canonical arithmetic -----------------------------------------------------------------


@torch.no_grad()
def canonical_inputs(prior: CodePrior, condition: Tensor | None, count: int, height: int, width: int) -> Tensor | None:
    """`prior.spatial_inputs` with the condition stack in the canonical arithmetic, so codes match on every machine."""
    features = None if condition is None else canonical_features(prior.condition_stack, condition)
    return prior.spatial_inputs(features, count, height, width)


def canonical_features(stack: ConditionStack, codes: Tensor) -> Tensor:
    """The condition stack's features with each convolution one chain over (tap, channel) ascending."""
    x = stack.embedding(codes).float().movedim(-1, 1)
    for block in stack.blocks:
        y = _canonical_conv(_relu(_canonical_conv(_relu(x), block.first)), block.second)
        x = x + _canonical_glu(y)
    return F.interpolate(x, scale_factor=stack.scale, mode="nearest") if stack.scale > 1 else x


def _relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0)


def _native(x: Tensor) -> bool:
    return not _backends.reasons("masked_conv", "cpu", x)


def _canonical_conv(x: Tensor, conv: torch.nn.Conv2d) -> Tensor:
    """A 3 x 3 convolution that sees all sides, as a causal one: its rows become the rows above a position two
    rows lower."""
    weight, bias = conv.weight.float(), conv.bias.float()
    height, width = x.shape[2:]
    if not _native(x):
        columns = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # [B, C, H, W, 3, 3]
        rows = columns.permute(0, 2, 3, 4, 5, 1).reshape(-1, 9 * x.shape[1])
        flat = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
        acc = reference_sample.Exact.chain(bias.expand(len(rows), -1), rows, flat)
        return acc.view(x.shape[0], height, width, -1).movedim(-1, 1)
    causal = F.pad(weight, (0, 0, 0, 4))  # [out, in, 7, 3]: rows 0..2 stand above the centre
    return _border.call("masked_conv", "cpu")(F.pad(x, (0, 0, 0, 2)), causal, bias, False, 1, 1)[:, :, 2:]


def _canonical_glu(x: Tensor) -> Tensor:
    if _native(x):
        return _border.call("gate", "cpu")(x, None, GATES["glu"])
    return reference_sample.glu_exact(*x.chunk(2, dim=1))


# ---- small things ------------------------------------------------------------------------------------------


def _check_options(
    temperature: float, top_k: int, top_p: float, seed: int, batch_size: int, lookahead: int | None
) -> None:
    """The same limits in every mode; NaN lies outside all of them."""
    for name, value, right, expected in (
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k >= 0, "0 (all codes) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("batch_size", batch_size, batch_size >= 1, "1 or more"),
        ("lookahead", lookahead, lookahead is None or lookahead >= 1, "None, or 1 or more"),
    ):
        if not right:
            raise ValueError(f"{name} is {value}; it must be {expected}.")


def _start_tokens(prior: CodePrior, given: Tensor | None, count: int, height: int, width: int, device) -> Tensor:
    if given is None:
        return torch.full((count, height, width), -1, dtype=torch.int64, device=device)
    if tuple(given.shape) != (count, height, width) or given.dtype != torch.int64:
        raise ValueError(
            f"given is {list(given.shape)} {given.dtype}; it must be [{count}, {height}, {width}] int64, -1 where unknown."
        )
    if given.numel() and (given.min() < -1 or given.max() >= prior.config.codebook_size):
        raise ValueError(f"given codes must be -1 or in 0..{prior.config.codebook_size - 1}.")
    return given.to(device).contiguous().clone()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@contextlib.contextmanager
def _bar(show: bool, total: int):
    try:
        from tqdm import tqdm
    except ImportError:
        show = False
    if not show:
        yield lambda n: None
        return
    with tqdm(total=total, unit="row") as bar:
        yield bar.update
