"""The principal-direction screen of the Triton search, in Triton's interpreter: its bound, its answers, its pilot, any basis."""

import importlib

import cases
import oracle
import pytest
import torch
from check import METRIC_CODE, METRICS, same

from vqfast import _backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def triton_exists():
    reason = "; ".join(_backends.reasons("nearest", "triton", torch.empty(0, device=DEVICE)))
    if reason:
        pytest.skip(f"triton: {reason}")


@pytest.fixture
def search(monkeypatch):
    """search(x, codebook, metric) -> (rows that the screen left open, distance, indices); small problems take this road too."""
    module = importlib.import_module("vqfast.kernels.nearest")
    monkeypatch.setattr(module._tuning, "PILOT", 16)
    monkeypatch.setattr(module._tuning, "REDUCED_SCORES", 0)
    left = []
    reduced = module._search_reduced

    def counted(*arguments):
        listed = reduced(*arguments)
        left.append(int(listed.count.sum()))
        return listed

    monkeypatch.setattr(module, "_search_reduced", counted)

    def run(x, codebook, metric="l2"):
        left.clear()
        distance, indices = module.nearest_triton(x.to(DEVICE), codebook.to(DEVICE), METRIC_CODE[metric])
        assert left, "the search took another road"
        return sum(left), distance, indices

    return run


def data(rows, codes, dim, seed, groups=1, slope=0.75):
    """Rows and codes [1, G, N, D], [G, K, D] with the falling spectrum of encoder outputs, in rotated coordinates."""
    x, codebook = zip(*(cases.clustered(rows, codes, dim, seed=seed + g, spread=0.5) for g in range(groups)))
    spectrum = torch.arange(1, dim + 1) ** -slope
    rotation = torch.linalg.qr(cases.normal(dim, dim, seed=seed))[0]
    return (torch.stack(x) * spectrum @ rotation)[None], torch.stack(codebook) * spectrum @ rotation


def check(found, x, codebook, metric="l2"):
    expected = oracle.nearest(x, codebook, metric)
    same(found[2], expected.indices), same(found[1], expected.distance)
    return found[0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [128, 200])
def test_it_certifies_most_rows(search, metric, dim):
    x, codebook = data(150, 300, dim, seed=dim)
    assert check(search(x, codebook, metric), x, codebook, metric) <= 15


def test_a_bad_pilot_leaves_every_row_to_the_whole_screen(search):
    """Independent numbers have no principal directions."""
    x, codebook = cases.normal(1, 1, 100, 256, seed=1), cases.normal(1, 200, 256, seed=2)
    assert check(search(x, codebook), x, codebook) == 100


def test_groups_slabs_strides_and_dtypes(search, monkeypatch):
    monkeypatch.setattr(importlib.import_module("vqfast.kernels.nearest"), "ROWS_PER_LAUNCH", 150)  # two groups: 75 rows a launch
    x, codebook = data(200, 130, 128, seed=3, groups=2)
    x = x.view(1, 2, 2, 100, 128).transpose(0, 2).squeeze(2)[:, :, :90].contiguous()  # [2, 2, 90, 128]: 180 rows, three launches
    for rows, codes in ((x, codebook), (x.mT.contiguous().mT, codebook.half()), (x.bfloat16(), codebook)):
        assert check(search(rows, codes), rows, codes) < 100


@pytest.mark.parametrize("metric", METRICS)
def test_data_that_breaks_bounds(search, metric):
    """Repeated codes across tiles, one at 1e30, one of NaN, one of zeros; rows of NaN, Inf, zeros, 1e30, 1e-30 and codes themselves."""
    x, codebook = data(120, 200, 130, seed=4)
    codebook[0, 150:170] = codebook[0, :20]
    codebook[0, 7], codebook[0, 9, 3], codebook[0, 11] = 1e30, torch.nan, 0.0
    x[0, 0, 1, 5], x[0, 0, 2, 129], x[0, 0, 3], x[0, 0, 4] = torch.nan, torch.inf, 0.0, 1e30
    x[0, 0, 5] *= 1e-30
    x[0, 0, 6:26] = codebook[0, 20:40]
    x[0, 0, 26:46] = (codebook[0, 20:40] + codebook[0, 40:60]) / 2  # near-ties
    check(search(x, codebook, metric), x, codebook, metric)


def test_a_huge_code_takes_no_direction(search):
    """One code at 1e6 must not make the directions useless for the others."""
    x, codebook = data(100, 200, 128, seed=11)
    codebook[0, 8] = 1e6
    assert check(search(x, codebook), x, codebook) <= 10


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_an_offset(search, offset):
    x, codebook = data(100, 200, 128, seed=5)
    x, codebook = x + offset, codebook + offset
    left = check(search(x, codebook), x, codebook)
    assert left <= 20 or offset > 1e3  # at 1e6 neighbouring floats are a sixteenth apart


def test_few_or_equal_codes(search):
    """Fewer codes than directions, and all codes equal: the missing directions are zero."""
    x, codebook = data(70, 5, 128, seed=6)
    assert check(search(x, codebook), x, codebook) <= 7
    equal = codebook[:, :1].repeat(1, 40, 1)
    check(search(x, equal), x, equal)


@pytest.mark.parametrize("basis", ["random", "scaled", "far from orthonormal", "nan", "zero", "one direction 63 times"])
def test_any_basis_is_right(search, monkeypatch, basis):
    """Directions decide how many rows stay open, never a code."""
    module = importlib.import_module("vqfast.kernels._principal")
    x, codebook = data(80, 150, 128, seed=7)
    columns = torch.linalg.qr(cases.normal(1, 128, 64, seed=8))[0]
    if basis == "scaled":
        columns = columns * 1.012  # a defect of 0.19
    elif basis == "far from orthonormal":
        columns = cases.normal(1, 128, 64, seed=9)
    elif basis == "nan":
        columns[0, 3, 4] = torch.nan
    elif basis == "zero":
        columns = torch.zeros(1, 128, 64)
    elif basis.startswith("one"):
        columns = columns[:, :, :1].repeat(1, 1, 64)
    columns[:, :, 63] = 0.0
    monkeypatch.setattr(module, "directions", lambda *_: module.measured(columns.to(DEVICE)))
    check(search(x, codebook), x, codebook)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dim", [128, 512])
def test_coordinates_summed_in_one_chain_stay_within_their_bound(dim, fused):
    """As the compiler does it: it adds each step's product onto the running sum, where the interpreter sums a step on its own."""
    module = importlib.import_module("vqfast.kernels._principal")
    z = cases.normal(200, dim, seed=12)
    z[::2] = z[::2].abs() + 1.0  # partial sums that only grow
    columns = torch.linalg.qr(torch.cat([torch.ones(dim, 1), cases.normal(dim, 62, seed=13)], 1))[0]
    chain = torch.zeros(200, 63)
    for d in range(dim):
        product = z[:, d, None].double() * columns[d].double()  # exact
        chain = (chain.double() + (product if fused else product.float().double())).float()
    delta = (columns.double().mT @ columns.double() - torch.eye(63)).norm()
    off = (chain.double() - z.double() @ columns.double()).norm(dim=1) / z.double().norm(dim=1)
    bound = module.coordinate_error(dim, delta)
    assert bound / 100 < off.max() <= bound, (off.max(), bound)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("basis", ["principal", "scaled"])
def test_the_bound_lies_below_every_score_and_is_tight(metric, basis):
    """The proof of _principal.py, pair by pair: R h - X w - zz.cc <= R score in float64; with principal directions by little."""
    module, nearest = (importlib.import_module(f"vqfast.kernels.{name}") for name in ("_principal", "nearest"))
    x, codebook = data(60, 128, 200, seed=10)
    codebook[0, 3] *= 1e4
    x[0, 0, 1] *= 1e3
    x, codebook, code = x.to(DEVICE), codebook.to(DEVICE), METRIC_CODE[metric]
    codes = nearest._prepare_codes(codebook, code, 256, True)
    found = module.directions(codes.single, 128, 200)
    if basis == "scaled":
        found = module.measured(found.basis * 1.012)
    half = torch.empty(1, 128, 64, dtype=torch.float16, device=DEVICE)
    width = torch.empty(1, 128, device=DEVICE)
    step = {"COLUMNS": 64, **nearest._tuning.REDUCE}
    module._reduce_codes_kernel[(2, 1)](
        codes.single, codes.width_single, *found[:2], half, width, 128, 256, 200, nearest.accumulation_error(64), **step
    )
    rows = torch.empty(1, 60, 64, dtype=torch.float16, device=DEVICE)
    bound_width, scale, factor = (torch.empty(1, 60, device=DEVICE) for _ in range(3))
    ready = torch.tensor([60], dtype=torch.int32, device=DEVICE)
    module._reduce_rows_kernel[(1, 1)](
        x, *x.stride(), 60, 200, 0, 60, rows, ready, codes.centre, codes.unit, *found, rows, bound_width, scale, factor,
        nearest.accumulation_error(64), METRIC=code, CHOSEN=False, ALIGN=1, **step,
    )  # fmt: skip
    prepared, c = x[0, 0].double(), codebook[0].double()
    mu, unit = codes.centre.double(), codes.unit.double()
    if metric == "l2":
        prepared, c = (prepared - mu) * unit, (c - mu) * unit
    elif metric == "cosine":
        c = c / c.norm(dim=1, keepdim=True) - mu
    else:
        c = (c - mu) * unit
    h = c.square().sum(1) / 2 if metric == "l2" else torch.zeros(128, dtype=torch.float64, device=DEVICE)
    size = factor[0].double()[:, None]
    score = size * (h - prepared @ c.T)
    bound = scale[0].double()[:, None] * codes.offset[0].double() - bound_width[0].double()[:, None] * width[0].double()
    bound = bound - rows[0].double() @ half[0].double().T
    assert (bound <= score).all()
    if basis == "principal":
        loose = (score - bound) / (size * prepared.norm(dim=1)[:, None] * c.norm(dim=1))
        assert loose.quantile(0.9) < 0.05, loose.quantile(0.9)
