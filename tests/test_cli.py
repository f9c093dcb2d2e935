"""The command line as its users meet it: every command works, and every mistake ends in one sentence and exit code
2.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqfast import cli
from vqfast.data import open_picture, save_picture
from vqfast.models import VAE, VQVAE
from vqfast.tokens import TokenReader, TokenWriter, model_hash
from vqfast.train.evaluate import restore
from vqfast.train.runs import find_model

SMALL = ["--steps", "4", "--batch-size", "4", "--size", "16", "--threads", "1"]
for key, value in {
    "model.hidden": 8,
    "model.residual_hidden": 4,
    "model.dim": 4,
    "model.codebook_size": 16,
    "train.log_every": 2,
    "train.init_pictures": 8,
}.items():
    SMALL += ["--set", f"{key}={value}"]


def vqfast(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command, run in this process."""
    try:
        code = cli.main([str(part) for part in argv])
    except SystemExit as error:  # argparse
        code = error.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with four good pictures of three sizes, one of them in a sub-folder, and two files that are no
    pictures.
    """
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, (height, width) in {
        "a.png": (32, 40),
        "b.png": (32, 40),
        "c.jpg": (21, 33),
        "sub/a.png": (16, 16),
    }.items():
        save_picture(folder / name, torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8)))
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "text.jpg").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert cli.main(["train", "--data", str(pictures), "--out", str(folder), *SMALL]) == 0
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model of the same shape."""
    torch.manual_seed(1)
    return VQVAE(hidden=8, residual_hidden=4, dim=4, codebook_size=16).save_pretrained(tmp_path_factory.mktemp("other"))


# ---- the commands ----


def test_overview_lists_every_command_and_each_explains_itself(capsys):
    for argv in ([], ["--help"]):
        code, out, _ = vqfast(capsys, *argv)
        assert code == 0 and all(f"\n  {name} " in out for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        code, out, _ = vqfast(capsys, name, "--help")
        assert code == 0 and f"vqfast {name}" in out
    code, out, _ = vqfast(capsys, "--version")
    assert code == 0 and out.startswith("vqfast ")


def test_python_m_vqfast_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "vqfast", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "there is no command 'nonsense'" in done.stderr and "Traceback" not in done.stderr


def test_train_then_resume_with_more_steps(run, capsys, tmp_path):
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 4
    code, out, _ = vqfast(capsys, "train", "--resume", run, "--steps", 6)
    assert code == 0 and "changed: train.steps 4 -> 6" in out and "from step 4 to 6" in out
    assert out.count("skipped: ") == 2 and "broken.png" in out, (
        "pictures that cannot be read are named, training goes on"
    )


def test_train_from_toml_and_preset_with_overrides(pictures, capsys, tmp_path):
    (tmp_path / "my.toml").write_text(
        '[model]\nhidden = 8\nresidual_hidden = 4\ncodebook_size = 32\n[data]\nsource = "'
        + str(pictures)
        + '"\nsize = 16\n[train]\nsteps = 9\n'
    )
    code, out, _ = vqfast(
        capsys,
        "train",
        tmp_path / "my.toml",
        "--preset",
        "photos",
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        "--batch-size",
        2,
        "--set",
        "model.codebook_size=16",
        "--set",
        "train.init=none",
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert code == 0 and config["model"]["hidden"] == 8 and config["model"]["codebook_size"] == 16
    assert config["train"]["steps"] == 1 and config["data"]["flip"], "flag over file, preset where nothing else speaks"


def test_tokens_go_there_and_back(run, pictures, capsys, tmp_path):
    code, out, _ = vqfast(capsys, "encode", run, pictures, tmp_path / "t.vqt")
    assert code == 0 and "4 pictures, 2 skipped" in out and "broken.png" in out and "text.jpg" in out
    code, out, _ = vqfast(capsys, "decode", run, tmp_path / "t.vqt", tmp_path / "out")
    assert code == 0 and "4 pictures" in out
    model, _, _ = find_model(run)
    names = {"a.png": "a.png", "b.png": "b.png", "c.jpg": "c.png", "sub/a.png": "sub/a.png"}
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")) == sorted(
        names.values()
    )
    with TokenReader(tmp_path / "t.vqt") as reader:
        records = {record.name: record for record in reader}
    assert records.keys() == names.keys()
    for source, target in names.items():
        original, decoded = open_picture(pictures / source), open_picture(tmp_path / "out" / target)
        assert decoded.shape == original.shape == (3, records[source].height, records[source].width)
        # Convolutions of one picture and of two may differ in the last bits, so a level may round the other way.
        assert (decoded.int() - restore(model, original[None])[0][0].int()).abs().max() <= 1


def test_encode_one_picture(run, pictures, capsys, tmp_path):
    assert vqfast(capsys, "encode", run, pictures / "c.jpg", tmp_path / "t.vqt")[0] == 0
    with TokenReader(tmp_path / "t.vqt") as reader:
        (record,) = reader
    assert (record.name, record.width, record.height, record.levels[0].shape) == ("c.jpg", 33, 21, (6, 9))


def test_reconstruct_writes_pairs(run, pictures, capsys, tmp_path):
    code, out, _ = vqfast(capsys, "reconstruct", run, pictures, tmp_path / "pairs")
    assert code == 0 and "4 pairs" in out and "broken.png" in out
    pair = np.array(Image.open(tmp_path / "pairs" / "a.png"))
    assert (
        pair.shape == (32, 84, 3)
        and (pair[:, :40] == np.array(Image.open(pictures / "a.png"))).all()
        and (pair[:, 40:44] == 255).all()
    )


def test_eval_prints_and_writes_every_figure(run, pictures, capsys, tmp_path):
    code, out, _ = vqfast(capsys, "eval", run, "--data", pictures, "--json", tmp_path / "e.json")
    assert code == 0
    for word in (
        "MSE",
        "PSNR",
        "SSIM",
        "bits/dim",
        "perplexity",
        "of the codebook used",
        "bits per pixel",
        "JPEG quality",
        "WebP quality",
        "cannot go lower",
    ):
        assert word in out, word
    figures = json.loads((tmp_path / "e.json").read_text())
    assert figures["pictures"] == 4 and figures["codecs"][0]["too_large"], (
        "a JPEG cannot be as small as these few tokens"
    )
    code, out, _ = vqfast(capsys, "eval", run, "--no-codecs", "--pictures", 2)
    assert code == 0 and "training pictures themselves" in out and "JPEG" not in out


def test_sweep_compares_and_does_not_repeat_what_is_done(pictures, capsys, tmp_path):
    argv = [
        "sweep",
        "--data",
        pictures,
        *SMALL,
        "--beta",
        0.1,
        0.5,
        "--codebook-sizes",
        4,
        16,
        "--pictures",
        2,
        "--out",
        tmp_path,
    ]
    code, out, _ = vqfast(capsys, *argv)
    assert code == 0 and out.count("step      4/4") == 4
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert lines[0].startswith("beta,codebook_size,psnr") and len(lines) == 5 and (tmp_path / "sweep.png").exists()
    config = json.loads((tmp_path / "beta0.5-K4" / "config.json").read_text())
    assert (config["model"]["commitment_weight"], config["model"]["codebook_size"]) == (0.5, 4)
    code, out, _ = vqfast(capsys, *argv)
    assert (
        code == 0
        and "4/4" not in out.replace("4 of 4", "")
        and len((tmp_path / "sweep.csv").read_text().splitlines()) == 5
    )


def test_doctor_names_every_backend_with_a_reason(capsys, monkeypatch):
    monkeypatch.setenv("VQFAST_NUMBERS", "7")
    code, out, _ = vqfast(capsys, "doctor")
    assert code == 0 and torch.__version__ in out and "VQFAST_NUMBERS=7" in out and "numpy" in out
    for backend in ("cpu", "cuda", "triton", "reference"):
        assert f"    {backend:<10}can" in out


def test_data_lists_what_is_here(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, _ = vqfast(capsys, "data")
    assert code == 0 and "cifar10    not here; fetch it with: vqfast data cifar10" in out


def test_bench_checks_then_times(capsys):
    code, out, _ = vqfast(capsys, "bench", "--rows", 64, "--dim", 8, "--codebook-sizes", 16, "--repeats", 2)
    assert code == 0 and "plain ms" in out and "nearest: runs on" in out


def test_timing_refuses_a_wrong_quantizer(monkeypatch):
    from vqfast.cli import _timing

    z, codebook = torch.randn(50, 4), torch.randn(8, 4)
    monkeypatch.setattr(_timing, "true_nearest", lambda z, codebook: torch.zeros(len(z), dtype=torch.int64))
    with pytest.raises(RuntimeError, match="not timed"):
        _timing.compare_steps(z, codebook, 1)


def test_the_plain_layer_of_the_comparison_does_the_same_work():
    """After a step from the same state both layers hold the same codebook, so the times compare like with like."""
    from vqfast.cli._timing import PlainQuantizer
    from vqfast.nn import VectorQuantizerEMA

    torch.manual_seed(0)
    z = torch.randn(500, 4)
    ours, plain = VectorQuantizerEMA(4, 8).train(), PlainQuantizer(4, 8).train()
    plain.codebook.copy_(ours.codebook)
    plain.cluster_sum.copy_(ours.codebook)
    out, (quantized, indices, loss, perplexity) = ours(z), plain(z)
    assert torch.equal(out.indices, indices) and torch.allclose(out.quantized, quantized, atol=1e-6)
    assert torch.allclose(out.loss, loss, rtol=1e-5) and torch.allclose(out.perplexity, perplexity, rtol=1e-4)
    assert torch.allclose(ours.codebook, plain.codebook, rtol=1e-5, atol=1e-6)


def test_demo_shows_everything_and_spares_what_is_there(capsys, tmp_path):
    (tmp_path / "demo").mkdir()
    folder = tmp_path / "demo-2"
    code, out, _ = vqfast(capsys, "demo", "--steps", 2, "--out", tmp_path / "demo")
    assert code == 0
    for word in ("perplexity", "usage", "PSNR", "plain PyTorch", "ratio", "reconstruction.png", "photographs.vqt"):
        assert word in out, word
    for name in ("reconstruction.png", "plots/training.png", "plots/training.svg", "model/model.safetensors"):
        assert (folder / name).stat().st_size > 0
    with TokenReader(folder / "photographs.vqt") as reader:
        assert len(list(reader)) == 16
    assert not list((tmp_path / "demo").iterdir())


# ---- the mistakes ----


def test_every_mistake_is_one_sentence_and_exit_code_2(run, other, pictures, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no picture")
    (tmp_path / "bad.toml").write_text("[model\n")
    (tmp_path / "typo.toml").write_text("[model]\ncodebok_size = 4\n")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "note.txt").write_text("hello")
    VAE(hidden=8, residual_hidden=4, dim=4).save_pretrained(tmp_path / "vae")
    assert cli.main(["encode", str(run), str(pictures), str(tmp_path / "t.vqt")]) == 0
    content = (tmp_path / "t.vqt").read_bytes()
    (tmp_path / "cut.vqt").write_bytes(content[:-10])
    (tmp_path / "altered.vqt").write_bytes(content[:150] + bytes([content[150] ^ 1]) + content[151:])
    capsys.readouterr()
    out = tmp_path / "out"
    mistakes = [
        (["trian"], "did you mean train"),
        (["train", "--preset", "cifr10", "--out", out], "did you mean cifar10"),
        (["train", "--preset", "imagenet128", "--out", out], "--data FOLDER"),
        (["train", "--data", tmp_path / "nowhere", "--out", out], "there is no folder"),
        (["train", "--data", tmp_path / "empty", "--out", out], "no picture in"),
        (["train", "--data", tmp_path / "bad", "--out", out, *SMALL], "can be read"),
        (["train", "--data", tmp_path / "note.txt", "--out", out, *SMALL], "can be read"),
        (
            ["train", "--data", "cifar10", "--set", f"data.folder={tmp_path / 'nowhere'}", "--out", out],
            "vqfast data cifar10",
        ),
        (["train", "--data", pictures, "--steps", "-3", "--out", out], "train.steps is -3"),
        (["train", "--data", pictures, "--steps", "many", "--out", out], "invalid int value: 'many'"),
        (
            ["train", "--data", pictures, "--set", "model.codebok_size=3", "--out", out],
            "did you mean model.codebook_size",
        ),
        (["train", "--data", pictures, "--set", "dim:3", "--out", out], "--set takes"),
        (["train", "--data", pictures, "--device", "gpu", "--out", out], "use auto, cpu, cuda"),
        (
            ["train", "--data", pictures, *SMALL, "--set", "model.codebook_size=100000", "--out", out],
            "train.init_pictures",
        ),
        (["train", tmp_path / "bad.toml", "--out", out], "is not valid TOML"),
        (["train", tmp_path / "typo.toml", "--out", out], "did you mean model.codebook_size"),
        (["train", tmp_path / "binary.toml", "--out", out], "cannot be read"),
        (["train", tmp_path / "none.toml", "--out", out], "there is no configuration file"),
        (["train", "--data", pictures, "--out", run, *SMALL], "already holds a run"),
        (["train", "--resume", tmp_path / "empty"], "holds no run"),
        (["train", "--resume", run, "--set", "model.dim=8"], "the model of a run cannot change"),
        (["train", "--data", pictures, *SMALL, "--out", tmp_path / "note.txt"], "note.txt"),
        (["eval", tmp_path / "nowhere"], "there is no"),
        (["eval", tmp_path / "empty"], "there is no model in"),
        (["eval", tmp_path / "note.txt"], "damaged or no checkpoint"),
        (["eval", other], "name the pictures with --data"),
        (["eval", run, "--data", tmp_path / "empty"], "no picture in"),
        (["eval", run, "--data", tmp_path / "bad"], "no pictures"),
        (["eval", run, "--pictures", "-1"], "at least 1"),
        (["encode", run, tmp_path / "nowhere", tmp_path / "n.vqt"], "there is no"),
        (["encode", run, tmp_path / "bad", tmp_path / "n.vqt"], "none of the"),
        (["encode", run, pictures, tmp_path / "empty"], "is a folder"),
        (["encode", tmp_path / "vae", pictures, tmp_path / "n.vqt"], "no codebook"),
        (["decode", other, tmp_path / "t.vqt", out], "made by another model"),
        (["decode", run, tmp_path / "cut.vqt", out], "ends too early"),
        (["decode", run, tmp_path / "altered.vqt", out], "does not match its checksum"),
        (["decode", run, tmp_path / "note.txt", out], "no vqfast token file"),
        (["decode", run, tmp_path / "none.vqt", out], "No such file"),
        (["decode", run, tmp_path / "t.vqt", tmp_path / "note.txt"], "is a file"),
        (["reconstruct", run, pictures, out, "--limit", "-1"], "0 or more"),
        (["sweep", "--data", pictures, "--codebook-sizes", "0", "--out", out], "codebook_size is 0"),
        (["data", "cifar"], "did you mean cifar10"),
        (["data", "cifar10", tmp_path / "d", "--local", tmp_path / "nowhere"], "there is no local copy"),
        (["bench", "--rows", "0"], "--rows is 0"),
        (["demo", "--steps", "0", "--out", out], "train.steps is 0"),
    ]
    for argv, said in mistakes:
        code, _, err = vqfast(capsys, *argv)
        assert code == 2 and said in err, (argv, code, err)
        assert "Traceback" not in err and len(err.strip().splitlines()) <= 1 + ("usage" in err) * 30, (argv, err)
    assert not (tmp_path / "n.vqt").exists(), "a failed encode leaves no file"


@pytest.mark.parametrize("name", ["../x.png", "/tmp/x.png", "a/../../x.png", "", "C:/x.png", "a\\..\\x.png", "."])
def test_decode_never_writes_outside_its_folder(run, name, capsys, tmp_path):
    model, _, _ = find_model(run)
    with TokenWriter(tmp_path / "t.vqt", model=model_hash(model.state_dict()), codebook_sizes=[16]) as writer:
        writer.write(name, 8, 8, [np.zeros((2, 2), int)])
    code, _, err = vqfast(capsys, "decode", run, tmp_path / "t.vqt", tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    if os.name != "nt" and name in ("C:/x.png", "a\\..\\x.png"):  # there these lead outside, here they are names like others
        assert code == 0 and {path for path in tmp_path.rglob("*") if path.is_file()} == {out / name, tmp_path / "t.vqt"}
        return
    assert code == 2 and "outside the folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["t.vqt"]


@pytest.mark.parametrize("width, height", [(9, 8), (4, 8), (2**32 - 1, 2**32 - 1), (0, 0)])
def test_decode_refuses_sizes_that_do_not_fit_the_codes(run, width, height, capsys, tmp_path):
    model, _, _ = find_model(run)
    with TokenWriter(tmp_path / "t.vqt", model=model_hash(model.state_dict()), codebook_sizes=[16]) as writer:
        writer.write("a.png", width, height, [np.zeros((2, 2), int)])
    code, _, err = vqfast(capsys, "decode", run, tmp_path / "t.vqt", tmp_path / "out")
    assert code == 2 and "a picture of" in err


def test_names_that_become_equal_are_kept_apart(run, capsys, tmp_path):
    model, _, _ = find_model(run)
    names = ["a.jpg", "a.png", "a.webp", "a.png", "b"]
    with TokenWriter(tmp_path / "t.vqt", model=model_hash(model.state_dict()), codebook_sizes=[16]) as writer:
        for name in names:
            writer.write(name, 8, 8, [np.zeros((2, 2), int)])
    assert vqfast(capsys, "decode", run, tmp_path / "t.vqt", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == len(names)


@pytest.mark.parametrize(
    "package, command", [("numpy", ["encode"]), ("PIL", ["reconstruct"]), ("safetensors", ["eval"])]
)
def test_a_missing_package_is_named_with_its_extra(package, command, run, pictures, tmp_path):
    """A stand-in folder on the path makes the import fail as it does where the package is not installed."""
    script = f"import sys; sys.modules['{package}'] = None; from vqfast.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = [*command, run, pictures, tmp_path / "x"][: 2 if command == ["eval"] else None]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, argv)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and "pip install 'vqfast[train]'" in done.stderr and "Traceback" not in done.stderr


def test_traceback_on_request(capsys, tmp_path):
    with pytest.raises(Exception, match="there is no"):
        cli.main(["eval", str(tmp_path / "nowhere"), "--traceback"])


def test_only_the_first_process_complains(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    code, _, err = vqfast(capsys, "trian")
    assert code == 2 and err == ""


def test_commands_come_from_modules():
    """Every command has a module with the two functions, and every public module is a command."""
    folder = Path(cli.__file__).parent
    assert {path.stem.replace("_", "-") for path in folder.glob("[a-z]*.py")} == set(cli.COMMANDS)
