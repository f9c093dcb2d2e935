"""nearest: the exact code on every backend, for every size, dtype and layout (contract 1, 3, 4, 7, 8)."""

from functools import lru_cache

import cases
import oracle
import pytest
import torch
from check import METRICS, move, put, same, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vqfast

pytestmark = pytest.mark.quick


def verify(backend, x, codebook, metric="l2", expected=None):
    """The backend's answer against the oracle's, both fields, every value."""
    expected = oracle.nearest(x, codebook, metric) if expected is None else expected
    got = vqfast.nearest(*put(backend, x, codebook), metric=metric, backend=backend)
    assert got.indices.dtype == torch.int64
    same(got.indices, expected.indices, f"indices, {metric}")
    same(got.distance, expected.distance, f"distance, {metric}")
    return got


@lru_cache(maxsize=None)
def expected_case(build, metric):
    return oracle.nearest(*build(), metric)


def by_name(function):
    return function.__name__


# ---- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("build", cases.NEAREST, ids=by_name)
def test_adversarial_data(backend, build, metric):
    verify(backend, *build(), metric, expected_case(build, metric))


@pytest.mark.parametrize("dim", cases.DIMS, ids="D{}".format)
@pytest.mark.parametrize("k", cases.CODEBOOK_SIZES, ids="K{}".format)
def test_codebook_sizes_and_dims(backend, k, dim):
    verify(backend, *cases.clustered(25, k, dim, seed=k + dim))


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("dim", cases.DIMS, ids="D{}".format)
def test_dims_of_other_metrics(backend, dim, metric):
    verify(backend, *cases.clustered(25, 33, dim, seed=dim), metric)


@pytest.mark.parametrize("n", cases.ROW_COUNTS, ids="N{}".format)
def test_row_counts(backend, n):
    verify(backend, *cases.clustered(n, 97, 16, seed=n))


@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_mixed_dtypes_are_taken_exactly(backend, metric, x_dtype, codebook_dtype):
    """Rounding x to the codebook's dtype, or the other way, changes which of these close codes is nearest."""
    x, codebook = cases.clustered(101, 300, 19, seed=50, spread=1.0)
    verify(backend, (x + 8).to(x_dtype), (codebook + 8).to(codebook_dtype), metric)


@pytest.mark.parametrize("dtype", cases.LOW, ids=str)
@pytest.mark.parametrize("build", cases.NEAREST, ids=by_name)
def test_adversarial_data_in_low_precision(backend, build, dtype):
    """float16 makes inf of 1e30 and ties of ulp neighbours; the oracle sees the values after that rounding."""
    x, codebook = build()
    verify(backend, x.to(dtype), codebook)
    verify(backend, x.to(dtype), codebook.to(dtype))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("x_dtype, codebook_dtype", [
    (torch.float64, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float64),
])  # fmt: skip
def test_float64(metric, x_dtype, codebook_dtype):
    x, codebook = cases.clustered(60, 70, 9, seed=51)
    x, codebook = (x.double() / 3).to(x_dtype), (codebook.double() / 3).to(codebook_dtype)
    got = vqfast.nearest(x, codebook, metric=metric)
    assert got.distance.dtype == torch.float64
    same(got.indices, oracle.nearest(x, codebook, metric).indices)
    same(got.distance, oracle.nearest(x, codebook, metric).distance)


def test_float64_rounding_decides():
    """Codes that agree in float32 and differ in float64."""
    codebook = 1.0 + 1e-12 * cases.normal(50, 4, seed=52).double()
    same(vqfast.nearest(codebook, codebook).indices, torch.arange(50))


def test_many_rows_and_codes(backend, set_threads):
    """Enough work for several tasks of a thread pool, several row tiles and hundreds of panels."""
    set_threads(4)
    verify(backend, *cases.clustered(2500, 3000, 8, seed=53))


def test_distance_overflows_to_inf_and_the_code_stays_right(backend):
    x, codebook = cases.huge_norms()
    got = verify(backend, x, codebook, expected=expected_case(cases.huge_norms, "l2"))
    assert got.distance.isinf().all() and got.indices.unique().numel() > 10


@pytest.mark.parametrize("count", [1, 4], ids="{} threads".format)
@pytest.mark.parametrize("metric", METRICS)
def test_subnormals_count_although_torch_flushes_them(backend, metric, count, set_threads):
    """torch.set_flush_denormal(True), usual in CPU training, is a mode of the processor that kernels run in."""
    if backend != "cpu" or not torch.set_flush_denormal(False):
        pytest.skip("the other backends compute with torch itself, which does as the user asked")
    set_threads(count)
    expected = expected_case(cases.denormals_and_ones, metric)
    data = cases.denormals_and_ones()
    torch.set_flush_denormal(True)
    try:
        got = vqfast.nearest(*data, metric=metric, backend=backend)
        assert torch.tensor([2.0**-140]).mul(1.0).item() == 0, "the mode is on, and stays on"
    finally:
        torch.set_flush_denormal(False)
    same(got.indices, expected.indices), same(got.distance, expected.distance)


# ---- non-finite values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_nonfinite_rows_get_index_0_and_distance_nan(backend, metric):
    x, codebook = cases.nonfinite_rows()
    got = vqfast.nearest(*put(backend, x, codebook), metric=metric, backend=backend)
    bad = ~torch.isfinite(x).all(-1)
    assert (got.indices.cpu()[bad] == 0).all() and got.distance.cpu()[bad].isnan().all()
    assert not got.distance.cpu()[~bad].isnan().any()


@pytest.mark.parametrize("metric", METRICS)
def test_nonfinite_codes_are_never_chosen(backend, metric):
    x, codebook = cases.nonfinite_codes()
    got = vqfast.nearest(*put(backend, x, codebook), metric=metric, backend=backend)
    usable = torch.isfinite(codebook).all(-1)
    assert usable[got.indices.cpu()].all() and not got.distance.isnan().any()


@pytest.mark.parametrize("metric", METRICS)
def test_no_finite_code_gives_index_0_and_distance_nan(backend, metric):
    x, codebook = cases.all_codes_nonfinite()
    got = vqfast.nearest(*put(backend, x, codebook), metric=metric, backend=backend)
    assert (got.indices == 0).all() and got.distance.isnan().all()


def test_cosine_of_zero_rows_and_codes_scores_zero(backend):
    """A zero code scores 0: it beats codes of negative cosine and loses to positive ones. A zero row ties all."""
    codebook = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.0, -2.0], [3.0, 4.0]])
    x = torch.tensor([[-0.0, 0.0], [6.0, 8.0], [4.0, -3.0], [1.0, -0.2], [2.0, -8.0], [1e-30, -0.7e-30]])
    got = verify(backend, x, codebook, "cosine")
    assert got.indices.tolist()[:2] == [0, 3] and got.distance.tolist()[:2] == [1.0, 0.0]


# ---- layouts ------------------------------------------------------------------------------------------------------

VIEW_NAMES = tuple(cases.views(torch.zeros(2, 24, 5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [5, 16, 64], ids="D{}".format)
@pytest.mark.parametrize("view", VIEW_NAMES)
def test_strides_of_x(backend, view, dim, dtype):
    x, codebook = cases.clustered(48, 70, dim, seed=60)
    x = x.to(dtype).view(2, 24, dim)
    strided = put(backend, cases.views(x)[view])
    assert torch.equal(strided.cpu(), x)
    got = vqfast.nearest(strided, put(backend, codebook), backend=backend)
    expected = oracle.nearest(x, codebook)
    same(got.indices, expected.indices), same(got.distance, expected.distance)


@pytest.mark.parametrize("view", VIEW_NAMES)
def test_tensors_lie_on_a_device_as_they_lay(view):
    """Or the other tests of strides would be of other strides on a GPU."""
    x = cases.views(cases.normal(2, 24, 5, seed=63))[view]
    moved = move(x, "cpu")
    assert moved.data_ptr() != x.data_ptr() and torch.equal(moved, x)
    assert (moved.stride(), moved.storage_offset()) == (x.stride(), x.storage_offset())


@pytest.mark.parametrize("view", VIEW_NAMES)
def test_strides_of_codebook(backend, view):
    x, codes = cases.clustered(40, 48, 16, seed=61)
    codebook = cases.views(codes.view(2, 24, 16))[view]
    rows = torch.stack([x, x + 0.1])
    verify(backend, rows, codebook)
    verify(backend, rows[0], codebook[1])


@pytest.mark.parametrize("shape", ["row", "component", "code", "all"])
def test_expanded_inputs(backend, shape):
    x, codebook = cases.clustered(30, 40, 8, seed=62)
    if shape in ("row", "all"):
        x = x[3:4].expand(30, 8)
    if shape in ("component", "all"):
        x = x[:, 2:3].expand(30, 8)
    if shape in ("code", "all"):
        codebook = codebook[5:6].expand(40, 8)
    verify(backend, x, codebook)


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (2, 1, 3, 5), (0,), (2, 0, 3)], ids=str)
def test_leading_axes(backend, lead):
    x, codebook = cases.normal(*lead, 6, seed=63), cases.normal(20, 6, seed=64)
    got = verify(backend, x, codebook)
    assert got.indices.shape == lead and got.distance.dtype == torch.float32


@pytest.mark.parametrize("lead", [(), (3,), (2, 2), (0,)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("metric", METRICS)
def test_groups(backend, metric, groups, lead):
    x, codebook = cases.normal(*lead, groups, 13, 5, seed=65), cases.normal(groups, 37, 5, seed=66)
    got = verify(backend, x, codebook, metric)
    assert got.indices.shape == (*lead, groups, 13)


def test_groups_seen_through_channels(backend):
    """What a layer does with heads: [B, N, G * D] split into groups by strides alone."""
    z, codebook = cases.normal(2, 24, 3 * 8, seed=67), cases.normal(3, 40, 8, seed=68)
    verify(backend, z.unflatten(-1, (3, 8)).transpose(1, 2), codebook)


def test_a_group_with_nonfinite_codes_leaves_the_others_alone(backend):
    x, codebook = cases.normal(2, 3, 20, 5, seed=69), cases.normal(3, 40, 5, seed=70)
    codebook[1] = torch.nan
    verify(backend, x, codebook)


@pytest.mark.parametrize("metric", METRICS)
def test_empty_rows(backend, metric):
    got = vqfast.nearest(*put(backend, torch.empty(0, 7), cases.normal(5, 7)), metric=metric, backend=backend)
    assert got.indices.shape == got.distance.shape == (0,)
    assert got.indices.dtype == torch.int64 and got.distance.dtype == torch.float32


def test_inputs_are_not_written(backend):
    x, codebook = put(backend, *cases.nonfinite_rows_and_codes())
    before = x.clone(), codebook.clone()
    vqfast.nearest(x, codebook, backend=backend)
    same_bits(x, before[0]), same_bits(codebook, before[1])


def test_no_gradient_flows(backend):
    """nearest is not differentiable: its outputs never require a gradient."""
    x, codebook = put(backend, *cases.clustered(12, 8, 3))
    got = vqfast.nearest(x.requires_grad_(), codebook.requires_grad_(), backend=backend)
    assert not got.distance.requires_grad and not got.indices.requires_grad


# ---- the same codes, however it is asked --------------------------------------------------------------------------


def close_calls():
    """Rows and codes with ties, near-ties, duplicates and bad values, in one set of 16 dimensions."""
    x, codebook = cases.offset()
    codebook = torch.cat([codebook, codebook[::3], codebook[:5] * torch.nan, codebook.mean(0, keepdim=True)])
    return torch.cat([x, x[:7] * torch.inf, codebook[3:60:2].nan_to_num()]), codebook


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("cuts", [(1,), (12,), (11, 13, 100), (5, 6, 7, 8, 9, 150)], ids=str)
def test_batch_splits_change_no_bit(backend, metric, cuts):
    x, codebook = put(backend, *close_calls())
    whole = vqfast.nearest(x, codebook, metric=metric, backend=backend)
    parts = [vqfast.nearest(p, codebook, metric=metric, backend=backend) for p in x.tensor_split(cuts)]
    same_bits(torch.cat([p.indices for p in parts]), whole.indices, "indices")
    same(torch.cat([p.distance for p in parts]), whole.distance, "distance")


@pytest.mark.parametrize("metric", METRICS)
def test_rows_in_another_order_keep_their_codes(backend, metric):
    x, codebook = put(backend, *close_calls())
    order = torch.randperm(len(x), generator=cases.generator(80)).to(x.device)
    whole = vqfast.nearest(x, codebook, metric=metric, backend=backend)
    shuffled = vqfast.nearest(x[order], codebook, metric=metric, backend=backend)
    same(shuffled.indices, whole.indices[order]), same(shuffled.distance, whole.distance[order])


@pytest.mark.parametrize("metric", METRICS)
def test_permuted_codes_follow(backend, metric):
    """Where the best score has one owner the index moves with it; among equals the new lowest wins."""
    x, codebook = cases.trained()
    order = torch.randperm(len(codebook), generator=cases.generator(81))
    before = vqfast.nearest(*put(backend, x, codebook), metric=metric, backend=backend)
    after = vqfast.nearest(*put(backend, x, codebook[order]), metric=metric, backend=backend)
    same(order[after.indices.cpu()], before.indices), same(after.distance, before.distance)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_thread_counts_change_no_bit(backend, count, set_threads):
    x, codebook = put(backend, *(t.repeat(4, 1) for t in close_calls()))
    whole = vqfast.nearest(x, codebook, backend=backend)
    set_threads(count)
    again = vqfast.nearest(x, codebook, backend=backend)
    same_bits(again.indices, whole.indices, "indices"), same_bits(again.distance, whole.distance, "distance")


@pytest.mark.parametrize("shift", [2.0**k for k in (-40, -3, 5, 60)], ids="x{:.0e}".format)
def test_powers_of_two_scale_without_a_trace(backend, shift):
    """Scaling both sides by a power of two scales every float64 operation exactly, so no code changes."""
    x, codebook = cases.trained()
    before = vqfast.nearest(*put(backend, x, codebook), backend=backend)
    after = vqfast.nearest(*put(backend, x * shift, codebook * shift), backend=backend)
    same(after.indices, before.indices)


@pytest.mark.parametrize("name", ["no", "inference", "autocast"])
def test_grad_and_autocast_modes_change_no_bit(backend, name):
    x, codebook = put(backend, *close_calls())
    mode = {"no": torch.no_grad(), "inference": torch.inference_mode(),
            "autocast": torch.autocast(x.device.type, dtype=torch.bfloat16)}[name]  # fmt: skip
    plain = vqfast.nearest(x, codebook, backend=backend)
    with mode:
        again = vqfast.nearest(x, codebook, backend=backend)
    same(again.indices, plain.indices), same(again.distance, plain.distance)


# ---- whatever else ------------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e30, -1e30, 2.0**-149, 1e-38, 3e38]),
    st.integers(-3, 3).map(float),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
)


@st.composite
def problems(draw):
    """Few distinct values, so that ties are common; any sizes up to three tiles; any layout of views()."""
    pool = torch.tensor(draw(st.lists(VALUES, min_size=1, max_size=6)))
    n, k = draw(st.integers(0, 30)), draw(st.integers(1, 70))
    dim, seed = draw(st.sampled_from([1, 2, 3, 5, 8, 17])), draw(st.integers(0, 2**20))
    pick = torch.randint(0, len(pool), (n + k, dim), generator=cases.generator(seed))
    both = pool[pick] if draw(st.booleans()) else pool[pick] + draw(st.sampled_from([1e-3, 1.0])) * pick
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return both[:n].to(dtype), both[n:].contiguous(), draw(st.sampled_from(METRICS))


@settings(max_examples=60, deadline=None, derandomize=True, database=None, print_blob=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
@given(problem=problems())
def test_anything(backend, problem):
    verify(backend, *problem)
