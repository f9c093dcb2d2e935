"""gather, code_stats, ema_update_ and quantize of the CUDA backend on the executor, in both thread orders."""

import cases
import oracle
import pytest
import torch
from check import METRIC_CODE, METRICS, ULP, close, same, same_bits

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# ---- gather --------------------


@pytest.mark.parametrize("dtype", (*FLOATS, torch.float64), ids=str)
@pytest.mark.parametrize("dim", (1, 3, 8, 33, 64))
def test_gather_copies_bits(executor, order, dim, dtype):
    codebook = cases.normal(3, 20, dim, seed=1).to(dtype)
    codebook[0, 0], codebook[1, 3, 0] = torch.nan, -0.0
    indices = torch.randint(-1, 20, (2, 3, 17), generator=cases.generator(2))
    same_bits(executor.gather(codebook, indices), oracle.gather(codebook, indices))
    turned = codebook.transpose(1, 2).contiguous().transpose(1, 2)
    spread = indices.transpose(0, 2).contiguous().transpose(0, 2)
    same_bits(executor.gather(turned, spread), oracle.gather(codebook, indices))


def test_gather_never_reads_outside(executor):
    codebook = cases.normal(1, 5, 4)
    indices = torch.tensor([[[0, 5, -2, 2**62, -(2**63), 4]]])
    expected = torch.where(((indices >= 0) & (indices < 5))[..., None], codebook[0][indices.clamp(0, 4)], 0.0)
    same(executor.gather(codebook, indices), expected)


# ---- code_stats --------------------


def stats_problem(b, g, n, dim, k, seed, dtype=torch.float32):
    x = cases.normal(b, g, n, dim, seed=seed).to(dtype)
    indices = torch.randint(-1, k, (b, g, n), generator=cases.generator(seed + 1))
    return x, indices


def verify_stats(executor, x, indices, k):
    sums, counts = executor.code_stats(x, indices, k)
    expected_sums, expected_counts = oracle.code_stats(x, indices, k)
    same(counts, expected_counts)
    # Sums in float64, rounded once to float32: half an ulp, and nothing to speak of for the float64 additions.
    close(sums, expected_sums, expected_sums.abs() * ULP * 1.001 + 2.0**-149)
    return sums


@pytest.mark.parametrize("k", (1, 2, 511, 512, 513, 3000))
def test_stats_for_one_and_two_sorting_passes(executor, order, k):
    verify_stats(executor, *stats_problem(2, 2, 1300, 3, k, seed=k), k)


@pytest.mark.parametrize("dim", (1, 31, 33, 128, 129, 300))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_stats_of_all_widths(executor, order, dim, dtype):
    verify_stats(executor, *stats_problem(1, 1, 100, dim, 7, seed=dim, dtype=dtype), 7)


def test_stats_of_three_sorting_passes(executor):
    x, indices = stats_problem(1, 1, 500, 2, 300000, seed=5)
    verify_stats(executor, x, indices, 300000)


def test_stats_when_one_code_owns_half_of_the_rows(executor, order):
    """Its rows fill many chunks of 256, whose sums are added in order."""
    x, indices = stats_problem(1, 1, 5000, 5, 40, seed=7)
    indices[..., ::2] = 11
    first = verify_stats(executor, x, indices, 40)
    same_bits(verify_stats(executor, x, indices, 40), first)


def test_stats_are_the_same_bits_in_both_orders(executor, monkeypatch):
    x, indices = stats_problem(2, 1, 3000, 40, 30, seed=8)
    results = []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("VQFAST_EXECUTOR_ORDER", order)
        results.append(executor.code_stats(x * 10.0 ** torch.arange(-20, 20), indices, 30)[0])
    same_bits(*results)


def test_stats_leave_out_nonfinite_rows_and_wild_indices(executor, order):
    x, indices = stats_problem(2, 3, 300, 33, 9, seed=9)
    x[0, 1, 5, 32], x[1, 2, 7, 0], x[1, 0] = torch.nan, torch.inf, -torch.inf
    verify_stats(executor, x, indices, 9)
    wild = indices.clone()
    wild[0, 0, :4] = torch.tensor([9, 2**40, -2, -(2**50)])
    indices[0, 0, :4] = -1
    same_bits(executor.code_stats(x, wild, 9)[0], executor.code_stats(x, indices, 9)[0])


@pytest.mark.parametrize("view", tuple(cases.views(torch.zeros(2, 24, 5))))
def test_stats_of_any_strides(executor, view):
    x, indices = cases.normal(2, 24, 5, seed=10), torch.randint(0, 6, (2, 1, 24), generator=cases.generator(11))
    same_bits(
        executor.code_stats(cases.views(x)[view][:, None], indices, 6)[0],
        executor.code_stats(x[:, None], indices, 6)[0],
    )


def test_stats_of_no_rows(executor):
    sums, counts = executor.code_stats(torch.empty(1, 2, 0, 3), torch.empty(1, 2, 0, dtype=torch.int64), 4)
    assert sums.shape == (2, 4, 3) and not sums.any() and counts.shape == (2, 4) and not counts.any()


# ---- ema_update_ --------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_ema_update_follows_the_formula(executor, order, frozen):
    g, k, dim, decay, eps = 2, 50, 37, 0.9, 1e-5
    state = oracle.Ema(
        cases.normal(g, k, dim, seed=20), cases.normal(g, k, seed=21).abs(), cases.normal(g, k, dim, seed=22)
    )
    state.cluster_size[0, 3] = 0.0
    sums, counts = cases.normal(g, k, dim, seed=23), torch.randint(0, 3, (g, k), generator=cases.generator(24))
    counts[0, 3], sums[0, 3] = 0, 0.0
    state.cluster_sum[1, 4] = 3e38
    state.cluster_size[1, 4], counts[1, 4] = 0.5, 0  # a mean that overflows float32
    keep = torch.rand(g, k, generator=cases.generator(25)) < 0.3 if frozen else None
    expected = oracle.ema_update(state, sums, counts, decay, eps, keep)
    got = oracle.Ema(*(t.clone() for t in state))
    executor.ema_update_(*got, sums, counts, keep, decay, eps)
    close(got.cluster_size, expected.cluster_size, expected.cluster_size.abs() * ULP * 1.01)
    close(got.cluster_sum, expected.cluster_sum, expected.cluster_sum.abs() * ULP * 1.01)
    same(got.codebook[1, 4], state.codebook[1, 4])
    same(got.codebook[0, 3], state.codebook[0, 3])
    regular = expected.codebook.abs() < 1e38
    # The quotient of two rounded numbers, rounded: 3 roundings.
    close(got.codebook[regular], expected.codebook[regular], expected.codebook[regular].abs() * ULP * 3.01)
    if frozen:
        same(got.codebook[keep], state.codebook[keep])


@pytest.mark.parametrize("empty", [0, 1])
def test_a_group_without_rows_keeps_every_bit(executor, order, empty):
    state = oracle.Ema(cases.normal(2, 1500, 3, seed=20), cases.normal(2, 1500, seed=21).abs(), cases.normal(2, 1500, 3, seed=22))
    sums, counts = cases.normal(2, 1500, 3, seed=23), torch.zeros(2, 1500, dtype=torch.int64)
    counts[1 - empty, 1499], sums[empty] = 1, 0.0
    got = oracle.Ema(*(t.clone() for t in state))
    executor.ema_update_(*got, sums, counts, None, 0.5, 1e-5)
    for before, after in zip(state, got, strict=True):
        same_bits(after[empty], before[empty])
        assert (after[1 - empty] != before[1 - empty]).any()


def test_a_sum_that_overflows_changes_nothing_of_its_code(executor, order):
    state = oracle.Ema(cases.normal(1, 9, 40, seed=20), torch.ones(1, 9), cases.normal(1, 9, 40, seed=22))
    sums, counts = cases.normal(1, 9, 40, seed=23), torch.full((1, 9), 2)
    sums[0, 4, 37] = torch.inf
    got = oracle.Ema(*(t.clone() for t in state))
    executor.ema_update_(*got, sums, counts, None, 0.5, 1e-5)
    for before, after in zip(state, got, strict=True):
        same_bits(after[0, 4], before[0, 4])
        assert after.isfinite().all() and (after[0, 5] != before[0, 5]).any()


# ---- quantize --------------------


def verify_quantize(executor, x, codebook, mask, metric, with_sums=True):
    expected = oracle.step(x, codebook, mask, metric)
    quantized, sq_error, indices, sums, counts, nonfinite = executor.quantize(
        x, codebook, mask, METRIC_CODE[metric], with_sums, None, None, None
    )
    same(indices, expected.indices), same(counts, expected.counts)
    same(quantized, expected.quantized.to(x.dtype))
    assert quantized.stride() == torch.empty_like(x).stride(), "in the layout of x"
    assert nonfinite.item() == expected.nonfinite and sq_error.shape == (2,) and sq_error[0] == sq_error[1]
    used = expected.counts.sum().item() * x.shape[-1]
    total = expected.mse * used
    # float64 additions in another order: at most (terms) 2^-53 of a sum of positive terms, and the oracle's own.
    close(sq_error[0], torch.tensor(total, dtype=torch.float64), 2 * (used + 4) * 2.0**-53 * total)
    if with_sums:
        close(sums, expected.sums, expected.sums.abs() * ULP * 1.001 + 2.0**-149)
    else:
        assert sums.shape == (0,)


@pytest.mark.parametrize("with_sums", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_quantize(executor, order, search, metric, masked, with_sums):
    x, codebook = cases.normal(2, 3, 150, 37, seed=30), cases.normal(3, 60, 37, seed=31)
    x[0, 0, 3, 2], x[1, 2, 9] = torch.nan, torch.inf
    mask = torch.rand(2, 150, generator=cases.generator(32)) < 0.7 if masked else None
    if masked:
        mask[0, 3] = False  # a masked row that is not finite counts nowhere
    verify_quantize(executor, x, codebook, mask, metric, with_sums)


@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("codebook_dtype", FLOATS, ids=str)
def test_quantize_mixed_dtypes(executor, x_dtype, codebook_dtype):
    x, codebook = cases.normal(1, 1, 70, 19, seed=33).to(x_dtype), cases.normal(1, 30, 19, seed=34).to(codebook_dtype)
    verify_quantize(executor, x, codebook, None, "l2")


@pytest.mark.parametrize("view", tuple(cases.views(torch.zeros(2, 24, 5))))
def test_quantize_any_strides(executor, order, view):
    x, codebook = cases.clustered(48, 30, 35, seed=35)
    mask = torch.zeros(24, 2, dtype=torch.bool).T
    mask[0, 3:20] = True
    verify_quantize(executor, cases.views(x.view(2, 24, 35))[view][:, None], codebook[None], mask, "l2")


@pytest.mark.parametrize("case", ["no_rows", "all_masked", "all_nonfinite", "no_finite_code"])
def test_quantize_of_nothing(executor, search, case):
    x, codebook, mask = cases.normal(1, 1, 0 if case == "no_rows" else 9, 4), cases.normal(1, 5, 4), None
    if case == "all_masked":
        mask = torch.zeros(1, 9, dtype=torch.bool)
    if case == "all_nonfinite":
        x[..., 1] = torch.nan
    if case == "no_finite_code":
        codebook[..., 0] = torch.inf
    quantized, sq_error, indices, sums, counts, nonfinite = executor.quantize(
        x, codebook, mask, 0, True, None, None, None
    )
    assert not sq_error.any() and not counts.any() and not sums.any()
    assert nonfinite.item() == (0 if case in ("no_rows", "all_masked") else 9)
    assert (indices == (-1 if case == "all_masked" else 0)).all()
    assert quantized.isnan().all() if "finite" in case else not quantized.any()
