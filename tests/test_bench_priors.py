"""The benchmarks of the priors: nothing wrong is timed, and the pages say what was measured."""

import json
from pathlib import Path

import pytest
import torch

from vqfast.models import GatedPixelCNN

ROOT = Path(__file__).parents[1]
MACHINE = {
    "cpu": "a processor",
    "cpu level": "scalar",
    "threads": 1,
    "versions": {"torch": "2"},
    "commit": "abc",
    "changed files": [],
    "load average at the start": [0.1, 0, 0],
    "load average at the end": [0.2, 0, 0],
}
DATE = "2001-02-03T04:05:06"


@pytest.fixture
def bench_folder(monkeypatch):
    if not (ROOT / "bench").is_dir():
        pytest.skip("this copy of the repository has no bench folder")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


def test_wrong_tokens_and_wrong_logits_are_not_timed(bench_folder, monkeypatch):
    import bench_sample

    torch.manual_seed(0)
    prior = GatedPixelCNN(codebook_size=20, channels=8, layers=2).eval()
    assert bench_sample.check(prior, 4) == 16
    true_sample = bench_sample.sample_codes

    def last_token_differs(prior, *size, mode=None, **options):
        tokens = true_sample(prior, *size, mode=mode, **options)
        tokens[0, -1, -1] = (tokens[0, -1, -1] + (mode == "naive")) % 20
        return tokens

    monkeypatch.setattr(bench_sample, "sample_codes", last_token_differs)
    with pytest.raises(SystemExit, match="RED: tokens differ"):
        bench_sample.check(prior, 4)
    monkeypatch.setattr(bench_sample, "canonical_logits", lambda p, codes: (p(codes).movedim(1, -1) + 0.1, None))
    with pytest.raises(SystemExit, match="RED: logits differ"):
        bench_sample.check(prior, 4)


def test_the_sampling_page_shows_ratios_and_conditions(bench_folder, tmp_path):
    import bench_sample

    drawn = {"network": "a network", "size": 32, "batch": 2, "lookahead": 3, "seconds": 0.5, "evaluated": 1.25}
    result = {
        "date": DATE, "seconds": 9, "repeats": 5, "machine": MACHINE, "tokens checked": {"a network": 1024},
        "sampling": [drawn | {"forward seconds": 0.1, "forward": "plain", "loop seconds": 102.4}],
        "sizes": [{"network": "a network", "size": 64, "seconds per token": 7e-5}],
        "pixels": {"side": 128, "latents": 32, "latent seconds": 0.25, "pixel seconds": 10.0},
        "training": {"size": 32, "batch": 4, "seconds": {"full-size masked kernels": 3.0, "vqfast": 1.5}},
    }  # fmt: skip
    bench_sample.render(json.loads(json.dumps(result)), "run.json", tmp_path)
    page = (tmp_path / "sampling.md").read_text()
    for said in ("**205x**", "102 s (100 ms", "244 us", "1.25", "1,024 tokens", "70 us", "**40x**", "2.00x", "a processor", "abc"):
        assert said in page, said


def test_the_compression_page_says_where_the_codes_lose(bench_folder, tmp_path):
    import compress_photos

    ours = {"mse": 0.01, "psnr": 20.0, "ssim": 0.5, "lpips": 0.3}
    codecs = [
        {"name": "JPEG", "quality": 1, "bytes": 2000.0, "too_large": True, "mse": 0.02, "psnr": 17.0, "ssim": 0.4, "lpips": 0.4},
        {"name": "WebP", "quality": 9, "bytes": 1001.0, "too_large": False, "mse": 0.009, "psnr": 20.5, "ssim": 0.45, "lpips": 0.2},
    ]
    entry = {
        "model": {"kind": "vqvae", "stages": 3}, "size": [360, 720], "pictures": 7, "raw bits per pixel": 0.15625,
        "trained on": "cifar10",
        "training steps": [1000, 400], "training seconds": [600.0, 120.0], "bits_per_pixel": 0.12, "token_bytes": 999.0,
        "codecs": codecs, "notes": [], **ours,
    }  # fmt: skip
    result = {"date": DATE, "machine": MACHINE, "models": [entry]}
    compress_photos.render(json.loads(json.dumps(result)), "run.json", tmp_path)
    page = (tmp_path / "compression.md").read_text()
    assert "better than JPEG in MSE, PSNR, SSIM, LPIPS." in page and "cannot go lower" in page
    assert "better than WebP in SSIM; worse in MSE, PSNR, LPIPS." in page
    assert "0.120 bits per pixel" in page and "0.156 bits per pixel" in page and "7 photographs" in page and "on cifar10" in page


def test_photographs_are_split_once_and_for_all(bench_folder, tmp_path):
    import compress_photos

    for number in range(20):
        (tmp_path / f"{number:02}.png").write_bytes(b"not opened")
    compress_photos.split(tmp_path, tmp_path / "split")
    assert sorted(path.name for path in (tmp_path / "split" / "test").iterdir()) == ["05.png", "16.png"]
    assert len(list((tmp_path / "split" / "train").iterdir())) == 18


def test_the_generation_page_adds_the_levels_and_shows_the_curve(bench_folder, tmp_path):
    pytest.importorskip("matplotlib")
    import cifar10_generation

    training = {"steps": 1500, "batch": 32, "seconds": 60.0}
    level = {"shape": [4, 4], "bits_per_code": 7.5, "unigram": 8.5, "uniform": 9.0, "training": training}
    levels = [level | {"level": n, "prior per dim": 0.125 * (n + 1), "unigram per dim": 0.25} for n in (1, 0)]
    points = [{"fraction": f, "kept": 10, "accuracy": 0.3, "diversity": d} for f, d in ((1.0, 1.0), (0.25, 0.875))]
    result = {
        "date": DATE, "machine": MACHINE, "count": 500, "autoencoder": training, "bits": levels, "curve": points,
        "drawing": {"pictures": 2000, "seconds": 26.0},
        "judge's accuracy": {"test pictures": 0.625, "their reconstructions": 0.375},
    }  # fmt: skip
    cifar10_generation.render(json.loads(json.dumps(result)), "run.json", tmp_path)
    page = (tmp_path / "priors.md").read_text()
    for said in ("**0.3750** | 0.5000", "**7.500** | 8.500", "62.5 %", "| 0.25 | 10 | 30.0 % | 0.875 |", "3 minutes", "2,000 pictures"):
        assert said in page, said
    assert "FID" not in page and (tmp_path / "priors_curve.png").stat().st_size > 1000
    quality = {"drawn": {"FID": 123.45, "precision": 0.5, "recall": 0.25}}
    cifar10_generation.render(result | {"against test pictures": quality}, "run.json", tmp_path)
    assert "| drawn | 123.5 | 0.500 | 0.250 |" in (tmp_path / "priors.md").read_text()
