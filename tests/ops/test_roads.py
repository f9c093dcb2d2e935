"""Every road of the CPU search gives the contract's code, whatever the data and whichever road `nearest` would take (contract 1, 3, 4)."""

from functools import lru_cache

import cases
import oracle
import pytest
import torch
from check import METRICS, same

import vqfast
from vqfast import _backends

pytestmark = pytest.mark.quick
ROADS = ("dense", "bytes", "panels", "few")
HARD = (cases.duplicates_across_tiles, cases.ulp_neighbours, cases.lattice, cases.offset, cases.huge_code_among_normal,
        cases.zeros_among_normal, cases.nonfinite_rows_and_codes, cases.denormals_and_ones)  # fmt: skip


@pytest.fixture(autouse=True)
def native():
    reason = "; ".join(_backends.reasons("nearest", "cpu", torch.empty(0)))
    if reason:
        pytest.skip(f"native: {reason}")


@lru_cache(maxsize=None)
def expected_case(build, metric):
    return oracle.nearest(*build(), metric)


def verify(x, codebook, metric, road, expected=None):
    expected = oracle.nearest(x, codebook, metric) if expected is None else expected
    found = _backends.search_counts(x.contiguous(), codebook.contiguous(), metric, road)
    same(found.indices, expected.indices, f"indices, {metric}, {road}")
    same(found.distance, expected.distance, f"distance, {metric}, {road}")
    return found


def part(expected, rows):
    return type(expected)(*(field[rows] for field in expected))


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("build", cases.NEAREST, ids=lambda f: f.__name__)
def test_adversarial_data_on_cpu(build, metric, road):
    verify(*build(), metric, road, expected_case(build, metric))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 13], ids="N{}".format)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("build", HARD, ids=lambda f: f.__name__)
def test_handfuls_of_hard_rows_on_cpu(build, metric, rows):
    """A call of few rows has kernels of its own for one to four rows, and tiles of several widths."""
    x, codebook = build()
    expected = expected_case(build, metric)
    for begin in range(0, len(x), max(rows, len(x) // 6)):
        some = slice(begin, begin + rows)
        verify(x[some], codebook, metric, "few", part(expected, some))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 12, 37], ids="N{}".format)
@pytest.mark.parametrize("dim", cases.DIMS, ids="D{}".format)
@pytest.mark.parametrize("metric", METRICS)
def test_dims_on_the_road_of_few_rows_on_cpu(metric, dim, rows):
    found = verify(*cases.clustered(rows, 97, dim, seed=dim), metric, "few")
    assert found.road == "few" or (dim == 1 and metric == "cosine"), "on a line all codes of one sign are equal in direction"


@pytest.mark.parametrize("k", cases.CODEBOOK_SIZES, ids="K{}".format)
@pytest.mark.parametrize("rows", [2, 20], ids="N{}".format)
def test_codebook_sizes_on_the_road_of_few_rows_on_cpu(rows, k):
    verify(*cases.clustered(rows, k, 40, seed=k), "l2", "few")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_share_the_codes_of_few_rows_on_cpu(metric, threads, set_threads):
    """Enough work for several tasks, each with a part of the codes; the row's best is the best of theirs."""
    set_threads(threads)
    x, codebook = cases.clustered(70, 2000, 64, seed=90)
    codebook[1::2] = codebook[0::2]  # every code twice
    assert verify(x, codebook, metric, "few").road == "few"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_few_rows_on_cpu(metric, threads, set_threads):
    """Where each gets 64 and work enough: blocks of whole tiles, the last of them narrower, rows without a code in any."""
    set_threads(threads)
    x, codebook = cases.clustered(331, 70, 300, seed=12)
    x[5], x[170], x[330] = 0.0, float("nan"), float("inf")
    assert verify(x, codebook, metric, "few").road == "few"
    x[300] = 1e20  # out of reach: another road, whatever the blocks before it found
    assert (verify(x, codebook, metric, "few").road == "few") == (metric != "l2")


@pytest.mark.parametrize("rows", [3, 40], ids="N{}".format)
@pytest.mark.parametrize("metric", METRICS)
def test_large_and_broken_codes_between_good_ones_on_cpu(metric, rows):
    """Codes that the float32 bounds cannot hold stand aside on the road of few rows; it stays the road."""
    x, codebook = cases.clustered(rows, 300, 33, seed=91)
    codebook[5], codebook[64], codebook[97] = torch.nan, torch.inf, -torch.inf
    codebook[33], codebook[130] = 1e30, -3e38
    codebook[140, 3] = 2.0**-140
    assert verify(x, codebook, metric, "few").road == "few"


@pytest.mark.parametrize("rows", [3, 40], ids="N{}".format)
@pytest.mark.parametrize("scale", [2.0**-146, 1e-30, 1e-12, 1e-4, 1e4, 1e12, 1e30], ids="{:.0e}".format)
@pytest.mark.parametrize("metric", METRICS)
def test_any_scale_of_few_rows_on_cpu(metric, scale, rows):
    x, codebook = cases.clustered(rows, 100, 24, seed=92)
    verify((x * 100).round() / 100 * scale, codebook * scale, metric, "few")


@pytest.mark.parametrize("metric", METRICS)
def test_offsets_leave_few_candidates_on_cpu(metric):
    """Bounds are taken around a centre, so what sits around 1,000 is told apart as well as what sits around 0 (l2, dot)."""
    x, codebook = cases.clustered(64, 512, 32, seed=93, spread=1.0)
    found = verify(x + 1000.0, codebook + 1000.0, metric, "few")
    assert metric == "cosine" or found.road == "few"


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [1, 100], ids="N{}".format)
def test_equal_codes_are_decided_once_on_cpu(metric, share, rows):
    """Rows sit at a code that is there hundreds of times, first or last in the codebook: the formula sees one of them."""
    x, codebook = cases.clustered(rows, 1024, 32, seed=94)
    codebook[: int(share * 1024)] = codebook[0].clone()
    for codes in (codebook, codebook.flip(0)):
        found = verify(codebook[:1] + 0.01 * x, codes, metric, "few")
        assert found.candidates <= 8 * rows


def test_sizes_choose_the_road_on_cpu():
    """Few rows of a large codebook prepare nothing; many do."""
    codebook = cases.normal(1024, 64, seed=95)
    assert [_backends.search_counts(cases.normal(n, 64, seed=96), codebook).road for n in (1, 16, 75)] == ["few"] * 3
    assert _backends.search_counts(cases.normal(8192, 64, seed=97), codebook).road != "few"


@pytest.mark.parametrize("name", ["nearest", "vector_quantize", "residual_quantize"])
def test_public_functions_agree_with_many_rows_on_cpu(name):
    """One row at a time takes the road of few rows, all at once another; codes and values are the same."""
    x, codebook = cases.clustered(1500, 512, 16, seed=98)
    codes = torch.stack([codebook, 0.3 * codebook]) if name == "residual_quantize" else codebook
    call = getattr(vqfast, name)
    whole = call(x, codes, backend="cpu")
    for at in (0, 7, 100, 1499):
        alone = call(x[at : at + 1], codes, backend="cpu")
        same(alone.indices[0], whole.indices[at])


@pytest.mark.parametrize("offset", [0.0, 300.0], ids="offset{:g}".format)
@pytest.mark.parametrize("dim", [127, 128, 300, 1001], ids="D{}".format)
@pytest.mark.parametrize("metric", METRICS)
def test_wide_rows_on_the_pruned_road_on_cpu(metric, dim, offset):
    """From 128 dimensions on a point has more coordinates; a third of the codes have two neighbours, one ulp away in each coordinate."""
    spread = torch.logspace(0, -2, 20)
    turn = cases.normal(20, dim, seed=dim)
    codebook = (cases.normal(700, 20, seed=90) * spread) @ turn + offset
    codebook = torch.cat([codebook, codebook[::3].nextafter(codebook[::3] + 1), codebook[::3].nextafter(codebook[::3] - 1)])
    x = torch.cat([(cases.normal(500, 20, seed=91) * spread) @ turn + offset, codebook[::5]])
    x[17, 3], x[40] = torch.nan, 1e30
    found = verify(x, codebook, metric, "panels")
    assert found.road == "panels"
    if metric == "l2" and not offset:
        assert found.evaluations < 0.2 * len(x) * len(codebook)


@pytest.mark.parametrize("factor", [3.0, 30.0, 1e4], ids="{:g}".format)
@pytest.mark.parametrize("dim", [16, 64, 200], ids="D{}".format)
@pytest.mark.parametrize("metric", METRICS)
def test_points_outside_of_the_grid_on_cpu(metric, dim, factor):
    """A grid made for ordinary codes: some rows and codes lie far outside, in pairs with neighbours one ulp away, and on one ray."""
    spread = torch.logspace(0, -1.5, 12)
    turn = cases.normal(12, dim, seed=dim)
    codebook, x = ((cases.normal(n, 12, seed=n) * spread) @ turn for n in (1030, 400))
    at = torch.arange(3, 1030, 32)  # between the codes that the grid is made from
    codebook[at] *= factor
    codebook[at + 1] = codebook[at].nextafter(codebook[at] + 1)
    codebook[at[:8]] = codebook[at[0]] * torch.linspace(1, 2, 8)[:, None]
    x = torch.cat([x, codebook[at] * 1.0001, codebook[at + 1], factor * x[:40], codebook[at[0]] * torch.linspace(0, 3, 50)[:, None]])
    assert verify(x, codebook, metric, "panels").road == "panels"


def in_bytes() -> bool:
    return _backends.cpu_level() == "avx512vnni"


@pytest.mark.parametrize("dim", [16, 17, 31, 33, 64, 65, 200, 513], ids="D{}".format)
@pytest.mark.parametrize("metric", METRICS)
def test_codes_that_share_their_bytes_on_cpu(metric, dim):
    """Codes differ by less than a step of their bytes, and rows lie along these differences: only the allowances keep them apart."""
    generator = cases.generator(dim)
    shared = torch.randint(-120, 121, (3, dim), generator=generator) / 127.0
    shared[:, 0] = 1.0
    below = (torch.rand(50, 3, dim, generator=generator) - 0.5) / 127.0
    below[:, :, 0] = 0
    codebook = torch.cat([(shared + below).flatten(0, 1), -(shared + below).flatten(0, 1)])
    x = torch.cat([codebook[::2] + 40 * below.flatten(0, 1).repeat(2, 1)[::2], shared.repeat(40, 1)])
    found = verify(x, codebook, metric, "bytes")
    assert found.road == ("bytes" if in_bytes() else "dense")


@pytest.mark.parametrize("k", [2, 31, 32, 33, 511, 512, 513, 1100], ids="K{}".format)
@pytest.mark.parametrize("rows", [1, 11, 12, 13, 300], ids="N{}".format)
def test_sizes_on_the_road_of_bytes_on_cpu(rows, k):
    found = verify(*cases.clustered(rows, k, 20, seed=k + rows), "l2", "bytes")
    assert found.road == ("bytes" if in_bytes() else "dense")


@pytest.mark.parametrize("factor", [4.0, 30.0, 200.0, 1e10], ids="{:g}".format)
@pytest.mark.parametrize("metric", METRICS)
def test_codes_of_many_sizes_in_bytes_on_cpu(metric, factor):
    """A few codes far larger than the rest cost the others no resolution, or the road is not taken."""
    x, codebook = cases.normal(300, 32, seed=95), cases.normal(400, 32, seed=96)
    codebook[::50] *= factor
    x[7], x[100, 3], x[5] = torch.nan, torch.inf, 1e25
    found = verify(x, codebook, metric, "bytes")
    if in_bytes() and factor < 50:
        assert found.road == "bytes" and found.candidates < 20 * len(x)


def test_isotropic_rows_take_bytes_and_settle_few_codes_on_cpu():
    x, codebook = cases.normal(3000, 64, seed=97), cases.normal(2048, 64, seed=98)
    found = verify(x, codebook, "l2", "auto")
    if in_bytes():
        assert found.road == "bytes" and found.candidates < 4 * len(x)


@pytest.mark.parametrize("dim", [16, 64, 514], ids="D{}".format)
@pytest.mark.parametrize("metric", METRICS)
def test_rows_whose_bytes_cannot_tell_codes_apart_on_cpu(metric, dim):
    """Codes come in pairs with neighbouring coordinates swapped; a row's bytes are the same under the swap, the row is not."""
    generator = cases.generator(99)
    one = torch.randint(-127, 128, (150, dim), generator=generator) / 127.0
    swapped = one.view(150, -1, 2).flip(-1).flatten(1)
    x = (torch.randint(-120, 121, (300, dim // 2), generator=generator) / 127.0).repeat_interleave(2, 1)
    x = x + 0.9 * (torch.rand(300, dim, generator=generator) - 0.5) / 127.0
    x[:, :2] = 1.0
    found = verify(x, torch.cat([one, swapped, -one, -swapped]), metric, "bytes")
    assert found.road == ("bytes" if in_bytes() else "dense")
