"""Codebooks and rows made to hurt cost at most 1.5 times the dense search (contract, line 3): by counted work, and by time."""

import time

import cases
import pytest
import torch
from check import METRICS

import vqfast
from vqfast import _backends

ROWS, CODES, DIM = 2048, 1024, 32
BOUND = 1.5


@pytest.fixture(autouse=True)
def native():
    reason = "; ".join(_backends.reasons("nearest", "cpu", torch.empty(0)))
    if reason:
        pytest.skip(f"native: {reason}")


def isotropic():
    return cases.normal(ROWS, DIM, seed=1), cases.normal(CODES, DIM, seed=2)


def screened():
    """Variance that falls off like a trained encoder's: most codes are passed over."""
    spread = 1 / torch.arange(1, DIM + 1)
    return isotropic()[0] * spread, isotropic()[1] * spread


def mostly_identical(x, codebook):
    picked = torch.randperm(CODES, generator=cases.generator(3))[: int(0.9 * CODES)]
    return x, codebook.index_copy(0, picked, codebook[:1].expand(len(picked), DIM)), CODES - len(picked) + 1


def one_huge(x, codebook):
    changed = codebook.clone()
    changed[CODES // 2] = 1e30
    return x, changed, CODES


def some_huge(x, codebook):
    changed = codebook.clone()
    changed[::100] *= 1e30
    return x, changed, CODES


MADE_TO_HURT = {
    "as_they_are": lambda x, codebook: (x, codebook, CODES),
    "mostly_identical": mostly_identical,
    "all_identical": lambda x, codebook: (x, codebook[:1].expand(CODES, DIM).contiguous(), 1),
    "all_zero": lambda x, codebook: (x, torch.zeros(CODES, DIM), 1),
    "rows_equal": lambda x, codebook: (x[:1].expand(ROWS, DIM).contiguous(), codebook, CODES),
    "one_huge": one_huge,
    "some_huge": some_huge,
}
DATA = {"isotropic": isotropic, "screened": screened}


def products(found) -> float:
    """Work of a search in products of one row's coordinate with one code's, each part at least as dear as it is.

    A panel is 32 codes of 10 coordinates, for these narrow rows, and a start, and up to 4 are looked through for a first bound; a
    group is the boxes of 16 panels, low and high; a comparison in all coordinates and a decision in float64, which handles half as
    many numbers at once and in a fixed order, carry overheads.
    """
    dense = found.rows * found.searched * DIM if found.road in ("dense", "bytes", "few") else 0
    first = found.rows * min(4, found.panels_of_codebook)
    panels = 32 * 11 * (found.panels + first) + 16 * 2 * 10 * (found.groups + found.rows * (found.panels_of_codebook / 256 + 1))
    decisions = found.candidates + found.rows * found.always
    return dense + (panels if found.road == "panels" else 0) + (DIM + 32) * found.evaluations + 4 * DIM * decisions


@pytest.mark.quick
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("hurt", MADE_TO_HURT)
@pytest.mark.parametrize("data", DATA)
def test_counted_work(data, hurt, metric):
    x, codebook, distinct = MADE_TO_HURT[hurt](*DATA[data]())
    found = _backends.search_counts(x, codebook, metric)
    assert torch.equal(found.indices, vqfast.nearest(x, codebook, metric=metric).indices)
    assert found.searched + found.always <= distinct, "equal codes are searched once"
    assert products(found) <= BOUND * ROWS * CODES * DIM, (
        f"{products(found) / (ROWS * CODES * DIM):.2f} of the dense work: {found[:9]}"
    )


@pytest.mark.quick
@pytest.mark.parametrize("rows", [1, 16, 150])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("hurt", MADE_TO_HURT)
def test_counted_work_of_few_rows(hurt, metric, rows):
    """The road of few rows prepares nothing, so it meets equal codes as they come; each row decides few of them by the formula."""
    x, codebook, _ = MADE_TO_HURT[hurt](*isotropic())
    found = _backends.search_counts(x[:rows], codebook, metric)
    assert torch.equal(found.indices, vqfast.nearest(x, codebook, metric=metric).indices[:rows])
    assert products(found) <= BOUND * rows * CODES * DIM, f"{products(found) / (rows * CODES * DIM):.2f} of the dense work: {found[:9]}"


@pytest.mark.quick
def test_tight_clusters_far_apart_cost_no_more_than_dense():
    """Within a cluster no code differs from another by a step of its bytes, so a look at bytes would leave thousands to the formula."""
    far = 3 * cases.normal(8, DIM, seed=40)
    codebook = (far[:, None] + 1e-4 * cases.normal(8, 4096, DIM, seed=41)).flatten(0, 1)
    x = (far[:, None] + 1e-4 * cases.normal(8, 140, DIM, seed=42)).flatten(0, 1)
    found = _backends.search_counts(x, codebook)
    assert found.road != "bytes" and products(found) <= BOUND * len(x) * len(codebook) * DIM, f"{found[:9]}"


@pytest.mark.quick
def test_screened_data_takes_a_fraction_of_the_work():
    """The counts mean something: on data that the screen is for they are far below the dense search's."""
    found = _backends.search_counts(*screened())
    assert found.road == "panels" and products(found) < 0.5 * ROWS * CODES * DIM
    assert 0 < found.candidates <= found.evaluations + ROWS and found.panels <= found.panels_of_codebook * ROWS


def latents(codes, dim):
    """Rows and codes of one law, whose variance falls off over 64 directions, turned into as many dimensions as asked."""
    spread = 1 / torch.arange(1, 65)
    turn = torch.linalg.qr(cases.normal(dim, 64, seed=52))[0].T
    return tuple((cases.normal(n, 64, seed=seed) * spread @ turn).contiguous() for n, seed in ((ROWS, 50), (codes, 51)))


@pytest.mark.quick
def test_work_of_a_row_grows_slower_than_the_codebook():
    few, many = (_backends.search_counts(*latents(codes, 64)) for codes in (2_048, 16_384))
    assert few.road == many.road == "panels"
    assert many.evaluations + many.panels <= 4.5 * (few.evaluations + few.panels), f"{few[:9]}, {many[:9]}"


@pytest.mark.quick
@pytest.mark.parametrize("dim", [256, 1024])
def test_counts_of_a_row_do_not_grow_with_the_dimensions(dim):
    """What more dimensions cost is that each projection and comparison is longer; there are no more of them."""
    narrow, wide = (_backends.search_counts(*latents(4_096, d)) for d in (64, dim))
    assert narrow.road == wide.road == "panels"
    assert wide.evaluations <= narrow.evaluations and wide.panels <= 1.05 * narrow.panels, f"{narrow[:9]}, {wide[:9]}"


@pytest.mark.quick
def test_first_bounds_are_good():
    """Most comparisons are of codes that no bound could have spared, even with the least distance known beforehand."""
    x, codebook = latents(4_096, 256)
    found = _backends.search_counts(x, codebook)
    least = vqfast.nearest(x, codebook).distance
    centred = codebook - codebook.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False)[2][:11].T
    points = []
    for rows in (x - codebook.mean(0), centred):
        kept = rows @ directions
        rest = (rows.square().sum(-1) - kept.square().sum(-1)).clamp(min=0).sqrt()
        points.append(torch.cat([kept, rest[:, None]], 1))
    needed = (torch.cdist(*points).square() <= least[:, None]).sum()
    assert needed <= found.evaluations <= 1.6 * needed, f"{found.evaluations / ROWS:.1f} of {needed / ROWS:.1f} a row"


@pytest.mark.quick
@pytest.mark.parametrize("x, codebook", [
    (torch.ones(4, 3).double(), torch.ones(2, 3)), (torch.ones(4, 3), torch.ones(2, 4)), (torch.ones(3, 4).T, torch.ones(2, 3)),
    (torch.ones(4, 3), torch.ones(1, 2, 3)),
], ids=["float64", "dim", "strides", "groups"])  # fmt: skip
def test_counts_take_plain_tensors_only(x, codebook):
    with pytest.raises(ValueError, match="contiguous float32"):
        _backends.search_counts(x, codebook)


@pytest.mark.parametrize("count", [128, ROWS])
@pytest.mark.parametrize("hurt", MADE_TO_HURT)
@pytest.mark.parametrize("data", DATA)
def test_time(data, hurt, count, set_threads):
    """Least processor time of one thread in several rounds, taken in turns with the dense search of the data as they are."""
    set_threads(1)
    x, codebook = DATA[data]()
    rows, codes, _ = MADE_TO_HURT[hurt](x, codebook)
    x, rows = x[:count], rows[:count]
    work = {"dense": lambda: _backends.search_counts(x, codebook, road="dense"), "hurt": lambda: vqfast.nearest(rows, codes)}
    least = dict.fromkeys(work, float("inf"))
    for _ in range(12):
        for name, call in work.items():
            start = time.process_time()
            call()
            least[name] = min(least[name], time.process_time() - start)
    assert least["hurt"] <= BOUND * least["dense"], f"{least['hurt'] / least['dense']:.2f} times the dense search"
