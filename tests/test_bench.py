"""The comparisons of `vqfast bench` and bench/: like is compared with like, and nothing wrong is timed."""

import json
from pathlib import Path

import pytest
import torch

from vqfast.cli import _peers, _timing, bench
from vqfast.cli._timing import check_codes, in_turns

ROOT = Path(__file__).parents[1]


def near_codes(rows: int, codes: int, dim: int = 8):
    """Rows so close to codes at integer points that every method must find them; and those codes' indices."""
    generator = torch.Generator().manual_seed(0)
    codebook = 4.0 * torch.stack([torch.arange(codes) // 4**d % 4 for d in range(dim)], dim=1)
    indices = torch.randint(codes, (rows,), generator=generator)
    return codebook[indices] + 0.1 * torch.randn(rows, dim, generator=generator), codebook, indices


def test_every_search_finds_clear_codes():
    x, codebook, indices = near_codes(300, 40)
    found = _peers.searches(x, codebook, compiled=False)
    assert list(found)[0] == "vqfast" and _peers.CDIST in found and _peers.EXPANDED in found
    for name, call in found.items():
        assert torch.equal(call(), indices), name


def test_a_wrong_code_is_not_timed():
    x, codebook, indices = near_codes(300, 40)
    check_codes(indices, x, codebook, sample=300)
    indices[123] = (indices[123] + 1) % 40
    with pytest.raises(RuntimeError, match="wrong code for 1 of 300 rows, so it is not timed"):
        check_codes(indices, x, codebook, sample=300)


@pytest.mark.parametrize("levels", [0, 3])
def test_layers_of_the_comparison_do_the_same_work(levels):
    """One training step from the same state: the same codes, gradient and (but for their smoothing) codebook."""
    x, codebook, _ = near_codes(300, 40)
    if levels:
        codebook = torch.stack([codebook * 0.25**level for level in range(levels)])
    made = _peers.layers(codebook)
    if _peers.LAYERS not in made:
        pytest.skip("vector-quantize-pytorch is not installed")
    ours, theirs = made["vqfast"], made[_peers.LAYERS]
    chosen, others = _peers.indices_of(ours, x), _peers.indices_of(theirs, x)
    assert chosen.shape == others.shape == ((300, levels) if levels else (300,))
    assert torch.equal(chosen, others) if not levels else torch.equal(chosen[:, 0], others[:, 0])
    bench.check_layer(chosen, x, codebook)
    _peers.training_step(ours, x)
    _peers.training_step(theirs, x)
    first = theirs.layers[0] if levels else theirs
    own = ours.codebook[0] if levels else ours.codebook
    # Their Laplace smoothing divides by (size + eps) / (total + K eps) * total: at most K eps / total away.
    torch.testing.assert_close(first._codebook.embed[0], own, rtol=1e-4, atol=1e-4)
    assert not torch.equal(own, codebook[0] if levels else codebook), "the step moved the codes"


def test_work_takes_turns(monkeypatch):
    monkeypatch.setattr(_timing, "BURST_SECONDS", float("inf"))
    seen = []
    times = in_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2, torch.device("cpu"))
    assert set(times) == {"a", "b"} and all(ms >= 0 for ms in times.values())
    assert "".join(seen) == "aabb" + "aaabbb" * 2


@pytest.fixture
def bench_folder(monkeypatch):
    pytest.importorskip("safetensors")
    if not (ROOT / "bench/data").is_dir():
        pytest.skip("this copy of the repository has no bench/data")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


def test_stored_latents_are_small_and_finite(bench_folder):
    import latents

    files = list(latents.FOLDER.glob("*.safetensors"))
    assert files and max(file.stat().st_size for file in files) < 1_400_000
    rows = latents.load_rows(latents.ROWS)
    assert rows.shape == (16_384, 64) and rows.isfinite().all() and rows.dtype == torch.float32
    for size in latents.CODES:
        codes = latents.load_codes(size)
        assert codes.shape == (size, 64) and codes.isfinite().all()
    assert latents.load_residual_codes().shape == (8, 1024, 64)
    with pytest.raises(ValueError, match="no codebook with 7 codes"):
        latents.load_codes(7)


def test_stored_latents_are_those_of_the_stored_model(bench_folder):
    """Rows and codes of two models would make a codebook that fits nothing; the files' headers name the weights."""
    import latents
    from safetensors import safe_open

    from vqfast.tokens import model_hash
    from vqfast.train.runs import find_model

    weights = model_hash(find_model(latents.FOLDER / "model")[0].float().state_dict())
    for file in latents.FOLDER.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            assert stored.metadata()["weights"] == weights, file.name


def test_the_report_shows_its_numbers_and_conditions(bench_folder, tmp_path):
    pytest.importorskip("matplotlib")
    from render import render

    shape = {"data": "latents", "rows": 512, "codes": 1024}
    result = {
        "date": "2001-02-03T04:05:06",
        "quick": False,
        "rounds": 7,
        "machine": {
            "cpu": "a processor",
            "cores": 2,
            "cpu level": "scalar",
            "threads": 1,
            "versions": {"torch": "2"},
            "commit": "abc",
            "changed files": [],
            "load average at the start": [0.1, 0, 0],
            "load average at the end": [0.2, 0, 0],
        },
        "search": [
            {
                **shape,
                "shape": "one",
                "ms": {"vqfast": 2.0, _peers.CDIST: 50.0},
                "same codes": {"vqfast": 1.0, _peers.CDIST: 0.5},
            },
            {"shape": "another", "left out": "a reason"},
        ],
        "training step": [{**shape, "levels": 8, "ms": {"vqfast": 1.0, _peers.LAYERS: 30.0}}],
        "memory": [{**shape, "MiB": {"vqfast": 3.0, _peers.CDIST: 4096.0}}],
    }
    render(json.loads(json.dumps(result)), "run.json", tmp_path)
    page = (tmp_path / "search.md").read_text()
    for said in (
        "**2.00**",
        "50.0 (25.0x)",
        "50.00 %",
        "30.0 (30.0x)",
        "4,096",
        "a processor",
        "abc",
        "another was left out",
    ):
        assert said in page, said
    assert (tmp_path / "search.svg").read_text().lstrip().startswith("<?xml")
