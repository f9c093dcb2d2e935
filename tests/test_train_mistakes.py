"""Training when something is wrong: what is refused changes nothing, what is damaged is named, and work is not lost."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from vqfast import cli
from vqfast.data import photographs, save_picture
from vqfast.models import load_pretrained
from vqfast.train import checkpoint as checkpoints
from vqfast.train.checkpoint import CheckpointError
from vqfast.train.config import ConfigError, assigned, build_model, config_from
from vqfast.train.evaluate import CODECS, usable_codecs
from vqfast.train.log import read_metrics
from vqfast.train.loop import TrainingError
from vqfast.train.priors import begin_priors, find_priors, resume_priors
from vqfast.train.ranks import pick_device
from vqfast.train.runs import begin_run, find_model, resume_run

SMALL = ["--steps", "4", "--batch-size", "4", "--size", "16", "--threads", "1"]
TINY = {"hidden": 8, "residual_hidden": 4, "residual_layers": 1, "dim": 4, "codebook_size": 16}
for name, number in TINY.items():
    SMALL += ["--set", f"model.{name}={number}"]
SMALL += ["--set", "train.init_pictures=8", "--set", "train.log_every=2", "--set", "train.checkpoint_every=2"]
PRIOR = ["--steps", "2", "--batch-size", "2", "--threads", "1", "--channels", "8", "--layers", "1"]


def vqfast(capsys, *argv):
    """Exit code, stdout and stderr of one command, run in this process."""
    try:
        code = cli.main([str(part) for part in argv])
    except SystemExit as error:  # argparse
        code = error.code
    return code, *capsys.readouterr()


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def quiet(text):
    pass


def test_a_preset_of_another_kind_is_named(capsys, tmp_path):
    code, _, err = vqfast(capsys, "train", "--preset", "photos", "--set", "model.kind=vae", "--out", tmp_path / "run")
    assert code == 2 and "preset photos has settings for model.kind=vqvae, model.kind=vae is asked for" in err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with pictures, a finished run over them and a finished prior over its codes."""
    folder = tmp_path_factory.mktemp("made")
    shown = photographs("train", size=20)
    for i in range(4):
        save_picture(folder / "pictures" / f"{i}.png", shown[i])
    assert cli.main(["train", "--data", str(folder / "pictures"), "--out", str(folder / "run"), *SMALL]) == 0
    narrow = ["--set", "model.head_channels=8", "--set", "model.condition_channels=4"]
    assert cli.main(["train-prior", str(folder / "run"), "--out", str(folder / "prior"), *PRIOR, *narrow]) == 0
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made / "run", tmp_path / "run")


@pytest.fixture
def prior(made, tmp_path):
    return shutil.copytree(made / "prior", tmp_path / "prior")


@pytest.fixture
def values(made):
    def make(**changes):
        given = {"data.source": str(made / "pictures"), "data.size": 16, "data.batch_size": 2, "train.steps": 4}
        given |= {f"model.{name}": number for name, number in TINY.items()}
        given |= {"train.init_pictures": 8, "train.threads": 1, "train.checkpoint_every": 2, "train.picture_every": 1}
        return assigned(given | {name.replace("__", "."): value for name, value in changes.items()})

    return make


# ---- what is refused changes nothing ----


@pytest.mark.parametrize("changes", [["--channels", "16"], ["--device", "cuda:99"], ["--set", "train.tensorboard=true"]])
def test_a_refused_prior_leaves_the_finished_one_as_it_was(prior, capsys, monkeypatch, changes):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    before = files(prior)
    assert vqfast(capsys, "train-prior", "--resume", prior, *changes)[0] == 2
    assert files(prior) == before
    assert vqfast(capsys, "train-prior", "--resume", prior)[0] == 0


@pytest.mark.parametrize(
    "wrong", [["--set", "train.tensorboard=true"], ["--seed", "18446744073709551616"], ["--size", "18"]]
)
def test_a_start_that_fails_leaves_no_run_behind(made, capsys, monkeypatch, tmp_path, wrong):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    argv = ["train", "--data", made / "pictures", "--out", tmp_path / "run", *SMALL]
    assert vqfast(capsys, *argv, *wrong)[0] == 2
    assert vqfast(capsys, *argv)[0] == 0


def test_a_failing_first_step_leaves_no_run_behind(values, tmp_path):
    def fail(trainer):
        trainer._train_step = lambda batches: (_ for _ in ()).throw(RuntimeError("no memory"))

    with pytest.raises(RuntimeError, match="no memory"):
        begin_run(values(), tmp_path / "run", say=quiet, watch=fail)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train__init": "none", "data__size": 18}, "18x18 pixels.*multiples of 4.*to 16"),
        ({"data__size": 18}, "18x18 pixels.*multiples of 4"),
        ({"model__decay": 2.0}, "decay must lie in 0..1"),
        ({"model__eps": -1.0}, "eps be positive"),
        ({"model__metric": "foo"}, "foo"),
        ({"model__commitment_weight": -1.0}, "must not be negative"),
        ({"model__revive_below": -1.0}, "must not be negative"),
        ({"model__kind": [1]}, "model.kind is"),
        ({"train__seed": 2**64}, "train.seed is .* at most"),
        ({"train__learning_rate": 1e39}, "train.learning_rate is .* at most"),
        ({"train__threads": 10_000_000}, "train.threads is 10000000, but must be at most 1024"),
        ({"data__workers": 100_000}, "data.workers is 100000, but must be at most"),
    ],
)
def test_wrong_settings_are_refused_by_name(values, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        begin_run(values(**changes), tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["model = 5", "codes = 5", "level-0 = 5", "[model]\nkind = [1]"])
def test_wrong_sections_of_a_prior_are_refused(made, capsys, tmp_path, text):
    (tmp_path / "p.toml").write_text(text)
    code, _, err = vqfast(capsys, "train-prior", made / "run", "--config", tmp_path / "p.toml", "--out", tmp_path / "p")
    assert code == 2 and ("must be a section" in err or "a prior is one of" in err)


@pytest.mark.parametrize("name", ["mps", "meta", "cpu:1", "gpu", "cuda:x", ""])
def test_only_devices_that_vqfast_runs_on(name):
    with pytest.raises(ConfigError, match="use auto, cpu, cuda or cuda:N"):
        pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")


# ---- what goes wrong while training ----


def test_a_picture_that_cannot_be_drawn_ends_no_training(values, tmp_path):
    said = []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pictures").write_text("no folder")
    assert begin_run(values(), tmp_path / "run", say=said.append).step == 4
    assert sum("the pictures of step" in line for line in said) == 4
    assert load_pretrained(tmp_path / "run" / "model") is not None


def test_test_pictures_are_looked_at_before_the_first_step(values, tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="none of the 1 pictures"):
        begin_run(values(data__test=str(tmp_path / "test")), tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("entry", ["exp_avg_sq", "weight"])
def test_what_is_not_finite_is_not_saved(values, tmp_path, entry):
    """Adam's averages overflow before the loss does; only checkpoints that a run can go on from are kept."""

    def poison(trainer):
        train_step = trainer._train_step

        def stepped(batches):
            train_step(batches)
            if trainer.step == 3:
                weight = next(trainer.model.parameters())
                with torch.no_grad():
                    (weight if entry == "weight" else trainer.optimizer.state[weight][entry]).fill_(torch.inf)

        trainer._train_step = stepped

    with pytest.raises(TrainingError, match="not finite at step 4.*step-000000002"):
        begin_run(values(), tmp_path / "run", say=quiet, watch=poison)
    assert resume_run(tmp_path / "run", {}, say=quiet).step == 4


def test_a_full_disk_is_named_with_the_way_on(values, tmp_path, monkeypatch):
    save = checkpoints.save_checkpoint
    fsync = os.fsync

    def full(handle):
        raise OSError(28, "No space left on device")

    def saved(folder, *arguments, **options):
        monkeypatch.setattr(os, "fsync", full)
        return save(folder, *arguments, **options)

    monkeypatch.setattr(checkpoints, "save_checkpoint", saved)
    with pytest.raises(TrainingError, match="step-000000002.*No space left.*vqfast train --resume"):
        begin_run(values(), tmp_path / "run", say=quiet)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(checkpoints, "save_checkpoint", save)
    assert resume_run(tmp_path / "run", {}, say=quiet).step == 4


# ---- what is damaged or something else ----


def test_damaged_checkpoints_are_named_and_the_finished_model_too(run, capsys):
    *_, older, newest = checkpoints.list_checkpoints(run / "checkpoints")
    newest.write_bytes(b"half")
    code, _, err = vqfast(capsys, "eval", run, "--no-codecs", "--device", "cpu")
    assert code == 0 and err.startswith("skipped: ") and newest.name in err
    older.write_bytes(b"half")
    with pytest.raises(CheckpointError, match=f"no checkpoint is whole.*name its folder: {run / 'model'}"):
        find_model(run)
    (run / "model" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="no checkpoint is whole") as caught:
        find_model(run)
    assert "name its folder" not in str(caught.value)


def test_the_file_of_a_model_is_not_called_altered(run):
    with pytest.raises(CheckpointError, match=f"a saved model.*name its folder, {run / 'model'}"):
        find_model(run / "model" / "model.safetensors")


@pytest.mark.parametrize("place", ["", "level-0", "level-0/model"])
@pytest.mark.parametrize("command", ["eval", "encode", "reconstruct", "train-prior"])
def test_a_prior_is_no_model(made, capsys, tmp_path, place, command):
    rest = {"eval": ["--data", "photographs"], "train-prior": ["--out", tmp_path / "p"]}
    argv = [command, made / "prior" / place, *rest.get(command, [made / "pictures", tmp_path / "out"])]
    code, _, err = vqfast(capsys, *argv)
    assert code == 2 and "holds a prior" in err and "Traceback" not in err


@pytest.mark.parametrize("content", ["[]", "null", "5", "{"])
def test_damaged_configurations_are_named(run, prior, content):
    for folder, resume in ((run, resume_run), (prior, resume_priors)):
        (folder / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json (is damaged|cannot be read)"):
            resume(folder, {}, say=quiet)


@pytest.mark.parametrize("change", [{"model": None}, {"shapes": [[4]]}, {"shapes": 3}, {"shapes": []}, {"classes": None}])
def test_a_damaged_description_of_a_prior_is_named(made, prior, change):
    whole = (prior / "prior.json").read_text()
    (prior / "prior.json").write_text(json.dumps({**json.loads(whole), **change}))
    with pytest.raises(ConfigError, match=r"prior\.json is damaged.*remove it"):
        find_priors(made / "run", prior)
    (prior / "prior.json").unlink()
    resume_priors(prior, {}, say=quiet)
    assert (prior / "prior.json").read_text() == whole, "as the message promises"


def test_another_model_in_the_place_of_a_prior_is_named(made, prior):
    shutil.rmtree(prior / "level-0" / "model")
    shutil.copytree(made / "run" / "model", prior / "level-0" / "model")
    with pytest.raises(ValueError, match="holds a VQVAE, but must hold a prior"):
        find_priors(made / "run", prior)
    shutil.rmtree(prior / "level-0" / "model")
    resume_priors(prior, {}, say=quiet)
    find_priors(made / "run", prior)


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
    (tmp_path / "m").write_bytes(b'{"step": 1}\n\xff\xfe\n{"loss": 2}\n[]\n{"step": "x"}\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path / "m") == [{"step": 1}, {"step": 2}]


def test_pictures_that_cannot_be_read_are_said_by_train_prior(made, capsys, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    argv = ["train-prior", made / "run", folder, *PRIOR, "--out", tmp_path / "p", "--set", "model.head_channels=8"]
    code, _, err = vqfast(capsys, *argv)
    assert code == 2 and "none of the 1 pictures" in err
    shutil.copy(made / "pictures" / "0.png", folder / "b.png")
    code, out, _ = vqfast(capsys, *argv)
    assert code == 0 and "skipped: " in out and "a.png" in out


# ---- commands ----


def test_sweep_refuses_what_it_cannot_compare(made, capsys, tmp_path):
    argv = ["sweep", "--data", made / "pictures", *SMALL, "--codebook-sizes", 4, "--pictures", 1, "--out", tmp_path / "s"]
    assert vqfast(capsys, *argv, "--beta", "0.12345671", "0.12345672", 1)[0] == 0
    names = sorted(path.name for path in (tmp_path / "s").iterdir() if path.is_dir())
    assert names == ["beta0.12345671-K4", "beta0.12345672-K4", "beta1-K4"]
    before = files(tmp_path / "s")
    for changes, said in (
        (["--lr", "0.5"], "train.learning_rate 0.0003 -> 0.5"),
        (["--beta", "-1"], "must not be negative"),
        (["--preset", "imagenet256"], "one-level VQ-VAEs"),
        (["--set", "model.kind=vae"], "one-level VQ-VAEs"),
        (["--set", "model=5"], "--set takes"),
    ):
        code, _, err = vqfast(capsys, *argv, *(["--beta", "1"] if "--beta" not in changes else []), *changes)
        assert code == 2 and said in err and "Traceback" not in err, (changes, err)
    assert files(tmp_path / "s") == before
    assert vqfast(capsys, *argv, "--beta", 1, "--set", "train.keep=1")[0] == 0


def test_train_prior_takes_another_kind_alone(made, tmp_path):
    watched = []

    class Enough(Exception):
        pass

    def stop(values, folder, **options):
        watched.append(values)
        raise Enough

    from vqfast.cli import train_prior

    original, train_prior.begin_priors = train_prior.begin_priors, stop
    try:
        with pytest.raises(Enough):
            cli.main(["train-prior", str(made / "run"), "--kind", "snail", "--out", str(tmp_path / "p")])
    finally:
        train_prior.begin_priors = original
    sizes = {"channels": 8, "layers": 1, "blocks": 1, "residual_channels": 8}
    data = {"source": str(made / "pictures"), "batch_size": 2}
    (given,) = watched
    given = {**given, "model": {**given["model"], **sizes}, "data": data, "train": {"steps": 1, "threads": 1}}
    assert not begin_priors(given, tmp_path / "p", say=quiet).interrupted
    assert type(find_priors(made / "run", tmp_path / "p")[1]).__name__ == "PixelSNAIL"


def test_eval_takes_pictures_evenly_spread(made, capsys, monkeypatch, tmp_path):
    for i in range(6):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    seen = []

    def collect(model, pictures, **options):
        seen.extend(int(picture[0, 0, 0]) // 40 for picture in pictures)
        raise ValueError("enough")

    monkeypatch.setattr("vqfast.cli.eval.evaluate", collect)
    vqfast(capsys, "eval", made / "run", "--data", tmp_path, "--pictures", "3", "--device", "cpu")
    assert seen == [0, 4, 1], "every second one, and another for the one that cannot be read"


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("VQFAST_BACKEND", "foo", "backend 'foo' is not known"),
        ("VQFAST_BACKEND", "cuda", "cannot run on backend 'cuda'"),
        ("VQFAST_CPU_LEVEL", "foo", "VQFAST_CPU_LEVEL='foo' is not known"),
        ("VQFAST_BACKEND", "", ""),
    ],
)
def test_wrong_environment_variables(made, tmp_path, name, value, said):
    """doctor reports them, other commands say one line; an empty one is as good as none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", name: value}
    for argv in (["doctor"], ["reconstruct", made / "run", made / "pictures", tmp_path / "out", "--device", "cpu"]):
        command = [sys.executable, "-m", "vqfast", *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == (2 if said and argv != ["doctor"] else 0), done.stderr
        assert said in (done.stdout if argv == ["doctor"] else done.stderr) and "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == (1 if said and argv != ["doctor"] else 0), done.stderr


def test_what_a_layer_refuses_names_the_section():
    with pytest.raises(ConfigError, match=r"\[model\]: decay"):
        build_model(config_from({"model": {"decay": 2.0}}))


def test_a_codec_that_cannot_hold_a_picture_is_left_out():
    notes: list[str] = []
    found = usable_codecs([torch.zeros(1, 4, 4), torch.zeros(1, 2, 16_384)], notes)
    assert [codec.name for codec in found] == ["JPEG"] and "16383 pixels" in notes[0] and "16384" in notes[0]
    assert usable_codecs([torch.zeros(1, 4, 4)], notes) == list(CODECS) and len(notes) == 1
