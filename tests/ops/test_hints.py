"""Hints (order, basis, guess) may cost time, never a code: garbage in each of them, alone and together (contract 1)."""

from functools import lru_cache

import cases
import oracle
import pytest
import torch
from check import METRIC_CODE, METRICS, op, put, same, same_bits

from vqfast import _backends

pytestmark = pytest.mark.quick
GROUPS, CODES, ROWS, DIM = 2, 700, 150, 24
BIG = 2**62


def plane(rows, seed, dim=DIM, intrinsic=4):
    """Low intrinsic dimension plus a little noise: the data on which screens and panels pay."""
    mix = cases.normal(intrinsic, dim, seed=900)
    return cases.normal(rows, intrinsic, seed=seed) @ mix + 0.05 * cases.normal(rows, dim, seed=seed + 1)


@lru_cache(maxsize=None)
def problem():
    """x [1, G, N, D] and codes with duplicates, near-duplicates, a NaN code, a huge one, NaN and huge rows."""
    codebook = torch.stack([plane(CODES, 10), plane(CODES, 20)])
    codebook[:, 400:500] = codebook[:, 100:200]
    codebook[:, 650:690] = torch.nextafter(codebook[:, 10:50], torch.tensor(torch.inf))
    codebook[0, 5], codebook[1, 699] = torch.nan, 1e30
    x = torch.stack([plane(ROWS, 30), codebook[1, 95:245].nan_to_num(0) + 0.01 * plane(ROWS, 40)])[None]
    x[0, 0, 3], x[0, 1, 7, 2] = torch.nan, 1e25
    return x, codebook


@lru_cache(maxsize=None)
def expected(metric):
    return oracle.nearest(*problem(), metric)


def principal(p):
    x, codebook = problem()
    centred = codebook.nan_to_num(0).clamp(-10, 10)
    centred = centred - centred.mean(1, keepdim=True)
    return torch.linalg.svd(centred, full_matrices=False).Vh[:, :p].contiguous()


def permutation(seed):
    return torch.stack([torch.randperm(CODES, generator=cases.generator(seed + g)) for g in range(GROUPS)])


def indices_filled(value, *shape):
    return torch.full(shape, value, dtype=torch.int64)


def near_miss():
    """A permutation but for one repeated entry in the last group: the check must be per group, and complete."""
    order = permutation(5)
    order[1, -1] = order[1, 0]
    return order


ORDERS = {
    "identity": lambda: torch.arange(CODES).repeat(GROUPS, 1),
    "reversed": lambda: torch.arange(CODES).flip(0).repeat(GROUPS, 1),
    "random": lambda: permutation(1),
    "strided": lambda: permutation(2).T.contiguous().T,
    "one_repeated": near_miss,
    "all_zero": lambda: indices_filled(0, GROUPS, CODES),
    "shifted_by_one": lambda: torch.arange(1, CODES + 1).repeat(GROUPS, 1),
    "negative": lambda: -permutation(3) - 1,
    "enormous": lambda: permutation(4) + BIG,
    "wraps_in_32_bits": lambda: permutation(4) + 2**32,
    "lowest": lambda: indices_filled(-(2**63), GROUPS, CODES),
}
BASES = {
    "principal_1": lambda: principal(1),
    "principal_4": lambda: principal(4),
    "principal_all": lambda: principal(DIM),
    "orthonormal": lambda: torch.linalg.qr(cases.normal(GROUPS, DIM, 8, seed=50)).Q.mT,
    "orthonormal_strided": lambda: torch.linalg.qr(cases.normal(GROUPS, DIM, 8, seed=51)).Q.mT[:, ::2],
    "slightly_long": lambda: principal(4) * 1.01,
    "slightly_oblique": lambda: principal(4) + 1e-3 * cases.normal(GROUPS, 4, DIM, seed=52),
    "twice_the_same": lambda: principal(1).repeat(1, 2, 1),
    "random": lambda: cases.normal(GROUPS, 5, DIM, seed=53),
    "more_than_d": lambda: cases.normal(GROUPS, DIM + 3, DIM, seed=54),
    "empty": lambda: torch.zeros(GROUPS, 0, DIM),
    "zero": lambda: torch.zeros(GROUPS, 4, DIM),
    "nan": lambda: torch.full((GROUPS, 4, DIM), torch.nan),
    "one_nan": lambda: principal(4).index_fill(2, torch.tensor([DIM - 1]), torch.nan),
    "inf": lambda: torch.full((GROUPS, 4, DIM), torch.inf),
    "huge": lambda: principal(4) * 1e30,
    "tiny": lambda: principal(4) * 1e-30,
}
GUESSES = {
    "right": lambda: expected("l2").indices,
    "all_zero": lambda: indices_filled(0, 1, GROUPS, ROWS),
    "last": lambda: indices_filled(CODES - 1, 1, GROUPS, ROWS),
    "random": lambda: torch.randint(0, CODES, (1, GROUPS, ROWS), generator=cases.generator(6)),
    "a_nan_code": lambda: indices_filled(5, 1, GROUPS, ROWS),
    "minus_one": lambda: indices_filled(-1, 1, GROUPS, ROWS),
    "k": lambda: indices_filled(CODES, 1, GROUPS, ROWS),
    "enormous": lambda: indices_filled(BIG, 1, GROUPS, ROWS),
    "wraps_in_32_bits": lambda: indices_filled(2**32 + 3, 1, GROUPS, ROWS),
    "lowest": lambda: indices_filled(-(2**63), 1, GROUPS, ROWS),
    "expanded": lambda: torch.tensor(17).expand(1, GROUPS, ROWS),
}


def verify(backend, order=None, basis=None, guess=None, metric="l2"):
    found = op("nearest", backend)(*put(backend, *problem()), METRIC_CODE[metric], *put(backend, order, basis, guess))
    same(found[1], expected(metric).indices, "indices"), same(found[0], expected(metric).distance, "distance")


@pytest.mark.parametrize("name", ORDERS)
def test_order(backend, name):
    verify(backend, order=ORDERS[name]())
    verify(backend, order=ORDERS[name](), basis=principal(4))


@pytest.mark.parametrize("name", BASES)
def test_basis(backend, name):
    verify(backend, basis=BASES[name]())
    verify(backend, order=permutation(7), basis=BASES[name]())


@pytest.mark.parametrize("name", GUESSES)
def test_guess(backend, name):
    verify(backend, guess=GUESSES[name]())
    verify(backend, order=permutation(8), basis=principal(4), guess=GUESSES[name]())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(6))
def test_all_three(backend, seed, metric):
    pick = [list(table.values())[seed * 7 % len(table)]() for table in (ORDERS, BASES, GUESSES)]
    verify(backend, *pick, metric)


def test_quantize_gives_the_same_bits_with_and_without_hints(backend):
    x, codebook = problem()
    mask = torch.arange(ROWS)[None] % 5 > 0
    inputs = (*put(backend, x, codebook, mask), 0, True)
    plain = op("quantize", backend)(*inputs, None, None, None)
    for order, basis, guess in ((permutation(9), principal(4), expected("l2").indices),
                                (ORDERS["one_repeated"](), BASES["nan"](), GUESSES["enormous"]())):  # fmt: skip
        hinted = op("quantize", backend)(*inputs, *put(backend, order, basis, guess))
        for at, (again, before) in enumerate(zip(hinted, plain)):
            same_bits(again, before, f"output {at}")


def test_hints_on_larger_codebooks_keep_the_code(backend):
    """Sizes at which a pruned search may take another road than at a few hundred codes."""
    x, codebook = plane(60, 60, dim=32)[None, None], plane(6000, 70, dim=32)[None]
    codebook[0, 3000:] = codebook[0, :3000]  # every answer has a twin
    wanted = oracle.nearest(x, codebook)
    basis = torch.linalg.svd(codebook[0] - codebook[0].mean(0), full_matrices=False).Vh[None, :6].contiguous()
    order = torch.randperm(6000, generator=cases.generator(71))[None]
    for hints in ((None, None, None), (order, basis, wanted.indices), (order, basis, wanted.indices + 3000)):
        found = op("nearest", backend)(*put(backend, x, codebook), 0, *put(backend, *hints))
        same(found[1], wanted.indices), same(found[0], wanted.distance)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_a_guess_may_name_a_code_without_a_direction(metric):
    """A zero code (cosine) and one far longer than all others (dot) stand outside the search's own order of codes."""
    mix = cases.normal(3, 16, seed=950)
    codebook = cases.normal(4096, 3, seed=951) @ mix - 6 * mix[0]  # similarities well below zero
    x = 0.2 * cases.normal(4096, 3, seed=952) @ mix + 6 * mix[0] + 20 * mix[1]
    codebook[7] = 0 if metric == "cosine" else 1e6 * torch.nn.functional.normalize(cases.normal(1, 16, seed=953)[0], dim=0)
    arguments = (x[None, None], codebook[None], METRIC_CODE[metric], None, None)
    nearest = op("nearest", "cpu")
    without = nearest(*arguments, None)
    same(nearest(*arguments, torch.full((1, 1, 4096), 7))[1], without[1])
    sample = slice(None, None, 64)
    same(without[1][0, 0, sample], oracle.nearest(x[sample], codebook, metric).indices)


MANY, PRUNED_CODES = 4096, 2048  # sizes that take the pruned road


@lru_cache(maxsize=None)
def pruned():
    """Rows and codes near a plane, some codes twice, one far out."""
    x, codebook = plane(MANY, 80), plane(PRUNED_CODES, 82)
    codebook[1000:1100] = codebook[:100]
    codebook[77] = 1e30
    assert _backends.search_counts(x, codebook).road == "panels"
    return x[None, None], codebook[None]


def bases_for_panels():
    codebook = pruned()[1]
    codes = codebook[0].clamp(-10, 10)
    axes = torch.linalg.svd(codes - codes.mean(0), full_matrices=False).Vh[None]
    nine = axes[:, :9]
    return {
        "principal_9": nine,
        "all": axes,
        "the_least": axes.flip(1)[:, :9],
        "slightly_long": nine * 1.01,
        "oblique": nine + 1e-3 * cases.normal(1, 9, DIM, seed=83),
        "random": cases.normal(1, 9, DIM, seed=84),
        "three_times_three": nine[:, :3].repeat(1, 3, 1),
        "five_are_zero": torch.cat([nine[:, :4], torch.zeros(1, 5, DIM)], 1),
        "one_nan": nine.index_fill(2, torch.tensor([3]), torch.nan),
        "huge": nine * 1e30,
        "zero": torch.zeros(1, 9, DIM),
    }


def test_hints_on_the_cpus_pruned_road():
    x, codebook = pruned()
    nearest = op("nearest", "cpu")
    plain = nearest(x, codebook, 0, None, None, None)
    sample = slice(None, None, 32)
    wanted = oracle.nearest(x[:, :, sample], codebook)
    same(plain[1][:, :, sample], wanted.indices), same(plain[0][:, :, sample], wanted.distance)
    guesses = [None, plain[1], torch.full_like(plain[1], 77), plain[1] + 1000, torch.zeros_like(plain[1])]
    orders = list(orders_for_panels().values())
    for at, (name, basis) in enumerate(bases_for_panels().items()):
        for guess in (None, guesses[at % len(guesses)]):
            found = nearest(x, codebook, 0, orders[at % len(orders)] if at % 2 else None, basis.contiguous(), guess)
            same(found[1], plain[1], name), same(found[0], plain[0], name)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [127, 128, 200])
def test_bases_of_wide_rows_on_the_cpus_pruned_road(dim, metric):
    """From 128 dimensions on the search has 11 directions; dot has one dimension more than the caller."""
    turn = cases.normal(14, dim, seed=86)
    spread = torch.logspace(0, -1, 14)
    codebook, x = (cases.normal(1, 1000, 14, seed=87) * spread) @ turn, (cases.normal(1, 1, 1100, 14, seed=88) * spread) @ turn
    axes = torch.linalg.svd(codebook[0], full_matrices=False).Vh[None]
    principal = axes[:, :11]
    others = [axes[:, :9], axes[:, 3:14], cases.normal(1, 11, dim, seed=89), principal * 1.01, principal * torch.nan]
    nearest, code = op("nearest", "cpu"), METRIC_CODE[metric]
    wanted = oracle.nearest(x, codebook, metric)
    assert _backends.search_counts(x[0, 0], codebook[0], metric).road == "panels"
    for basis in (None, principal, *others):
        found = nearest(x, codebook, code, None, basis if basis is None else basis.contiguous(), None)
        same(found[1], wanted.indices), same(found[0], wanted.distance)


def orders_for_panels():
    """What an order may have come to since it was found; the last ones are no permutations."""
    order = op("search_hints", "cpu")(pruned()[1], 0)[0]
    swapped = order.clone()
    swapped[0, ::7] = order[0, ::7].flip(0)  # every panel holds codes of others
    repeated = order.clone()
    repeated[0, -1] = repeated[0, 0]
    return {
        "fresh": order,
        "reversed": order.flip(1),
        "shifted": order.roll(-5, 1),
        "swapped": swapped,
        "random": torch.randperm(PRUNED_CODES, generator=cases.generator(85))[None],
        "repeated": repeated,
        "out_of_range": order + 1,
        "enormous": order + BIG,
        "wraps_in_32_bits": order + 2**32,
    }


@pytest.mark.parametrize("metric", METRICS)
def test_an_order_on_the_cpus_pruned_road(metric):
    """Each metric searches vectors of its own; dot's have one coordinate more than the basis of the caller."""
    x, codebook = pruned()
    nearest, code = op("nearest", "cpu"), METRIC_CODE[metric]
    plain = nearest(x, codebook, code, None, None, None)
    basis = op("search_hints", "cpu")(codebook, code)[1]
    for name, order in orders_for_panels().items():
        for directions in (None, basis):
            found = nearest(x, codebook, code, order, directions, None)
            same(found[1], plain[1], name), same(found[0], plain[0], name)


@pytest.mark.parametrize("name", [name for name in GUESSES if name not in ("right", "expanded")])
def test_guesses_on_the_cpus_pruned_road(name):
    x, codebook = pruned()
    nearest = op("nearest", "cpu")
    plain = nearest(x, codebook, 0, None, None, None)
    guess = GUESSES[name]().flatten().repeat(MANY)[:MANY][None, None].contiguous()
    for order in (None, orders_for_panels()["swapped"]):
        found = nearest(x, codebook, 0, order, None, guess)
        same(found[1], plain[1], name), same(found[0], plain[0], name)


def test_an_order_is_used_on_cpu_and_a_bad_one_let_go():
    """The counts show it: a fresh order visits about what the search's own does, a random one nearly every panel."""
    x, codebook = (t.flatten(0, -2) for t in pruned())
    orders = {name: order[0].contiguous() for name, order in orders_for_panels().items()}
    plain = _backends.search_counts(x, codebook)
    fresh = _backends.search_counts(x, codebook, road="panels", order=orders["fresh"])
    random = _backends.search_counts(x, codebook, road="panels", order=orders["random"])
    assert fresh.panels < 1.2 * plain.panels and random.panels > 3 * plain.panels
    for name in ("repeated", "enormous"):
        assert _backends.search_counts(x, codebook, road="panels", order=orders[name]).panels == plain.panels
    # Left to itself, the search sees that the order is to blame, and finds its own.
    free = _backends.search_counts(x, codebook, order=orders["random"])
    assert (free.road, free.panels) == ("panels", plain.panels)


# ---- search_hints ------------------------------------------------------------------------------------------------------------


def hint_codebooks():
    generator = cases.generator(90)
    flat = plane(700, 91)
    flat[5], flat[6, 3], flat[7], flat[300:400] = torch.nan, torch.inf, 1e30, flat[:100].clone()
    yield torch.stack([flat, plane(700, 92)])
    yield cases.normal(3, 1, 5, seed=93)
    yield torch.zeros(1, 40, 6)
    yield torch.full((1, 9, 4), torch.nan)
    yield cases.normal(2, 33, 1, seed=94)
    yield cases.normal(1, 500, 3, seed=95) * 1e30
    yield cases.normal(1, 64, 2500, seed=96)  # more dimensions than the pruned road takes
    yield torch.randn(1, 2000, 16, generator=generator).bfloat16()
    yield plane(600, 97)[None].mT.contiguous().mT


@pytest.mark.family("hints", backends=("reference", "cpu"))
@pytest.mark.parametrize("metric", METRICS)
def test_search_hints_are_an_order_and_directions(backend, metric):
    for codebook in hint_codebooks():
        groups, codes, dim = codebook.shape
        order, basis = op("search_hints", backend)(put(backend, codebook), METRIC_CODE[metric])
        assert order.dtype == torch.int64 and torch.equal(order.sort(-1).values.cpu(), torch.arange(codes).repeat(groups, 1))
        assert basis.dtype == torch.float32 and basis.shape == (groups, min(dim, 3 if dim < 4 else 9 if dim < 128 else 11), dim)
        product = (basis @ basis.mT).cpu()
        assert float(product.diagonal(dim1=1, dim2=2).max()) < 1.001
        off = product - torch.eye(product.shape[1]) * (product.diagonal(dim1=1, dim2=2) > 0.5)[:, None]
        # The CPU leaves directions out that no code has, and for dot one that the caller's vectors lack.
        assert metric == "dot" or float(off.abs().max()) < 1e-3, (codebook.shape, product)


def test_search_hints_of_the_cpu_tell_neighbours_and_directions():
    """Codes that stand together lie together, and the directions hold nearly all of the variance."""
    _, codebook = pruned()
    order, basis = (hint[0] for hint in op("search_hints", "cpu")(codebook, 0))
    place = codebook[0].clamp(-10, 10)[order][:1900].reshape(-1, 25, DIM)
    scattered = codebook[0].clamp(-10, 10)[:1900].reshape(-1, 25, DIM)
    spread = [p.var(1).sum(-1).mean() for p in (place, scattered)]
    assert spread[0] < 0.3 * spread[1], spread
    centred = codebook[0].clamp(-10, 10) - codebook[0].clamp(-10, 10).mean(0)
    assert (centred @ basis.T).square().sum() > 0.98 * centred.square().sum()
