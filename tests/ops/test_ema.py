"""code_stats and ema_update_: exact counts, ordered sums, a state that stays finite (contract 3, 4, 5, 6, 7)."""

import cases
import oracle
import pytest
import torch
from check import ULP, close, op, put, same, same_bits

import vqfast

FAMILY = "ema"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.quick


def indices_for(*shape, k, seed=0):
    return torch.randint(-1, k, shape, generator=cases.generator(seed))


def border_stats(backend, x, indices, k):
    """code_stats at the border: x [B, G, N, D], indices [B, G, N]."""
    sums, counts = op("code_stats", backend)(*put(backend, x, indices), k)
    return sums.cpu(), counts.cpu()


# ---- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", cases.DIMS, ids="D{}".format)
def test_integer_sums_are_exact(backend, dim, dtype):
    x, indices = cases.integers(3, 1, 50, dim, seed=1, dtype=dtype), indices_for(3, 1, 50, k=33, seed=dim)
    sums, counts = border_stats(backend, x, indices, 33)
    expected = oracle.code_stats(x, indices, 33)
    assert sums.dtype == torch.float32 and counts.dtype == torch.int64
    same(sums, expected[0].float()), same(counts, expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_sums_are_within_the_bound_of_float32_addition(backend, groups, dtype):
    x, indices = cases.normal(2, groups, 700, 9, seed=2).to(dtype), indices_for(2, groups, 700, k=7, seed=3)
    sums, counts = border_stats(backend, x, indices, 7)
    expected = oracle.code_stats(x, indices, 7)
    same(counts, expected[1])
    close(sums, expected[0], oracle.sums_bound(x, indices, 7))


@pytest.mark.parametrize("k", [1, 2, 31, 33, 1000])
@pytest.mark.parametrize("n", [0, 1, 2, 97])
def test_row_and_code_counts(backend, n, k):
    x, indices = cases.integers(1, 1, n, 5, seed=4), indices_for(1, 1, n, k=k, seed=5)
    sums, counts = border_stats(backend, x, indices, k)
    expected = oracle.code_stats(x, indices, k)
    same(sums, expected[0].float()), same(counts, expected[1])


def test_nonfinite_rows_are_as_good_as_absent(backend):
    """Bit for bit, also where the rows of one code fill several blocks of the sum."""
    x, indices = cases.normal(1, 1, 3000, 20, seed=40), torch.randint(5, (1, 1, 3000), generator=cases.generator(41))
    bad = torch.tensor([3, 1023, 1024, 2999])
    holes = indices.index_fill(2, bad, -1)
    x[0, 0, bad, bad % 20] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan])
    found, wanted = (op("code_stats", backend)(*put(backend, x, i), 5) for i in (indices, holes))
    same_bits(found[0], wanted[0]), same_bits(found[1], wanted[1])
    assert found[0].isfinite().all() and int(found[1].sum()) == 2996


def test_nonfinite_rows_and_holes_are_left_out(backend):
    x = cases.nonfinite_rows().x[None, None]
    indices = indices_for(1, 1, x.shape[2], k=4, seed=6)
    sums, counts = border_stats(backend, x, indices, 4)
    expected = oracle.code_stats(x, indices, 4)
    assert torch.isfinite(sums).all()
    same(counts, expected[1]), close(sums, expected[0], oracle.sums_bound(x.nan_to_num(0, 0, 0), indices, 4))


@pytest.mark.parametrize("view", tuple(cases.views(torch.zeros(2, 24, 5))))
def test_strides(backend, view):
    x = cases.views(cases.integers(2, 24, 7, seed=7))[view].unsqueeze(1)
    indices = indices_for(24, 1, 2, k=5, seed=8).permute(2, 1, 0)
    sums, counts = border_stats(backend, x, indices, 5)
    expected = oracle.code_stats(x, indices, 5)
    same(sums, expected[0].float()), same(counts, expected[1])


def test_public_function_takes_any_leading_axes(backend):
    x, indices = cases.integers(2, 3, 5, 4, seed=9), indices_for(2, 3, 5, k=6, seed=10)
    got = vqfast.code_stats(*put(backend, x, indices), 6, backend=backend)
    expected = oracle.code_stats(x.reshape(1, 1, -1, 4), indices.reshape(1, 1, -1), 6)
    same(got.sums, expected[0][0].float()), same(got.counts, expected[1][0])


def test_float64_sums_stay_float64():
    x = cases.normal(100, 3, seed=11).double() / 3
    got = vqfast.code_stats(x, torch.zeros(100, dtype=torch.int64), 2)
    assert got.sums.dtype == torch.float64
    close(got.sums[0], x.sum(0), 100 * 2.0**-53 * x.abs().sum(0))


@pytest.mark.parametrize("wrong", [-2, 6, 2**32, -(2**63)], ids=str)
def test_index_out_of_range_raises(backend, wrong):
    indices = torch.tensor([0, 5, wrong, -1])
    x, indices = put(backend, torch.ones(4, 2), indices)
    if x.is_cuda:
        pytest.skip("contract 7: on a GPU out-of-range indices are never read, and raise under validate=True only")
    with pytest.raises(IndexError):
        vqfast.code_stats(x, indices, 6, backend=backend)


@pytest.mark.parametrize("wrong", [-2, 6, 2**32], ids=str)
def test_the_op_itself_refuses_wrong_indices(backend, wrong):
    """As compiled graphs call it: a wrong index is never written to and never passed over in silence."""
    if backend in ("triton", "cuda"):
        pytest.skip("a GPU's op writes nothing out of bounds and does not wait to say so")
    with pytest.raises((IndexError, RuntimeError), match=r"index|indices"):
        border_stats(backend, torch.ones(1, 1, 3, 2), torch.tensor([[[0, wrong, 1]]]), 6)


def test_a_gpu_op_writes_nothing_out_of_bounds(backend):
    """Wrong indices are left out like -1; with two groups, a stray write would land in the other one."""
    if backend not in ("triton", "cuda"):
        pytest.skip("the CPU raises")
    indices = torch.tensor([0, 6, -2, 2**40, -(2**62), 2**32, 1]).expand(1, 2, 7)
    sums, counts = border_stats(backend, torch.ones(1, 2, 7, 3), indices, 6)
    assert counts.tolist() == [[1, 1, 0, 0, 0, 0]] * 2 and sums.sum() == 12


def test_no_gradient_flows(backend):
    x = put(backend, torch.ones(4, 2)).requires_grad_()
    got = vqfast.code_stats(x, put(backend, torch.zeros(4, dtype=torch.int64)), 2, backend=backend)
    assert not got.sums.requires_grad


@pytest.mark.parametrize("skew", ["even", "one_code", "half_in_one"])
def test_sums_have_the_same_bits_for_any_thread_count(backend, skew, set_threads):
    """The hard case is one code that owns most rows: it must be split, and at fixed places."""
    x = cases.normal(1, 1, 20000, 5, seed=12) * torch.exp2(cases.normal(1, 1, 20000, 1, seed=13) * 8)
    indices = indices_for(1, 1, 20000, k=50, seed=14)
    if skew == "one_code":
        indices[:] = 3
    elif skew == "half_in_one":
        indices[..., ::2] = 49
    set_threads(1)
    first = border_stats(backend, x, indices, 50)
    for count in (1, 2, 3, 4, 7):
        set_threads(count)
        again = border_stats(backend, x, indices, 50)
        same_bits(again[0], first[0], f"{count} threads"), same_bits(again[1], first[1])
    close(first[0], oracle.code_stats(x, indices, 50)[0], oracle.sums_bound(x, indices, 50))


@pytest.mark.parametrize("count", [1, 4], ids="{} threads".format)
def test_subnormal_sums_count_although_torch_flushes_them(backend, count, set_threads):
    """Also those of a code whose rows fill several blocks, which are added up by the calling thread."""
    if backend != "cpu" or not torch.set_flush_denormal(False):
        pytest.skip("the other backends compute with torch itself, which does as the user asked")
    x, indices = torch.full((1, 1, 4000, 3), 2.0**-149), torch.zeros(1, 1, 4000, dtype=torch.int64)
    indices[..., :10] = 1
    set_threads(count)
    torch.set_flush_denormal(True)
    try:
        sums, _ = border_stats(backend, x, indices, 2)
    finally:
        torch.set_flush_denormal(False)
    same(sums[0], torch.tensor([[3990.0], [10.0]]).mul(2.0**-149).expand(2, 3))


# ---- update -------------------------------------------------------------------------------------------------------


def fresh_state(k=40, dim=6, seed=20, groups=()):
    codebook = cases.normal(*groups, k, dim, seed=seed)
    return oracle.Ema(codebook, torch.ones(*groups, k), codebook.clone())


def apply(backend, state, sums, counts, **options):
    """Runs the op on a copy of the state and returns that copy."""
    changed = oracle.Ema(*(put(backend, t.clone()) for t in state))
    vqfast.ema_update_(*changed, *put(backend, sums, counts), backend=backend, **options)
    return oracle.Ema(*(t.cpu() for t in changed))


def verify(backend, state, sums, counts, decay, **options):
    got = apply(backend, state, sums, counts, decay=decay, **options)
    expected = oracle.ema_update(state, sums, counts, decay, **options)
    weight = torch.tensor([decay, 1 - decay], dtype=torch.float64)
    # Each of decay, 1 - decay, two products, one sum and the stored value is rounded: 6 roundings of each term.
    size_bound = 6 * ULP * (weight[0] * state.cluster_size.double() + weight[1] * counts)
    sum_bound = 6 * ULP * (weight[0] * state.cluster_sum.double().abs() + weight[1] * sums.double().abs())
    close(got.cluster_size, expected.cluster_size, size_bound, "cluster_size")
    close(got.cluster_sum, expected.cluster_sum, sum_bound, "cluster_sum")
    size = expected.cluster_size[..., None].clamp(min=1e-30)
    bound = sum_bound / size + (8 * ULP) * (expected.cluster_sum / size).abs()
    close(got.codebook, expected.codebook, torch.where(expected.cluster_size[..., None] < 1e-6, 0, bound), "codebook")
    return got


def statistics(k=40, dim=6, seed=21, groups=1, n=500):
    x, indices = cases.normal(1, groups, n, dim, seed=seed), torch.randint(0, k, (1, groups, n), generator=cases.generator(seed))
    sums, counts = oracle.code_stats(x, indices, k)
    return sums.float(), counts


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.999999, 1.0])
def test_update_follows_the_formula(backend, decay):
    sums, counts = statistics()
    verify(backend, fresh_state(), sums[0], counts[0], decay)


@pytest.mark.parametrize("k, dim", [(1, 1), (33, 17), (100, 64), (5, 1000)])
def test_update_of_odd_sizes(backend, k, dim):
    sums, counts = statistics(k, dim)
    verify(backend, fresh_state(k, dim), sums[0], counts[0], 0.9)


def test_update_of_groups(backend):
    sums, counts = statistics(groups=3)
    verify(backend, fresh_state(groups=(3,)), sums, counts, 0.9)


def test_many_steps_stay_with_float64(backend):
    """Error of step t is damped by decay, so it never exceeds one step's bound / (1 - decay)."""
    state = fresh_state()
    exact = state
    for t in range(30):
        sums, counts = statistics(seed=100 + t)
        state = apply(backend, state, sums[0], counts[0], decay=0.8)
        exact = oracle.ema_update(exact, sums[0], counts[0], 0.8)
    close(state.cluster_size, exact.cluster_size, 6 * ULP * 50 / 0.2)
    close(state.codebook, exact.codebook, 20 * ULP * 50 / 0.2)


def test_untouched_codes_keep_their_value(backend):
    """A code that nobody chose fades in size and sum alike: its value moves by rounding only."""
    state = fresh_state()
    sums, counts = torch.zeros(40, 6), torch.zeros(40, dtype=torch.int64)
    sums[3], counts[3] = 2.0, 2
    got = verify(backend, state, sums, counts, 0.5)
    others = torch.arange(40) != 3
    close(got.codebook[others], state.codebook[others], 2 * ULP * state.codebook[others].abs())


def test_code_under_eps_keeps_its_value(backend):
    state = fresh_state()
    state.cluster_size[5], state.cluster_sum[5] = 1e-6, 0.0
    state.cluster_size[6], state.cluster_sum[6] = 0.0, 0.0
    sums, counts = torch.zeros(40, 6), torch.zeros(40, dtype=torch.int64)
    counts[0], sums[0] = 1, 1.0
    got = apply(backend, state, sums, counts, decay=0.9, eps=1e-5)
    same_bits(got.codebook[5:7], state.codebook[5:7])
    assert torch.isfinite(got.codebook).all()


@pytest.mark.parametrize("steps", [3000])
def test_dead_codes_never_become_nonfinite(backend, steps):
    """0.9^3000 underflows: sizes reach 0, and 0 / 0 must not appear."""
    state = oracle.Ema(*(put(backend, t) for t in fresh_state(4, 2)))
    sums, counts = put(backend, torch.tensor([[1.0, 2], [0, 0], [0, 0], [0, 0]]), torch.tensor([1, 0, 0, 0]))
    before = state.codebook.clone()
    for _ in range(steps):
        vqfast.ema_update_(*state, sums, counts, decay=0.9, backend=backend)
    assert all(torch.isfinite(t).all() for t in state)
    # Size and sum fade together until eps; each step rounds each of them once more: 2 ULP per step, 110 steps.
    close(state.codebook[1:], before[1:].cpu(), 110 * 4 * ULP * before[1:].cpu().abs())


def test_nothing_counted_means_no_decay(backend):
    state = fresh_state()
    got = apply(backend, state, torch.zeros(40, 6), torch.zeros(40, dtype=torch.int64), decay=0.5)
    for name, before, after in zip(state._fields, state, got):
        same_bits(after, before, name)


def test_a_sum_that_overflows_changes_nothing_of_its_code(backend):
    """A sum that is not finite would never be finite again; the next step moves the code as if this one had not been."""
    state, (sums, counts) = fresh_state(), statistics()
    sums, counts = sums[0].clone(), counts[0].clamp(min=1)
    sums[7, 2], sums[9] = torch.inf, 3e38
    state.cluster_sum[9] = 3e38
    first = apply(backend, state, sums, counts, decay=0.5)
    others = torch.arange(40) != 7
    for name, before, after in zip(state._fields, state, first):
        same_bits(after[7], before[7], name)
        assert after.isfinite().all() and (after[others] != before[others]).any(), name
    second = apply(backend, first, statistics()[0][0], counts, decay=0.5)
    assert (second.codebook[7] != state.codebook[7]).any() and second.codebook.isfinite().all()


@pytest.mark.parametrize("wrong", ["short", "integers", "counts", "sums"])
def test_wrong_statistics_raise_before_anything_moves(backend, wrong):
    state = oracle.Ema(*(put(backend, t) for t in fresh_state()))
    before = [t.clone() for t in state]
    sums, counts = (put(backend, t[0]) for t in statistics())
    frozen = torch.zeros(20 if wrong == "short" else 40, dtype=torch.int64 if wrong == "integers" else torch.bool)
    counts = counts.float() if wrong == "counts" else counts
    sums = sums.long() if wrong == "sums" else sums
    with pytest.raises((TypeError, ValueError), match="counts|frozen"):
        vqfast.ema_update_(*state, sums, counts, decay=0.9, frozen=put(backend, frozen), backend=backend)
    for old, new in zip(before, state):
        same_bits(new, old)


def test_frozen_codes_keep_every_bit(backend):
    state, frozen = fresh_state(), torch.arange(40) % 3 == 0
    sums, counts = statistics()
    changed = oracle.Ema(*(put(backend, t.clone()) for t in state))
    vqfast.ema_update_(*changed, *put(backend, sums[0], counts[0]), decay=0.9, frozen=put(backend, frozen), backend=backend)
    free = apply(backend, state, sums[0], counts[0], decay=0.9)
    same_bits(changed.codebook[frozen], state.codebook[frozen], "frozen")
    same_bits(changed.codebook[~frozen], free.codebook[~frozen], "free")


def test_update_is_in_place(backend):
    state = oracle.Ema(*(put(backend, t) for t in fresh_state()))
    places, versions = [t.data_ptr() for t in state], [t._version for t in state]
    sums, counts = put(backend, *statistics())
    assert vqfast.ema_update_(*state, sums[0], counts[0], decay=0.9, backend=backend) is None
    assert [t.data_ptr() for t in state] == places
    assert all(t._version > v for t, v in zip(state, versions)), "autograd must see that the state changed"


def test_update_through_the_border_on_float64():
    state = oracle.Ema(*(t.double()[None] for t in fresh_state()))
    sums, counts = statistics()
    expected = oracle.ema_update(state, sums, counts, 0.9)
    op("ema_update_", "reference")(*state, sums.double(), counts, None, 0.9, 1e-5)
    for got, wanted in zip(state, expected):
        close(got, wanted, 1e-14 * (1 + wanted.abs()))


@pytest.mark.parametrize("count", [2**24 + 2, 2**40 + 2**20, 2**62], ids="{:d}".format)
def test_large_counts_keep_their_size(backend, count):
    """A mean over many rows: sum / count, with no counter that stops at 2^24."""
    state = fresh_state(1, 2)
    sums, counts = torch.tensor([[3.0 * count, -count]]), torch.tensor([[count]])[0]
    got = apply(backend, state, sums, counts, decay=0.0)
    close(got.cluster_size, counts, ULP * count), close(got.codebook, torch.tensor([[3.0, -1.0]]), 4 * ULP * 3)


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
def test_decay_out_of_range_raises(backend, decay):
    sums, counts = statistics()
    with pytest.raises(ValueError, match="decay"):
        apply(backend, fresh_state(), sums[0], counts[0], decay=decay)


def test_float64_rows_move_a_float32_codebook():
    """Nobody asks for a backend here: rows in float64 are summed on the reference one, which then moves the codebook too."""
    layer = vqfast.nn.VectorQuantizerEMA(8, 16)
    before = layer.codebook.clone()
    out = layer(cases.normal(2, 9, 8, seed=30).double())
    assert out.quantized.dtype == torch.float64 and layer.codebook.dtype == torch.float32
    assert not torch.equal(layer.codebook, before) and layer.codebook.isfinite().all()
