"""kmeans: Lloyd's algorithm on the exact search, deterministic, with no lost codes (contract 3, 4, 7)."""

import itertools
from collections import Counter

import cases
import oracle
import pytest
import torch
from check import ULP, close, no_interpreter, put, same, same_bits

import vqfast
from vqfast.ops import kmeans

FAMILY = "ema"  # nearest and code_stats together; every backend with statistics has the search


@pytest.fixture(autouse=True)
def composed(backend):
    no_interpreter(backend)


def blobs(clusters=8, each=40, dim=6, seed=1):
    """Well separated clusters: centres about 100 apart, rows within a few units of them."""
    centres = 100 * cases.integers(clusters, dim, seed=seed, low=-9, high=9)
    owner = torch.arange(clusters).repeat(each)
    return centres[owner] + cases.normal(clusters * each, dim, seed=seed + 1), owner


@pytest.mark.quick
@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_result_is_consistent(backend, init):
    x = cases.normal(300, 5, seed=2)
    found = vqfast.kmeans(put(backend, x), 20, init=init, backend=backend)
    wanted = oracle.nearest(x, found.codebook.cpu())
    assert found.codebook.shape == (20, 5) and found.codebook.dtype == torch.float32
    same(found.indices, wanted.indices)
    mean = wanted.distance.double().mean()  # each distance was rounded once
    close(found.inertia, mean, 2 * ULP * mean)


@pytest.mark.quick
def test_k_means_plus_plus_finds_separated_clusters(backend):
    """Each new seed falls into an uncovered cluster with probability > 1 - 1e-3, so all eight are found."""
    x, owner = blobs()
    found = vqfast.kmeans(put(backend, x), 8, init="k-means++", backend=backend)
    pairs = {(int(o), int(i)) for o, i in zip(owner, found.indices.cpu())}
    assert len(pairs) == 8, "one code per cluster, one cluster per code"
    for o, i in pairs:
        mean = x[owner == o].double().mean(0)
        close(found.codebook[i], mean, (40 + 2) * ULP * x[owner == o].double().abs().mean(0))


@pytest.mark.quick
def test_start_is_rows_and_one_step_is_their_means(backend):
    x = cases.normal(200, 4, seed=3)
    start = vqfast.kmeans(put(backend, x), 10, iterations=0, seed=5, backend=backend).codebook.cpu()
    rows = {tuple(r) for r in x.tolist()}
    assert all(tuple(c) in rows for c in start.tolist()) and len({tuple(c) for c in start.tolist()}) == 10
    after = vqfast.kmeans(put(backend, x), 10, iterations=1, seed=5, backend=backend).codebook
    indices = oracle.nearest(x, start).indices
    sums, counts = oracle.code_stats(x[None, None], indices[None, None], 10)
    mean = sums[0] / counts[0][:, None]  # each start is its own nearest row, so no code is empty
    spread = oracle.sums_bound(x[None, None], indices[None, None], 10)[0] / counts[0][:, None]
    close(after, mean, spread + 2 * ULP * mean.abs())


@pytest.mark.quick
def test_inertia_never_grows(backend):
    x = cases.normal(400, 3, seed=4)
    inertia = [float(vqfast.kmeans(put(backend, x), 15, iterations=i, backend=backend).inertia) for i in (0, 1, 2, 3, 5, 9, 20)]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in zip(inertia, inertia[1:])), inertia
    assert inertia[-1] < inertia[0]


@pytest.mark.quick
@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_same_seed_same_bits_for_any_thread_count(backend, init, set_threads):
    x = put(backend, cases.normal(3000, 6, seed=6))

    def run(count, seed):
        set_threads(count)
        return vqfast.kmeans(x, 25, iterations=4, init=init, seed=seed, backend=backend)

    first = run(1, 7)
    for count in (1, 2, 3):
        again = run(count, 7)
        same_bits(again.codebook, first.codebook, f"{count} threads"), same_bits(again.indices, first.indices)
    assert not torch.equal(run(1, 8).codebook, first.codebook), "another seed starts elsewhere"


def test_global_generator_is_left_alone(backend):
    """Initialising a layer must not shift a training run's random numbers."""
    x = put(backend, cases.normal(60, 3))
    state = torch.random.get_rng_state()
    vqfast.kmeans(x, 5, backend=backend), vqfast.kmeans(x, 5, init="k-means++", backend=backend)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.quick
def test_nonfinite_rows_are_left_out(backend):
    x = cases.normal(80, 4, seed=9)
    dirty = torch.cat([x[:30], torch.full((3, 4), torch.nan), x[30:], torch.tensor([[0.0, torch.inf, 0, 0]])])
    ours, clean = (vqfast.kmeans(put(backend, t), 9, seed=1, backend=backend) for t in (dirty, x))
    assert torch.isfinite(ours.codebook).all() and ours.indices.shape == (80,)
    same(ours.indices, oracle.nearest(x, ours.codebook.cpu()).indices)
    assert torch.isfinite(torch.as_tensor(clean.inertia))


@pytest.mark.quick
@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_fewer_distinct_rows_than_codes(backend, init):
    """k-means++ has no distance left to draw by, and most codes lose all rows."""
    x = cases.integers(3, 4, seed=10).repeat(20, 1)
    found = vqfast.kmeans(put(backend, x), 10, init=init, backend=backend)
    assert torch.isfinite(found.codebook).all() and float(found.inertia) == 0


@pytest.mark.quick
def test_as_many_codes_as_rows(backend):
    x = cases.normal(17, 3, seed=11)
    found = vqfast.kmeans(put(backend, x), 17, backend=backend)
    assert float(found.inertia) == 0 and found.indices.unique().numel() == 17


@pytest.mark.quick
def test_low_precision_and_strided_rows(backend):
    x = cases.normal(2, 24, 6, seed=12)
    plain = vqfast.kmeans(put(backend, x.bfloat16().float()), 7, backend=backend)
    for name, view in cases.views(x.bfloat16()).items():
        found = vqfast.kmeans(put(backend, view), 7, backend=backend)
        same(found.codebook, plain.codebook, name)


@pytest.mark.quick
def test_codes_to_start_from(backend):
    x = cases.normal(60, 3, seed=13)
    start = x[:9].clone()
    found = vqfast.kmeans(put(backend, x), 9, iterations=0, init=put(backend, start), backend=backend)
    same_bits(found.codebook, start)
    same(found.indices, oracle.nearest(x, start).indices)


def test_k_means_plus_plus_draws_by_squared_distance(backend):
    """All sets of 4 of 7 rows, as often as the paper's chances say: chi-square with 34 degrees of freedom, 99.9 % are under 65.2."""
    if backend != "cpu":
        pytest.skip("the draws are the same Python on every backend; thousands of them need the fast one")
    x = torch.tensor([[0.0], [1.0], [1.5], [4.0], [4.25], [9.0], [20.0]])
    chances = Counter()
    for order in itertools.permutations(range(7), 4):
        chance = 1 / 7
        for i in range(1, 4):
            weight = (x - x[list(order[:i])].T).square().amin(1)
            chance *= float(weight[order[i]] / weight.sum())
        chances[frozenset(order)] += chance
    seeds = 1500
    found = Counter()
    for seed in range(seeds):
        codes = vqfast.kmeans(x, 4, iterations=0, init="k-means++", seed=seed, backend=backend).codebook
        found[frozenset(int((x == code).nonzero()[0, 0]) for code in codes)] += 1
    assert sum(chances.values()) == pytest.approx(1) and set(found) <= set(chances)
    # Cells that expect less than 5 are one cell: the chi-square law does not hold for them alone.
    cells = {key: seeds * chance for key, chance in chances.items() if seeds * chance >= 5}
    rest = seeds - sum(cells.values())
    square = sum((found[key] - wanted) ** 2 / wanted for key, wanted in cells.items())
    square += (sum(n for key, n in found.items() if key not in cells) - rest) ** 2 / max(rest, 1)
    assert square < 65.2, square


@pytest.mark.quick
def test_rows_are_read_in_pieces(backend, monkeypatch):
    """Any cut gives Lloyd's codes, but for the rounding of sums to float32 once a piece; here all sums are exact."""
    x = cases.integers(500, 4, seed=15)
    whole = vqfast.kmeans(put(backend, x), 12, iterations=3, backend=backend)
    dirty = torch.cat([x[:77], torch.full((2, 4), torch.inf), x[77:]])
    for piece in (7, 500):
        monkeypatch.setattr(kmeans, "_PIECE", piece)
        for rows in (put(backend, x), put(backend, dirty), Recorded(put(backend, x))):
            found = vqfast.kmeans(rows, 12, iterations=3, backend=backend)
            same_bits(found.codebook, whole.codebook), same_bits(found.indices, whole.indices)


class Recorded:
    """A source that is no tensor, and remembers the largest number of rows that it was asked for."""

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.largest = values, tuple(values.shape), values.dtype, 0

    def __getitem__(self, at):
        rows = self.values[at]
        self.largest = max(self.largest, len(rows))
        return rows


@pytest.mark.quick
@pytest.mark.parametrize("options", [{}, {"batch_rows": 100}], ids=["lloyd", "mini_batch"])
def test_a_source_is_never_asked_for_more_than_a_piece(monkeypatch, options):
    monkeypatch.setattr(kmeans, "_PIECE", 128)
    source = Recorded(cases.normal(1000, 4, seed=16))
    vqfast.kmeans(source, 20, iterations=2, **options)
    assert 0 < source.largest <= 128


@pytest.mark.quick
def test_mini_batches_move_codes_as_written(backend):
    """One pass over shuffled runs: c <- c + (sum of the batch's rows - n c) / (rows given so far)."""
    x = cases.normal(330, 3, seed=17)
    start = x[torch.randperm(330, generator=cases.generator(1))[:4]]
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(11, generator=generator)  # runs of 32 rows, the last one of 10
    at = (order[:, None] * 32 + torch.arange(32)).flatten()
    codes, weight = start.double(), torch.zeros(4, 1)
    for batch in x[at[at < 330]].split(90):
        indices = oracle.nearest(batch, codes.float()).indices
        sums, counts = oracle.code_stats(batch[None, None], indices[None, None], 4)
        weight += counts[0][:, None]
        codes = (codes + (sums[0] - counts[0][:, None] * codes) / weight.clamp(min=1)).float().double()
    got = vqfast.kmeans(put(backend, x), 4, iterations=1, init=put(backend, start), seed=5, batch_rows=90, backend=backend)
    assert (weight > 0).all(), "no code without rows, else one would be re-seeded"
    close(got.codebook, codes, 90 * 4 * ULP * x.abs().amax())


@pytest.mark.quick
def test_mini_batches_find_clusters_and_are_deterministic(backend, set_threads):
    x, _ = blobs(each=200)
    x = put(backend, x)
    found = []
    for threads in (1, 2):
        set_threads(threads)
        found.append(vqfast.kmeans(x, 8, iterations=3, init="k-means++", batch_rows=256, seed=4, backend=backend))
    same_bits(found[0].codebook, found[1].codebook), same_bits(found[0].indices, found[1].indices)
    lloyd = vqfast.kmeans(x, 8, init="k-means++", backend=backend)
    assert float(found[0].inertia) <= 1.2 * float(lloyd.inertia)
    moved = vqfast.kmeans(x, 8, iterations=3, init="k-means++", batch_rows=256, seed=5, backend=backend)
    assert not torch.equal(moved.codebook, found[0].codebook), "another seed, another order"


@pytest.mark.quick
def test_codes_that_no_batch_chose_are_moved(backend):
    x = cases.normal(300, 3, seed=18)
    start = torch.cat([x[:5], torch.full((2, 3), 1e6)])
    found = vqfast.kmeans(put(backend, x), 7, iterations=1, init=put(backend, start), batch_rows=100, backend=backend)
    assert found.indices.unique().numel() == 7 and found.codebook.abs().max() < 100


@pytest.mark.quick
@pytest.mark.parametrize("x, k, options", [
    (torch.ones(3, 2), 4, {}), (torch.full((5, 2), torch.nan), 1, {}), (torch.ones(0, 2), 1, {}), (torch.ones(5, 2), 0, {}),
    (torch.ones(5, 2), 2, {"init": "farthest"}), (torch.ones(5, 2), 2, {"iterations": -1}), (torch.ones(5, 2).long(), 2, {}),
    (torch.ones(5, 2), 2, {"batch_rows": 0}), (torch.ones(5, 2), 2, {"init": torch.ones(3, 2)}), ([[1.0, 2.0]], 1, {}),
    (torch.ones(5, 2), 2, {"init": torch.full((2, 2), torch.nan)}),
], ids=["too_few", "none_finite", "no_rows", "k_zero", "init", "iterations", "int64", "batch", "start", "list", "nan_start"])  # fmt: skip
def test_wrong_input(x, k, options):
    with pytest.raises((ValueError, TypeError)):
        vqfast.kmeans(x, k, **options)


@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("batch_rows", [None, 200])
def test_rows_whose_distances_or_sums_overflow(init, batch_rows):
    """One row so far out that its squared distance leaves float32, and many whose sum does: it ends, with finite codes."""
    x = cases.normal(1000, 4, seed=5)
    x[17] = 1e20
    x[500:700] = 3e37 * x[500:700].sign()
    found = vqfast.kmeans(x, 8, init=init, batch_rows=batch_rows, seed=1)
    assert found.codebook.isfinite().all()
