"""Sampling: one arithmetic on every backend and in every mode, the network's distribution, and programs that
cannot do harm."""

import ctypes
import functools
import itertools
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from check import ULP, close, run_python, same, same_bits
from torch.nn import functional as F

import vqfast  # noqa: F401  (defines the ops)
from vqfast import _backends, reference_sample
from vqfast.models.pixelcnn import GatedPixelCNN, PixelCNN
from vqfast.models.pixelsnail import PixelSNAIL
from vqfast.models.priors import HierarchicalPrior
from vqfast.models.sampling import MODES, Stepper, canonical_logits, compile_prior, sample_codes
from vqfast.ops import sample as op

FAMILY = "sample"
NATIVE = not _backends.reasons("sample", "cpu", torch.empty(0))
native = pytest.mark.skipif(not NATIVE, reason="native: no native library")

# Odd widths, so that every panel, vector and row tile has a tail.
TINY = {
    GatedPixelCNN: dict(channels=20, layers=3, first_kernel_size=5, head_channels=30),
    PixelCNN: dict(channels=22, layers=2, first_kernel_size=3, head_channels=40),
    PixelSNAIL: dict(
        channels=10, blocks=2, layers=1, residual_channels=35, first_kernel_size=3, attention_heads=2, key_channels=5,
        value_channels=7, output_layers=1,
    ),
}  # fmt: skip
KINDS = list(TINY)
K, COUNT, HEIGHT, WIDTH = 11, 2, 4, 6


@functools.cache
def build(kind, **fields):
    torch.manual_seed(KINDS.index(kind))
    settings = dict(codebook_size=K, classes=3, condition_codes=7, condition_channels=9, condition_layers=1)
    prior = kind(**{**TINY[kind], **settings, **fields}).eval()
    with torch.no_grad():
        # Large enough that classes matter and probabilities are far from uniform.
        for key, p in prior.named_parameters():
            p.mul_(20.0 if "classes" in key else 2.2 if kind is GatedPixelCNN else 1.7)
    return prior


def inputs(prior, count=COUNT, height=HEIGHT, width=WIDTH):
    generator = torch.Generator().manual_seed(8)
    labels = torch.tensor([2, -1] * count)[:count] if prior.config.classes else None
    shape = (count, height // 2, width // 2)
    condition = torch.randint(7, shape, generator=generator) if prior.config.condition_codes else None
    return dict(labels=labels, condition=condition)


def name(value):
    return getattr(value, "__name__", str(value))


def draw(prior, count=COUNT, height=HEIGHT, width=WIDTH, **options):
    return sample_codes(prior, count, height, width, **{**inputs(prior, count, height, width), "seed": 3, **options})


# ---- the emulated fused multiply-add -----------------------------------------------------------------------


def test_emulated_fma_rounds_once():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4000, generator=generator)
    scale = 2.0 ** torch.randint(-30, 31, (4000,), generator=generator)
    # Half of the addends nearly cancel the product, where a second rounding would show.
    z = torch.where(
        torch.arange(4000) % 2 == 0, -(x * y) * (1 + torch.randn(4000, generator=generator) * 2.0**-20), scale
    )
    got = reference_sample.fma(x, y, z)
    for a, b, c, result in zip(x.tolist(), y.tolist(), z.tolist(), got):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        below, above = (torch.nextafter(result, torch.tensor(s * torch.inf)).item() for s in (-1, 1))
        error = abs(Fraction(result.item()) - exact)
        assert error <= abs(Fraction(below) - exact) and error <= abs(Fraction(above) - exact)
        # A tie goes to the even mantissa.
        if error in (abs(Fraction(below) - exact), abs(Fraction(above) - exact)):
            assert result.view(torch.int32).item() % 2 == 0


# ---- one arithmetic ----------------------------------------------------------------------------------------


@functools.cache
def expected(kind):
    """Tokens, logits and log-probabilities of the reference backend."""
    return run(kind, "reference")


def run(kind, backend, **options):
    prior = build(kind)
    program, given = compile_prior(prior), inputs(prior)
    features = prior.spatial_inputs(prior.condition_features(given["condition"]).detach(), COUNT, HEIGHT, WIDTH)
    tokens = torch.full((COUNT, HEIGHT, WIDTH), -1)
    logits = torch.empty(COUNT, HEIGHT, WIDTH, K)
    log_prob = torch.empty(COUNT, HEIGHT, WIDTH, dtype=torch.float64)
    op.run_program(
        program.words, program.weights, tokens, logits=logits, log_prob=log_prob, condition=features, labels=given["labels"],
        seed=3, backend=backend, **options,
    )  # fmt: skip
    return tokens, logits, log_prob


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_every_backend_gives_the_reference_bits(backend, kind):
    for got, want in zip(run(kind, backend), expected(kind)):
        same_bits(got, want)


OPTIONS = [
    dict(temperature=0.0),
    dict(temperature=0.5),
    dict(top_k=3),
    dict(top_p=0.6),
    dict(top_k=4, top_p=0.9, temperature=2.0),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@native
def test_native_draws_equal_the_reference_draws_under_options(options):
    tokens, logits, log_prob = run(GatedPixelCNN, "cpu", **options)
    for b, i, j in itertools.product(range(COUNT), range(HEIGHT), range(WIDTH)):
        values, code = logits[b, i, j], int(tokens[b, i, j])
        assert code == reference_sample.draw_token(values, 3, b, i * WIDTH + j, **options)
        assert log_prob[b, i, j] == reference_sample.token_log_prob(values, code)


@pytest.mark.parametrize("kind", KINDS, ids=name)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_tokens(kind, mode):
    """ "cached" and "network" are not promised to on near-ties; these small maps have none."""
    prior = build(kind)
    same(draw(prior, mode=mode), draw(prior))


@native
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_batches_threads_and_lookahead_change_nothing(kind, set_threads):
    prior, tokens = build(kind), draw(build(kind), lookahead=1)
    for threads, batch_size, lookahead in [(1, 1, 1), (2, 2, 3), (3, 3, 100), (2, 1, None), (5, 3, 2)]:
        set_threads(threads)
        same(draw(prior, batch_size=batch_size, lookahead=lookahead), tokens, f"{threads=} {batch_size=} {lookahead=}")


@native
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_scoring_stepping_and_drawing_have_the_same_logits(kind):
    prior, given = build(kind), inputs(build(kind))
    tokens = draw(prior)
    logits, log_prob = canonical_logits(prior, tokens, **given)
    stepper = Stepper(prior, COUNT, HEIGHT, WIDTH, **given)
    for position, values in stepper:
        i, j = divmod(position, WIDTH)
        same_bits(values, logits[:, i, j])
        stepper.put(position, tokens[:, i, j])
    with vqfast.use_backend("reference"):
        slow = canonical_logits(prior, tokens, **given)
    same_bits(logits, slow[0])
    same_bits(log_prob, slow[1])


SHORTAGE = """
import resource, sys, torch
from vqfast.models.pixelcnn import GatedPixelCNN
from vqfast.models.sampling import compile_prior
from vqfast.ops import sample as op

k, step, most, enough = map(int, sys.argv[1:])
program = compile_prior(GatedPixelCNN(codebook_size=k, channels=2, layers=1, head_channels=2, first_kernel_size=3))
workspace = torch.empty(op.workspace_size(program.words, 2, 1, 3))

def draw():
    tokens = torch.full((2, 1, 3), -1)
    op.run_program(program.words, program.weights, tokens, workspace=workspace, top_k=9, seed=1, backend="cpu")
    return tokens

def mapped():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])

torch.set_num_threads(1)
wanted, outcomes = draw(), []
torch.set_num_threads(8)
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
for spare in range(2, most, step):
    resource.setrlimit(resource.RLIMIT_AS, (mapped() + spare * 2**20, hard))
    try:
        got = draw()
    except MemoryError:
        got = None
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    outcomes.append(got is not None)
    assert got is None or torch.equal(got, wanted), spare
    if sum(outcomes) == enough:
        break
print(outcomes)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="platform: the script reads /proc and limits its address space")


@native
@linux
def test_threads_that_cannot_be_started_are_done_without():
    """Room for hardly one more stack, then for a few: the same codes, from however many threads there are."""
    assert run_python(SHORTAGE, str(K), "7", "64", "4") == "[True, True, True, True]\n"


@native
@linux
def test_memory_that_runs_out_is_an_ordinary_error():
    """Each thread needs 40 MiB beside its stack, so with growing room it is another one's that is missing."""
    outcomes = run_python(SHORTAGE, str(2**20), "20", "700", "1")
    assert outcomes.startswith("[False, ") and outcomes.endswith(", True]\n"), outcomes


@native
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_every_simd_level_gives_the_same_bits(kind):
    library = ctypes.CDLL(str(Path(_backends.__file__).with_name("_C_cpu.so")))
    best, prior = library.vqfast_cpu_level(), build(kind)
    results = []
    try:
        for level in range(best + 1):
            library.vqfast_cpu_level_set(level)
            tokens = draw(prior, lookahead=2)
            results.append((tokens, *canonical_logits(prior, tokens, **inputs(prior))))
    finally:
        library.vqfast_cpu_level_set(best)
    for level, result in enumerate(results):
        for got, want in zip(result, results[-1]):
            same_bits(got, want, _backends.CPU_LEVELS[level])


@native
def test_full_size_layers_match_the_network():
    """128 channels, 512 codes, 7 x 7 and 3 x 3 kernels: whole panels, several blocks of channels."""
    torch.manual_seed(0)
    prior = GatedPixelCNN(layers=3).eval()
    codes = torch.randint(512, (2, 5, 9))
    agree(prior, codes, torch.randperm(512 * 90)[:24])


def test_logits_agree_with_the_network_within_a_derived_bound():
    torch.manual_seed(1)
    prior = GatedPixelCNN(**{**TINY[GatedPixelCNN], "codebook_size": K}).eval()
    codes = torch.randint(K, (1, HEIGHT, WIDTH))
    agree(prior, codes, torch.arange(K * HEIGHT * WIDTH))


def agree(prior, codes, picks):
    logits = canonical_logits(prior, codes)[0].movedim(-1, 1).flatten()
    bound = network_bound(prior, codes, picks)
    assert bound.max() < 0.2 * logits.std(), "a bound this wide would prove nothing"
    close(logits[picks], prior(codes).flatten()[picks], bound)


def network_bound(prior, codes, picks):
    """How far two float32 evaluations of a GatedPixelCNN may lie apart at the picked logits, to first order.

    Every operation's own rounding error has a bound d, and reaches a logit times its derivative: the sum of
    |derivative| d over
    all values of the network. A sum of n products in any order, fused or not, is off by at most (n + 1) u sum
    |terms|; n counts
    the whole chain, in which the sampler continues the sum of another convolution. A gate's formula is off by at
    most 16 u.
    """
    probes = []

    def note(value, error):
        probe = torch.zeros_like(value, requires_grad=True)
        probes.append((probe, error.detach().expand_as(value)))
        return value + probe

    def conv(x, layer, pad=(0, 0, 0, 0), longer=0):
        x, w = F.pad(x, pad), layer.weight.double()
        b = torch.zeros(()) if layer.bias is None else layer.bias.double()[:, None, None]
        return note(F.conv2d(x, w) + b, (w[0].numel() + longer + 3) * ULP * (F.conv2d(x.abs(), w.abs()) + b.abs()))

    def gate(x):
        a, b = x.chunk(2, 1)
        return note(a.tanh() * b.sigmoid(), torch.tensor(16 * ULP))

    v = h = prior.embedding(codes).movedim(-1, 1).double()
    for layer in prior.layers:
        reach, crop = layer.reach, -1 if layer.first else None
        taps = layer.horizontal.weight[0].numel() + layer.vertical_to_horizontal.weight[0].numel()
        vertical = conv(v[:, :, :crop], layer.vertical, (reach, reach, reach, 0))
        wide = conv(h[..., :crop], layer.horizontal, (reach, 0, 0, 0), taps) + conv(
            vertical, layer.vertical_to_horizontal, longer=taps
        )
        out = conv(gate(wide), layer.residual)
        v, h = gate(vertical), out if layer.first else note(out + h, ULP * (out.abs() + h.abs()))
    logits = conv(conv(h.relu(), prior.head.first).relu(), prior.head.second).flatten()
    bounds = []
    for pick in picks.tolist():
        grads = torch.autograd.grad(logits[pick], [p for p, _ in probes], retain_graph=True, allow_unused=True)
        bounds.append(sum((g.abs() * d).sum() for g, (_, d) in zip(grads, probes) if g is not None))
    # Once for each of the two evaluations; 1 % for products of errors.
    return 2 * 1.01 * torch.stack(bounds)


# ---- the distribution --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_frequencies_match_enumerated_probabilities(kind):
    """Chi-square of 20,000 drawn 2 x 2 maps against the exact probabilities of all 81."""
    prior = build(kind, codebook_size=3, classes=0, condition_codes=0)
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    probability = prior.log_prob(every).exp()
    count = 20_000 if NATIVE else 400
    drawn = sample_codes(prior, count, 2, 2, seed=11, batch_size=5000)
    cell = (drawn.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1)
    frequency = torch.bincount(cell, minlength=81).double()
    wanted = probability * count
    rare = wanted < 5  # pooled, as the chi-square approximation asks
    pool = lambda t: torch.cat([t[~rare], t[rare].sum()[None]])  # noqa: E731
    statistic = ((pool(frequency) - pool(wanted)) ** 2 / pool(wanted).clamp_min(1e-9)).sum().item()
    degrees = int((~rare).sum())
    # Wilson and Hilferty: (X / d) ** (1/3) is nearly normal; 4.5 sigma is passed once in 300,000 right samplers.
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    assert z < 4.5, (statistic, degrees)
    uniform = ((frequency - count / 81) ** 2 / (count / 81)).sum().item()
    assert uniform > 10 * degrees, "the prior is too flat for this test to notice a wrong sampler"


def test_noise_is_gumbel_and_a_pure_function_of_its_counters():
    noise = torch.cat([reference_sample.gumbel(1000, 5, image, p) for image in range(4) for p in range(25)])
    # Mean 0.5772 and variance pi^2 / 6, each within 5 standard errors of 100,000 draws.
    assert abs(noise.mean() - 0.5772157) < 5 * (1.6449 / 1e5) ** 0.5
    assert abs(noise.var() - 1.644934) < 5 * (1.6449**2 * 4.4 / 1e5) ** 0.5
    same_bits(noise[25_000:26_000], reference_sample.gumbel(1000, 5, 1, 0))
    different = [reference_sample.gumbel(1000, *counters) for counters in [(5, 0, 0), (6, 0, 0), (5, 1, 0), (5, 0, 1)]]
    for a, b in itertools.combinations(different, 2):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / 1000**0.5


def test_logarithm_and_exponential():
    x = torch.cat(
        [torch.rand(1000, dtype=torch.float64), torch.tensor([2.0**-53, 1 - 2.0**-53, 1.0, 0.5, 36.7, 1e300])]
    )
    error = (reference_sample.log64(x) - x.log()).abs()
    assert (error <= 4 * 2.0**-52 * x.log().abs() + 2.0**-53).all()
    y = -torch.rand(1000, dtype=torch.float64) * 100
    assert ((reference_sample.exp64(y) - y.exp()).abs() <= 8 * 2.0**-52 * y.exp()).all()
    assert reference_sample.exp64(torch.tensor([-800.0], dtype=torch.float64)) == 0
    z = torch.linspace(-86, 88, 4001)
    assert ((reference_sample.exp32(z).double() - z.double().exp()).abs() <= 4 * ULP * z.double().exp()).all()


@pytest.mark.parametrize(
    "options", [dict(top_k=2), dict(top_p=0.5), dict(top_k=3, top_p=0.7), dict(temperature=0.0)], ids=str
)
def test_restricted_draws_stay_in_their_set(options):
    logits = torch.tensor([0.3, 2.0, -1.0, 2.0, 1.0])
    probability = logits.double().softmax(0)
    order = [1, 3, 4, 0, 2]  # equal logits: lower index first
    kept = order[: options.get("top_k", 5)]
    if "top_p" in options:
        share = torch.cumsum(probability[kept] / probability[kept].sum(), 0)
        kept = kept[: int((share < options["top_p"]).sum()) + 1]
    if options.get("temperature") == 0:
        kept = [1]
    drawn = {reference_sample.draw_token(logits, 1, 0, p, **options) for p in range(300)}
    assert drawn == set(kept)


# ---- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_given_codes_are_kept_and_seen(mode):
    prior = build(GatedPixelCNN)
    free = draw(prior)
    given = torch.full_like(free, -1)
    given[:, 1, 2:5] = (free[:, 1, 2:5] + 1) % K
    filled = draw(prior, given=given, mode=mode)
    same(filled[:, 1, 2:5], given[:, 1, 2:5])
    same(filled[:, 0], free[:, 0])  # nothing before the first given code changes
    assert not torch.equal(filled[:, 2:], free[:, 2:])
    same(draw(prior, given=free, seed=99, mode=mode), free)


def test_labels_images_and_seeds_matter():
    prior = build(GatedPixelCNN)
    tokens = draw(prior)
    assert not torch.equal(draw(prior, seed=4), tokens)
    assert not torch.equal(draw(prior, labels=torch.tensor([1, 1])), tokens)
    part = {key: value[1:] for key, value in inputs(prior).items()}
    same(sample_codes(prior, 1, HEIGHT, WIDTH, seed=3, first_image=1, **part), tokens[1:])


def test_a_hierarchy_samples_each_level_from_its_prior():
    top = build(GatedPixelCNN, codebook_size=7, condition_codes=0)
    bottom = build(PixelSNAIL, classes=0)
    labels = torch.tensor([0, 1])
    prior = HierarchicalPrior([bottom, top])
    levels = prior.sample(2, 2, 3, labels=labels, seed=5)
    same(levels[1], sample_codes(top, 2, 2, 3, labels=labels, seed=5))
    assert levels[0].shape == (2, 4, 6)
    assert prior.log_prob(levels, labels).isfinite().all()


@native
def test_each_position_is_computed_once_and_memory_does_not_grow_with_the_map():
    program = compile_prior(build(GatedPixelCNN, classes=0, condition_codes=0))
    for height in (4, 16):
        tokens = torch.full((1, height, WIDTH), -1)
        workspace, evaluated = op.run_program(program.words, program.weights, tokens)
        assert evaluated == height * WIDTH
        assert workspace.numel() == op.workspace_size(program.words, 1, 4, WIDTH)


def test_opcheck(backend):
    program = compile_prior(build(GatedPixelCNN, classes=0, condition_codes=0))
    tokens, evaluated = torch.full((1, 2, 3), -1), torch.zeros(1, dtype=torch.int64)
    workspace = torch.zeros(op.workspace_size(program.words, 1, 2, 3))
    arguments = (workspace, tokens, evaluated, None, None, program.words, program.weights, None, None, None)
    # start, stop, task, lookahead, seed, first_image, temperature, top_k, top_p, threads
    settings = (0, 2, op.DRAW, 1, 0, 0, 1.0, 0, 1.0, 1)
    torch.library.opcheck(getattr(torch.ops.vqfast, f"sample_{backend}_").default, (*arguments, *settings))


def test_empty_batch():
    assert sample_codes(build(GatedPixelCNN, classes=0, condition_codes=0), 0, 4, 4).shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=7.0), "top_p"),
        (dict(top_k=-2), "top_k"),
        (dict(batch_size=0), "batch_size"),
        (dict(batch_size=-3), "batch_size"),
        (dict(lookahead=0), "lookahead"),
        (dict(mode="fast"), "mode"),
        (dict(given=torch.zeros(1, 1, 1, dtype=torch.int64)), "given"),
        (dict(given=torch.full((COUNT, HEIGHT, WIDTH), K)), "given"),
    ],
    ids=lambda v: "",
)
@pytest.mark.parametrize("mode", MODES)
def test_errors(mode, options, says):
    with pytest.raises(ValueError, match=says):
        draw(build(GatedPixelCNN), **{"mode": mode, **options})


def test_the_bar_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert torch.equal(draw(build(GatedPixelCNN), progress=True), draw(build(GatedPixelCNN)))


@native
def test_malformed_programs_raise():
    """Every word of a program, changed to something absurd, raises or runs; it never reads or writes out of bounds."""
    prior = build(GatedPixelCNN, classes=0, condition_codes=0)
    program = compile_prior(prior)
    tokens = torch.full((1, 2, 3), -1)
    workspace = torch.empty(op.workspace_size(program.words, 1, 2, 3))
    raised = 0
    for index, value in itertools.product(range(len(program.words)), (-2, 10**6, 2**62)):
        words = program.words.clone()
        words[index] = value
        try:
            op.run_program(words, program.weights, tokens.clone(), workspace=workspace, backend="cpu")
        except (RuntimeError, ValueError) as error:
            assert "sample" in str(error)
            raised += 1
    # A negative dx within the left margin, a dy within the ring and the like are valid programs of another network.
    assert raised > 2 * len(program.words)
    for length in range(0, len(program.words), 7):
        with pytest.raises((RuntimeError, ValueError), match="malformed"):
            op.run_program(
                program.words[:length].clone(), program.weights, tokens.clone(), workspace=workspace, backend="cpu"
            )
    with pytest.raises((RuntimeError, ValueError), match="workspace holds"):
        op.run_program(program.words, program.weights, tokens.clone(), workspace=workspace[:100], backend="cpu")
    with pytest.raises((RuntimeError, ValueError), match="malformed"):
        op.run_program(program.words, program.weights[:1000], tokens.clone(), workspace=workspace, backend="cpu")
