"""train-prior, sample, compress and decompress, end to end on tiny models."""

import argparse
import importlib
import json

import pytest
import torch

from vqfast.cli import demo_generate
from vqfast.data import open_picture, photographs, save_picture
from vqfast.models import VQVAE, pixels_to_float
from vqfast.models.vqvae2 import VQVAE2

TINY = [
    "--size",
    "32",
    "--channels",
    "8",
    "--layers",
    "2",
    "--batch-size",
    "3",
    "--limit",
    "5",
    "--checkpoint-every",
    "2",
]


def command(name, *arguments):
    """Runs a command as the command line would, errors left alone."""
    module = importlib.import_module(f"vqfast.cli.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert module.run(parser.parse_args([str(a) for a in arguments])) == 0


def test_help_lists_no_key_that_the_codes_decide():
    text = importlib.import_module("vqfast.cli.train_prior").EPILOG
    assert "model.channels" in text
    assert not [key for key in ("codebook_size", "classes", "condition_codes", "condition_scale") if f"model.{key} " in text]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with two untrained models, two pictures and a prior for each model."""
    folder = tmp_path_factory.mktemp("priors")
    torch.manual_seed(0)
    pictures = photographs("train", size=32)
    x = pixels_to_float(torch.stack([pictures[i] for i in range(4)]))
    small = dict(hidden=8, residual_hidden=4, residual_layers=1)
    one = VQVAE(**small, dim=4, codebook_size=9).eval()
    two = VQVAE2(**small, dims=(4, 5), codebook_sizes=(9, 6)).eval()
    for name, model in (("one", one), ("two", two)):
        model.init_codebooks_(x)
        model.save_pretrained(folder / name)
        command("train_prior", folder / name, "photographs", "--out", folder / f"{name}-prior", "--steps", 4, *TINY)
    for i in range(2):
        save_picture(folder / "pictures" / "sub" / f"{i}.png", pictures[i][:, : 30 - i])
    return folder


def weights(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("model.safetensors"))}


def test_a_stopped_training_resumes_to_the_same_bytes(work, tmp_path):
    out = tmp_path / "prior"
    command("train_prior", work / "two", "photographs", "--out", out, "--steps", 2, *TINY)
    assert weights(out) != weights(work / "two-prior")
    command("train_prior", work / "two", "photographs", "--out", out, "--steps", 4, "--resume", *TINY)
    assert weights(out) == weights(work / "two-prior") and len(weights(out)) == 2


def test_training_refuses_to_mix_runs(work):
    with pytest.raises(Exception, match="--resume"):
        command("train_prior", work / "one", "photographs", "--out", work / "one-prior", *TINY)
    with pytest.raises(Exception, match="cannot change: model.channels 8 -> 9"):
        command(
            "train_prior",
            work / "one",
            "photographs",
            "--out",
            work / "one-prior",
            "--resume",
            *TINY,
            "--channels",
            "9",
        )
    with pytest.raises(Exception, match="no labels"):
        command("train_prior", work / "one", "photographs", "--out", work / "new", *TINY, "--labels")


@pytest.mark.parametrize("name", ["one", "two"])
def test_samples_are_a_sheet_or_a_folder_and_do_not_depend_on_the_batch(work, tmp_path, name):
    base = (work / name, work / f"{name}-prior")
    command("sample", *base, tmp_path / "a.png", "--count", 5, "--quiet")
    command("sample", *base, tmp_path / "b.png", "--count", 5, "--quiet", "--batch-size", 2)
    command("sample", *base, tmp_path / "c.png", "--count", 5, "--quiet", "--seed", 1)
    a, b, c = (open_picture(tmp_path / f"{n}.png") for n in "abc")
    assert a.shape == (3, 2 * 34 - 2, 3 * 34 - 2)
    # The codes are equal; the decoder's convolutions may round differently in another batch size, so a level may
    # move by one.
    assert (a.int() - b.int()).abs().max() <= 1
    assert not torch.equal(a, c)
    command("sample", *base, tmp_path / "many", "--count", 3, "--quiet")
    assert len(list((tmp_path / "many").glob("*.png"))) == 3
    with pytest.raises(Exception, match="no class"):
        command("sample", *base, tmp_path / "d.png", "--classes", "cat", "--quiet")


@pytest.mark.parametrize("name", ["one", "two"])
def test_compressed_pictures_come_back_as_the_model_reconstructs_them(work, tmp_path, name):
    pytest.importorskip("constriction", reason="constriction is not installed")
    base = (work / name, work / f"{name}-prior")
    command("compress", *base, work / "pictures", tmp_path / "x.vqe")
    command("decompress", *base, tmp_path / "x.vqe", tmp_path / "out")
    command("encode", base[0], work / "pictures", tmp_path / "x.tokens")
    command("decode", base[0], tmp_path / "x.tokens", tmp_path / "plain")
    for i in range(2):
        got, want = (open_picture(tmp_path / kind / "sub" / f"{i}.png") for kind in ("out", "plain"))
        assert got.shape == want.shape == (3, 30 - i, 32)
        assert (got.int() - want.int()).abs().max() <= 1
    # `vqfast eval --prior` counts what this file holds, but for its header (18 bytes around the JSON) and the names.
    content = (tmp_path / "x.vqe").read_bytes()
    header = 18 + int.from_bytes(content[10:14], "little")
    command("eval", base[0], "--prior", base[1], "--data", work / "pictures", "--json", tmp_path / "eval.json")
    judged = json.loads((tmp_path / "eval.json").read_text())
    assert 2 * judged["token_bytes"] == len(content) - header - 2 * len("sub/0.png")
    other = "two" if name == "one" else "one"
    with pytest.raises(Exception, match="was trained on another model"):
        command("decompress", work / other, base[1], tmp_path / "x.vqe", tmp_path / "no")
    with pytest.raises(Exception, match="model"):
        command("decompress", work / other, work / f"{other}-prior", tmp_path / "x.vqe", tmp_path / "no")


def test_the_demo_draws_pictures_and_says_what_they_cost(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no CIFAR-10 there: the embedded photographs
    monkeypatch.setitem(demo_generate.PHOTOGRAPHS, "codes.views", 3)
    command("demo_generate", "--steps", 2, "--out", tmp_path / "demo")
    said = capsys.readouterr().out
    assert "(photographs)" in said and "level 1 (4x4)" in said and "level 0 (8x8)" in said and "40 pictures of 80 codes" in said
    assert open_picture(tmp_path / "demo" / "samples.png").shape[2] == 4 + 8 * 100
    assert open_picture(tmp_path / "demo" / "reconstruction.png").shape[2] == 4 + 10 * 100
    # Classes get a row each.
    drawn = torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
    labelled = demo_generate.sample_sheet(drawn, torch.tensor([0, 0, 0, 1, 1, 1]), ["a", "b"])
    assert labelled.size == (4 + 3 * 68, 4 + 2 * 88)
