"""The longer benchmarks' arithmetic and pages, from made-up runs: what is shown is what was measured."""

import json
from pathlib import Path

import pytest
import torch

from vqfast.cli._peers import CDIST, FAISS, LAYERS

ROOT = Path(__file__).parents[1]
MACHINE = {
    "cpu": "a processor",
    "cores": 2,
    "cpu level": "scalar",
    "threads": 1,
    "versions": {"torch": "2"},
    "commit": "abc",
    "changed files": [],
    "load average at the start": [0.1, 0, 0],
    "load average at the end": [0.2, 0, 0],
}


@pytest.fixture(autouse=True)
def bench_folder(monkeypatch):
    for needed in ("safetensors", "matplotlib", "PIL", "vector_quantize_pytorch"):
        pytest.importorskip(needed)
    if not (ROOT / "bench/data").is_dir():
        pytest.skip("this copy of the repository has no bench/data")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


def through_json(result):
    return json.loads(json.dumps(result))


def shows(page: str, *said: str) -> None:
    for words in said:
        assert words in page, f"{words!r} is not in\n{page}"


# ---- sweep ---------------------------------------------------------------------------------------------------------


def shape(data, codes, dim, ms, road="panels", panels=10.0, evaluations=5.0, **more):
    counts = {"panels": panels, "evaluations": evaluations, "candidates": 1.0, "road": road, "panels of the codebook": 100}
    entry = {"data": data, "rows": 16_384, "codes": codes, "dim": dim, "ms": ms, "left out": {}, "rows checked": 64}
    return entry | {"counts": counts | {"distinct codes": codes}} | more


def test_the_sweep_page(tmp_path):
    from sweep_page import render

    result = {
        "date": "2001-02-03T04:05:06", "quick": False, "rounds": 5, "seconds": 77, "noise": 1e-3, "latents": "a model", "machine": MACHINE,
        "limits": {"seconds": 8, "GiB": 5},
        "shapes": [
            shape("latents", 8192, 64, {"vqfast": 10.0, CDIST: 500.0}),
            shape("latents", 65_536, 64, {"vqfast": 40.0}, panels=25.0, evaluations=12.5, **{"left out": {CDIST: "N x K of 9 GiB"}}),
            shape("latents", 1_048_576, 64, {"vqfast": 900.0}),
            shape("latents", 8192, 256, {"vqfast": 17.0}),
            shape("isotropic", 8192, 64, {"vqfast": 50.0, CDIST: 400.0, FAISS: 100.0}, road="dense"),
        ],
        "memory": [{"data": "latents", "rows": 16_384, "codes": 1_048_576, "dim": 64, "MiB": {"vqfast": 321.0}}],
        "adversaries": [{"data": "latents", "rows": 16_384, "codes": 8192, "dim": 64, "ms": {"dense": 50.0, "all rows equal": 60.0}}],
        "widths": [{"data": "latents", "codes": 8192, "rounds": 40, "ms": {"64": 10.0, "256": 13.0}}],
    }  # fmt: skip
    render(through_json(result), "run.json", tmp_path)
    page = (tmp_path / "sweep.md").read_text()
    shows(page, "15.0 to 37.5: 2.50x", "turns 40 times | 1.30 |", "900 ms", "321 MiB", "8.0x | 5x at least", "2.0x | 1.3x at least", "(N x K of 9 GiB)")
    shows(page, "1.20x (all rows equal, latents)", "10.0 | 10.00 %", "500 (50.0x)", "abc", "a model", "77 s")
    assert (tmp_path / "sweep.svg").read_text().lstrip().startswith("<?xml")


def test_latents_in_more_dimensions_keep_their_distances():
    import sweep

    source = sweep.Source(sweep.FOLDER, None)
    plain, wide = (sweep.Case("latents", 50, 300, dim).load(source) for dim in (64, 256))
    assert wide[0].shape == (50, 256) and wide[1].shape == (300, 256) and plain[1].shape == (300, 64)
    near, far = (torch.cdist(x.double(), c.double()).square() for x, c in (plain, wide))
    added = 2 * sweep.NOISE * float(plain[0].var(0).sum())  # noise of both, on average; cross terms vary about it
    assert (far - near).mean() == pytest.approx(added, rel=0.5)
    few = sweep.Case("latents", 50, 300, 4).load(source)
    assert (torch.cdist(*few).double() <= near.sqrt() + 1e-3).all(), "a projection shortens"


def test_methods_are_left_out_for_a_reason():
    import sweep

    rates, small, large = sweep.Rates(), *(sweep.Case("latents", 16_384, k, 64) for k in (1024, 262_144))
    assert not rates.reason(CDIST, small) and "16 GiB" in rates.reason(CDIST, large) and not rates.reason(FAISS, large)
    rates.learn(small, {FAISS: 40.0})  # 256 times as many codes: 10 s
    rates.learn(sweep.Case("latents", 16_384, 1024, 4), {FAISS: 20.0})  # small shapes cost more per number
    assert rates.reason(FAISS, large) == "about 10 s" and not rates.reason(FAISS, small)
    assert not rates.reason(FAISS, sweep.Case("isotropic", 16_384, 262_144, 64)), "other data, other times"


def test_adversaries_are_what_they_say():
    import sweep

    x, codebook = torch.randn(30, 8), torch.randn(200, 8)
    made = {name: (rows, codes) for name, rows, codes in sweep.adversaries(x, codebook)}
    assert len(made["90 % of the codes identical"][1].unique(dim=0)) in (20, 21)
    assert len(made["all rows equal"][0].unique(dim=0)) == len(made["all codes identical"][1].unique(dim=0)) == 1
    assert int((made["one code of norm 1e30"][1].abs() > 1e29).any(1).sum()) == 1


# ---- k-means and training ------------------------------------------------------------------------------------------


def test_the_k_means_page(tmp_path):
    import bench_kmeans

    run = {"wall": 1.5, "cpu": 2.0, "iterations": 10, "inertia": 0.25}
    methods = {bench_kmeans.OURS: run, "another": run | {"cpu": 9.0, "left out": "level not reached in 20 iterations"}}
    compared = [{"rows": 1000, "dim": 64, "codes": 20, "level": 0.2, "methods": methods}]
    about = {"date": "2001-02-03T04:05:06", "quick": False, "data": "some rows", "command": "python it", "machine": MACHINE}
    bench_kmeans.render(through_json(about | {"compared": compared}), "run.json", tmp_path)
    page = (tmp_path / "kmeans.md").read_text()
    shows(page, "**1.50 (2.00)**", "4.5x", "level not reached in 20 iterations", "1,000 rows of 64, K = 20", "some rows", "abc")


def test_a_method_runs_until_it_reaches_the_level():
    import bench_kmeans

    rows = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    asked = []

    def method(rows, start, iterations):
        asked.append(iterations)
        return bench_kmeans.ours()(rows, start, iterations)

    one, many = (bench_kmeans.inertia(rows, bench_kmeans.ours()(rows, rows[:9], n)) for n in (1, 6))
    run = bench_kmeans.reach(method, (1, 3, 6, 9), rows, rows[:9], many * 1.0001, 60)
    assert many < one and asked == [1, 1, 3, 6] and run["iterations"] == 6 and "left out" not in run
    assert "left out" in bench_kmeans.reach(method, (1,), rows, rows[:9], many, 60)


def test_the_page_of_training(tmp_path):
    import train_large_codebook as train

    assert train.smooth([1.0] * 9 + [11.0])[-2:] == [float("inf"), 2.0]
    loss = [1 / (1 + i) for i in range(30)]
    ours = {"method": "vqfast", "rows": 2048, "loss": loss, "cpu": [0.1] * 30, "wall": [0.2] * 30, "peak MiB": 900.0}
    theirs = ours | {"method": LAYERS, "loss": loss[:20], "cpu": [4.0] * 20, "wall": [5.0] * 20, "peak MiB": 3800.0}
    at = train.smooth(loss)[19]
    assert train.seconds_to(ours, at, "cpu") == pytest.approx(2.0) and train.seconds_to(theirs, at, "wall") == pytest.approx(100)
    assert train.seconds_to(theirs, 0.0, "cpu") is None and train.loss_after(ours, 1.95) == train.smooth(loss)[18]
    runs = [ours, theirs, ours | {"rows": 16_384}, {"method": LAYERS, "rows": 16_384, "failed": "can't allocate memory"}]
    about = {"date": "2001-02-03T04:05:06", "quick": False, "codes": 65_536, "warm-up steps": 100, "memory limit GiB": 12}
    train.render(through_json(about | {"machine": MACHINE, "runs": runs}), "run.json", tmp_path)
    page = (tmp_path / "train_large_codebook.md").read_text()
    shows(page, "**0.10 (0.20)**", "4.00 (5.00), 40.0x", "out of memory", "3,800", "65,536 codes", "80.0 s that", "abc")
    assert (tmp_path / "train_large_codebook.svg").read_text().lstrip().startswith("<?xml")
