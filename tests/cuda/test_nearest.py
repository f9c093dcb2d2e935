"""nearest_cuda on the executor: the contract's codes and distances, bit for bit, in both thread orders."""

import ctypes

import cases
import oracle
import pytest
import torch
from check import METRIC_CODE, METRICS, same

LOW_PRECISION = (torch.float16, torch.bfloat16)


@pytest.fixture(params=["float32 screen", "Hopper screen"])
def screen(request, monkeypatch):
    """Both screens settle their open rows in the same way and must find the same codes."""
    monkeypatch.setenv("VQFAST_EXECUTOR_HOPPER", "1" if request.param == "Hopper screen" else "0")
    return request.param


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setenv("VQFAST_EXECUTOR_HOPPER", "1")


def verify(executor, x, codebook, metric="l2"):
    """x [..., N, D] of any leading axes with codebook [K, D], or [..., G, N, D] with [G, K, D]."""
    expected = oracle.nearest(x, codebook, metric)
    groups = codebook[None] if codebook.dim() == 2 else codebook
    if x.dim() == 4:
        rows = x
    else:
        rows = x.reshape(1, 1, -1, x.shape[-1]) if x.dim() < 3 else x[:, None]
    distance, indices = executor.nearest(rows, groups, METRIC_CODE[metric], None, None, None)
    assert indices.dtype == torch.int64 and distance.dtype == torch.float32
    same(indices.reshape(expected.indices.shape), expected.indices, f"indices, {metric}")
    same(distance.reshape(expected.distance.shape), expected.distance, f"distance, {metric}")


def open_rows(executor, x, codebook, metric, run="vqfast_open_rows"):
    run = getattr(executor.probe, run)
    run.restype, run.argtypes = (
        ctypes.c_long,
        [ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p] + [ctypes.c_long] * 2 + [ctypes.c_int],
    )
    return run(x.data_ptr(), len(x), codebook.data_ptr(), len(codebook), x.shape[1], METRIC_CODE[metric])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("build", cases.NEAREST, ids=lambda f: f.__name__)
def test_adversarial_data(executor, order, search, build, metric):
    verify(executor, *build(), metric)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("build", cases.NEAREST, ids=lambda f: f.__name__)
def test_adversarial_data_in_low_precision(executor, search, build, dtype):
    x, codebook = build()
    verify(executor, x.to(dtype), codebook)
    verify(executor, x.to(dtype), codebook.to(dtype))


@pytest.mark.parametrize("dim", cases.DIMS, ids="D{}".format)
@pytest.mark.parametrize("metric", METRICS)
def test_dims(executor, search, dim, metric):
    verify(executor, *cases.clustered(25, 33, dim, seed=dim), metric)


@pytest.mark.parametrize("k", (1, 2, 127, 128, 129, 1000), ids="K{}".format)
@pytest.mark.parametrize("n", (1, 127, 128, 129), ids="N{}".format)
def test_tile_borders(executor, order, n, k):
    verify(executor, *cases.clustered(n, k, 17, seed=n + k))


@pytest.mark.parametrize("multiprocessors", [1, 7, 132])
def test_splitting_the_codes_changes_nothing(executor, screen, order, monkeypatch, multiprocessors):
    """Few rows on a wide device: the codes are split, and the parts meet in the settling kernel."""
    monkeypatch.setenv("VQFAST_EXECUTOR_SMS", str(multiprocessors))
    x, codebook = cases.clustered(40, 1500, 16, seed=90)
    codebook[700:1400] = codebook[:700]
    for metric in METRICS:
        verify(executor, x, codebook, metric)


@pytest.mark.parametrize(
    "n, k, dim",
    [(1, 1, 1), (63, 127, 64), (65, 129, 65), (129, 385, 128), (130, 140, 129), (257, 129, 16), (70, 300, 256)],
)
def test_hopper_tile_borders(executor, hopper, order, n, k, dim):
    """Row blocks of 64, tiles of 128 codes, more tiles than the ring has stages, and D up to each shape's limit."""
    verify(executor, *cases.clustered(n, k, dim, seed=n + k))


def test_hopper_with_more_tiles_than_stages(executor, hopper, order, monkeypatch):
    monkeypatch.setenv("VQFAST_EXECUTOR_SMS", "1")
    for dim in (8, 100, 150):
        verify(executor, *cases.clustered(20, 1300, dim, seed=dim))


@pytest.mark.parametrize("power", [-30, -13, -1, 3, 20, 40])
def test_hopper_rows_of_another_scale_than_the_codes(executor, hopper, power):
    """Rows and codes have their own powers of two; what float16 cannot hold is looked at in float64."""
    x, codebook = cases.normal(40, 24, seed=91) * 2.0**power, cases.normal(200, 24, seed=92)
    for metric in METRICS:
        verify(executor, x, codebook, metric)


def test_hopper_falls_back_past_its_widest_row(executor, hopper):
    verify(executor, *cases.clustered(20, 50, 257, seed=93))


@pytest.mark.parametrize("metric", METRICS)
def test_the_float16_bound_settles_rows_that_float16_alone_could_not(executor, hopper, metric):
    """Half of the rows lie close to the border of two codes: float32 decides between their groups, not float64 among
    all codes.

    A row stays open when both codes fall to one of the 8 chains (4 lanes, 2 chains each) and to different groups there:
    of 200 such rows 25 on average, less than 25 + 3 standard deviations = 39.
    """
    codebook = cases.normal(300, 32, seed=94)
    pairs = torch.randint(0, 300, (2, 200), generator=cases.generator(95))
    share = 0.5 + 1e-4 * cases.normal(200, 1, seed=96)
    x = share * codebook[pairs[0]] + (1 - share) * codebook[pairs[1]]
    x = torch.cat([x, cases.normal(200, 32, seed=97)])
    assert open_rows(executor, x, codebook, metric) <= 39
    verify(executor, x, codebook, metric)


def whole_tiles(executor, x, codebook, metric="l2"):
    return open_rows(executor, x, codebook, metric, "vqfast_whole_tiles")


@pytest.mark.parametrize("n, k, dim", [(1, 1, 1), (15, 255, 31), (17, 257, 33), (127, 513, 64), (129, 70, 65)])
def test_few_rows_tile_borders(executor, few_rows, order, n, k, dim):
    """Rows of an mma, blocks of 128 x 256, steps of 32 components, and fewer steps than the ring has stages."""
    verify(executor, *cases.clustered(n, k, dim, seed=n + k))
    verify(executor, *cases.clustered(n, k, dim, seed=n + k), "dot")


def test_few_rows_with_more_steps_than_stages_and_more_tiles_than_lanes(executor, few_rows, order):
    verify(executor, *cases.clustered(3, 40, 200, seed=98))
    verify(executor, *cases.clustered(2, 33 * 256, 4, seed=99))


@pytest.mark.parametrize("power", [-140, -70, -13, 3, 40, 100])
def test_few_rows_of_another_scale_than_the_codes(executor, few_rows, power):
    x, codebook = cases.normal(20, 24, seed=91) * 2.0**power, cases.normal(200, 24, seed=92)
    verify(executor, x, codebook), verify(executor, x, codebook, "dot")
    verify(executor, codebook[:20], x), verify(executor, codebook[:20], x, "dot")


def test_few_rows_settle_by_the_codes_that_are_named(executor, few_rows):
    """The certificate is no formality: at most one tile in a hundred may hide a third code in reach, whatever the
    offset, with one huge code, and where most codes are copies.
    """
    x, codebook = cases.clustered(200, 600, 32, seed=70, spread=0.5)
    assert whole_tiles(executor, x, codebook) <= 6 and whole_tiles(executor, x, codebook, "dot") <= 6
    x, codebook = x + 1000, codebook + 1000
    codebook[77] = 1e30
    assert whole_tiles(executor, x, codebook) <= 6
    codebook[100:500] = codebook[99]
    x = codebook[torch.arange(200) % 100] + 0.5 * cases.normal(200, 32, seed=71)
    x[77] = x[177] = x[0]
    assert whole_tiles(executor, x, codebook) <= 6
    verify(executor, x, codebook)


def test_few_rows_leave_the_rest_to_the_other_screens(executor, few_rows):
    """More rows, wider ones, and cosine."""
    assert whole_tiles(executor, *cases.clustered(3, 4, 2048, seed=1)) >= 0
    for n, dim, metric in ((3, 2049, "l2"), (4097, 1, "l2"), (3, 4, "cosine")):
        x, codebook = cases.clustered(n, 4, dim, seed=n)
        assert whole_tiles(executor, x, codebook, metric) == -1
        verify(executor, x, codebook, metric)


def test_few_rows_with_three_codes_in_reach(executor, few_rows):
    """Rows between three codes of one tile, and codes one unit of the last place apart: whole tiles are evaluated."""
    codebook = cases.normal(300, 16, seed=80)
    codebook[40:60] = codebook[40] * (1 + 2.0**-20 * torch.arange(20)[:, None])
    x = codebook[40:60] * (1 + 2.0**-22)
    assert whole_tiles(executor, x, codebook) == 20
    verify(executor, x, codebook)


@pytest.mark.parametrize("dtype", (torch.float32, *LOW_PRECISION), ids=str)
@pytest.mark.parametrize("view", tuple(cases.views(torch.zeros(2, 24, 5))))
def test_strides_of_x(executor, order, search, view, dtype):
    x, codebook = cases.clustered(48, 70, 37, seed=60)
    x = x.to(dtype).view(2, 24, 37)
    verify(executor, cases.views(x)[view], codebook, "cosine")
    verify(executor, cases.views(x)[view], codebook)


@pytest.mark.parametrize("view", tuple(cases.views(torch.zeros(2, 24, 5))))
def test_strides_of_codebook(executor, search, view):
    x, codes = cases.clustered(40, 48, 16, seed=61)
    rows = torch.stack([x, x + 0.1])[None]
    verify(executor, rows, cases.views(codes.view(2, 24, 16))[view])


@pytest.mark.parametrize("metric", METRICS)
def test_groups_and_batches(executor, search, order, metric):
    x, codebook = cases.normal(3, 2, 50, 9, seed=65), cases.normal(2, 37, 9, seed=66)
    codebook[1, :36] = torch.nan
    x[1, 0, 3] = torch.inf
    verify(executor, x, codebook, metric)


@pytest.mark.parametrize("x_dtype", (torch.float32, *LOW_PRECISION), ids=str)
@pytest.mark.parametrize("codebook_dtype", (torch.float32, *LOW_PRECISION), ids=str)
def test_mixed_dtypes_are_taken_exactly(executor, search, x_dtype, codebook_dtype):
    x, codebook = cases.clustered(60, 200, 19, seed=50, spread=1.0)
    for metric in METRICS:
        verify(executor, (x + 8).to(x_dtype), (codebook + 8).to(codebook_dtype), metric)


def test_no_rows(executor, search):
    verify(executor, torch.empty(0, 7), cases.normal(5, 7))


@pytest.mark.unpoisoned
def test_offsets_beyond_two_to_the_31(executor, search):
    """Rows, and codes, that lie 2^31 elements apart, in memory of which next to nothing is touched."""
    far = torch.empty((1 << 32) + 64, dtype=torch.bfloat16)
    rows = far.as_strided((1, 1, 3, 8), (0, 0, 1 << 31, 1))
    near = cases.normal(3, 8, seed=3).bfloat16()
    rows[0, 0] = near
    codebook = cases.normal(40, 8, seed=4)
    expected = oracle.nearest(near, codebook)
    distance, indices = executor.nearest(rows, codebook[None], 0, None, None, None)
    same(indices[0, 0], expected.indices), same(distance[0, 0], expected.distance)
    distance, indices = executor.nearest(codebook[None, None], rows[0], 0, None, None, None)
    expected = oracle.nearest(codebook, near)
    same(indices[0, 0], expected.indices), same(distance[0, 0], expected.distance)
    same(
        executor.gather(rows[0], torch.tensor([[[2, 1, -1]]]))[0, 0],
        torch.stack([near[2], near[1], torch.zeros_like(near[0])]),
    )


@pytest.mark.parametrize("metric", METRICS)
def test_the_screen_settles_almost_every_row(executor, screen, metric):
    """Else the answer would still be right, but slow."""
    x, codebook = cases.clustered(600, 500, 32, seed=70, spread=0.5)
    assert open_rows(executor, x, codebook, metric) <= 6


def test_offsets_and_a_huge_code_cost_the_l2_screen_nothing(executor, screen):
    """Both sides are centred, by a centre that one code does not move."""
    x, codebook = cases.clustered(600, 500, 32, seed=70, spread=0.5)
    x, codebook = x + 1000, codebook + 1000
    codebook[77] = 1e30
    assert open_rows(executor, x, codebook, "l2") <= 6


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_offsets_cost_the_other_metrics_little_in_float32(executor, metric):
    """Codes are centred here, rows are not: the bound is 2^-24 of 1000 sqrt(D) |c - centre|, a ten-thousandth of
    typical gaps.
    """
    x, codebook = cases.clustered(600, 500, 32, seed=70, spread=0.5)
    assert open_rows(executor, x + 1000, codebook + 1000, metric) <= 60


def test_duplicates_are_left_out_of_the_screen(executor):
    """Most codes alike (and zeros of either sign): the copies are never candidates, so no row needs float64."""
    x, codebook = cases.clustered(200, 30, 8, seed=71)
    codebook[:, 2] = 0.0
    copies = codebook.repeat(9, 1)
    copies[::2, 2] = -0.0
    assert open_rows(executor, x, copies, "l2") <= 2
    verify(executor, x, copies)


def test_scratch_memory_never_holds_one_value_per_pair(executor, request):
    size = executor.probe.vqfast_nearest_bytes
    size.restype, size.argtypes = ctypes.c_long, [ctypes.c_long] * 3
    n, k, dim = 1 << 20, 1 << 14, 64
    assert size(n, k, dim) < 64 * n + 8 * (n + k) * dim + (1 << 20)
    # Few rows: the codes are split, N x K still never exists.
    assert size(1 << 12, 1 << 16, dim) < (1 << 12) * (1 << 16) / 4
    request.getfixturevalue("few_rows")
    assert size(1 << 12, 1 << 16, dim) < (1 << 12) * (1 << 16) / 4
