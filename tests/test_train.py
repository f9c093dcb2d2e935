"""Training: configuration, checkpoints, exact resumption, what a run writes, and how a model is judged."""

import csv
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqfast.data import save_picture
from vqfast.models import VAE, VQVAE, load_pretrained
from vqfast.train import checkpoint as checkpoints
from vqfast.train.checkpoint import CheckpointError
from vqfast.train.config import (
    Config,
    ConfigError,
    assigned,
    config_from,
    merged,
    parse_assignment,
    preset_values,
    read_toml,
    to_json,
)
from vqfast.train.evaluate import CODECS, Closeness, codec_at, evaluate, psnr, restore, same_size_batches, squared_errors
from vqfast.train.log import MetricsLog, read_metrics
from vqfast.train.loop import TrainingError, learning_rate
from vqfast.train.plots import Chart, picture_grid, save_charts
from vqfast.train.runs import begin_run, find_model, resume_run

TINY = {
    "model.hidden": 8,
    "model.residual_hidden": 4,
    "model.residual_layers": 1,
    "model.dim": 4,
    "model.codebook_size": 16,
    "model.revive_below": 0.5,
    "data.size": 16,
    "data.batch_size": 4,
    "data.flip": True,
    "train.steps": 6,
    "train.init_pictures": 8,
    "train.log_every": 2,
    "train.picture_every": 0,
    "train.checkpoint_every": 2,
    "train.threads": 1,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of six smooth pictures with noise, 40 x 32 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(6):
        y, x = np.mgrid[:32, :40] / 40
        waves = np.stack([np.sin(6 * x * rng.random() + 5 * y * rng.random() + c) for c in range(3)])
        noisy = 128 + 100 * waves + rng.normal(0, 8, waves.shape)
        save_picture(folder / f"p{number}.png", torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)))
    return folder


@pytest.fixture
def values(pictures):
    """Nested configuration values of a run of well under a second."""

    def make(**changes):
        return assigned(
            {**TINY, "data.source": str(pictures), **{key.replace("__", "."): v for key, v in changes.items()}}
        )

    return make


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_checkpoint(checkpoints.list_checkpoints(folder / "checkpoints")[-1]).tensors


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].numpy().tobytes() == b[name].numpy().tobytes(), name


def quiet(text: str) -> None:
    """Takes the place of print."""


# ---- configuration ----


def test_layers_of_values_and_the_json_that_a_run_keeps(tmp_path):
    (tmp_path / "c.toml").write_text("[model]\ndim = 8\nscale = 0.5\n[train]\nsteps = 5\nlearning_rate = 1\n")
    flags = assigned(dict([parse_assignment("train.steps=7"), parse_assignment("data.source = my pictures")]))
    config = config_from(merged(preset_values("cifar10"), read_toml(tmp_path / "c.toml"), flags))
    assert (config.model.dim, config.model.rule, config.model.scale) == (8, "debiased", 0.5)  # file, preset, file
    assert (config.train.steps, config.train.learning_rate, config.data.source) == (7, 1.0, "my pictures")
    assert config_from(json.loads(to_json(config))) == config


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"modle": {}}, "did you mean model"),
        ({"model": {"codebok_size": 3}}, "did you mean model.codebook_size"),
        ({"train": {"step": 3}}, "did you mean train.steps"),
        ({"train": {"steps": -3}}, "train.steps is -3, but must be at least 1"),
        ({"train": {"steps": 1.5}}, "must be a whole number"),
        ({"train": {"steps": True}}, "must be a whole number"),
        ({"train": {"bf16": 1}}, "must be true or false"),
        ({"train": {"learning_rate": float("nan")}}, "finite"),
        ({"train": {"schedule": "cosin"}}, "did you mean cosine"),
        ({"model": {"kind": "vqva"}}, "did you mean vqvae"),
        ({"model": {"likelihood": "mes"}}, "likelihood is 'mes'"),
        ({"model": {"dim": 0}}, "dim is 0"),
        ({"data": 3}, "must be a section"),
    ],
)
def test_wrong_values_are_refused_by_name(changes, said):
    with pytest.raises(ConfigError, match=said):
        config_from(changes)


@pytest.mark.parametrize("text", ["train.steps", "steps=3", "=3"])
def test_wrong_assignments_are_refused(text):
    with pytest.raises(ConfigError, match="--set takes"):
        parse_assignment(text)


def test_bad_toml_names_file_and_line(tmp_path):
    (tmp_path / "bad.toml").write_text("[model]\ndim = = 3\n")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML.*line 2"):
        read_toml(tmp_path / "bad.toml")


def test_learning_rate_warms_up_and_falls_like_a_cosine():
    settings = config_from({"train": {"steps": 100, "learning_rate": 1.0, "warmup": 9, "schedule": "cosine"}}).train
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] and rates[99] < 0.001
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))


# ---- checkpoints ----


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of steps 1, 2, 3 and the last one's content."""
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.arange(5),
        "c": torch.randn(2).bfloat16(),
        "d": torch.tensor(1.5, dtype=torch.float64),
        "e": torch.zeros(0, 3),
        "f": torch.randn(4, 3).t(),
        "g": torch.tensor([True, False]),
    }
    for step in (1, 2, 3):
        checkpoints.save_checkpoint(
            tmp_path, {**tensors, "b": torch.arange(5) + step}, {"step": step, "x": [1, "ä"]}, keep=3
        )
    return tmp_path, {**tensors, "b": torch.arange(5) + 3}


def test_checkpoints_round_trip_and_only_the_newest_stay(saved):
    folder, tensors = saved
    got, complaints = checkpoints.load_latest(folder)
    assert complaints == [] and got.meta["step"] == 3 and got.meta["x"] == [1, "ä"]
    assert got.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got.tensors[name].dtype == tensor.dtype and torch.equal(got.tensors[name], tensor)
    checkpoints.save_checkpoint(folder, tensors, {"step": 10}, keep=2)
    assert [path.name for path in sorted(folder.iterdir())] == [
        "step-000000003.safetensors",
        "step-000000010.safetensors",
    ]


def test_every_cut_and_every_altered_byte_of_a_checkpoint_shows(saved):
    folder, tensors = saved
    path = checkpoints.checkpoint_path(folder, 3)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 7), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="step-000000003"):
            checkpoints.load_checkpoint(path)
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match="step-000000003"):
            checkpoints.load_checkpoint(path)


def test_the_previous_checkpoint_is_used_when_the_newest_is_damaged(saved):
    folder, _ = saved
    checkpoints.checkpoint_path(folder, 3).write_bytes(b"half")
    got, complaints = checkpoints.load_latest(folder)
    assert got.meta["step"] == 2 and len(complaints) == 1 and "step-000000003" in complaints[0]
    for step in (1, 2):
        checkpoints.checkpoint_path(folder, step).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        checkpoints.load_latest(folder)


def test_a_checkpoint_that_fails_to_be_written_leaves_the_others(saved, monkeypatch):
    folder, tensors = saved
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        checkpoints.save_checkpoint(folder, tensors, {"step": 4}, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_checkpoint_of_another_model_is_refused():
    tensors = {f"model.{name}": value for name, value in VQVAE(hidden=8, dim=4, codebook_size=16).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"codebook is \[16, 4\], the model has \[17, 4\]"):
        checkpoints.load_model_tensors(VQVAE(hidden=8, dim=4, codebook_size=17), tensors, "x")
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoints.load_model_tensors(VQVAE(hidden=8, dim=4, codebook_size=16), dict(list(tensors.items())[1:]), "x")


# ---- a run, and going on with one ----


def test_a_run_writes_what_it_says(values, tmp_path):
    folder = tmp_path / "run"
    outcome = begin_run(values(train__picture_every=3), folder, say=quiet)
    assert outcome.step == 6 and not outcome.interrupted
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6] and all(
        np.isfinite(list(line.values())).all() for line in lines
    )
    with open(folder / "metrics.csv") as file:
        assert [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)] == lines
    assert config_from(json.loads((folder / "config.json").read_text())).train.steps == 6
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == ["step-000003.png", "step-000006.png"]
    assert (folder / "plots/training.svg").exists() and Image.open(folder / "plots/training.png").size == (4 * 920, 600)
    exported, (last, _, _) = load_pretrained(folder / "model"), find_model(folder)
    assert_same_bits(exported.state_dict(), last.state_dict())
    assert exported.config.auto_update, "the model comes back as its user configured it"
    with pytest.raises(ConfigError, match="already holds a run"):
        begin_run(values(), folder, say=quiet)


def test_the_codebook_starts_from_kmeans_on_the_first_latents(values, tmp_path):
    """With a learning rate of 0 and decay 1 nothing moves afterwards, so the codes must be means of the encoder's
    outputs.
    """
    for init in ("kmeans", "none"):
        begin_run(
            values(
                train__init=init, train__learning_rate=0.0, model__decay=1.0, model__revive_below=0.0, train__steps=1
            ),
            tmp_path / init,
            say=quiet,
        )
    used = {init: read_metrics(tmp_path / init / "metrics.jsonl")[-1] for init in ("kmeans", "none")}
    assert used["kmeans"]["commitment_loss"] < 0.1 * used["none"]["commitment_loss"]
    assert used["kmeans"]["usage"] > used["none"]["usage"]


def interrupt_at(step: int, number: int):
    """A ``watch`` for begin_run that sends this process a signal during one step."""

    def watch(trainer):
        train_step = trainer._train_step

        def stepped(batches):
            train_step(batches)
            if trainer.step == step - 1:
                os.kill(os.getpid(), number)

        trainer._train_step = stepped

    return watch


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__quantizer": "loss", "model__revive_below": 0.0, "train__schedule": "cosine", "train__warmup": 2},
        {
            "model__rule": "debiased",
            "model__revive_below": 0.0,
            "train__accumulate": 2,
            "train__bf16": True,
            "train__clip_norm": 1.0,
        },
        {"model__groups": 2, "model__likelihood": "discretized_logistic", "data__workers": 2},
    ],
    ids=["ema", "loss", "debiased-accumulate-bf16", "groups-logistic-workers"],
)
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(values, tmp_path, changes):
    begin_run(values(**changes), tmp_path / "whole", say=quiet)
    said = []
    outcome = begin_run(
        values(train__checkpoint_every=0, **changes),
        tmp_path / "cut",
        say=said.append,
        watch=interrupt_at(3, signal.SIGTERM),
    )
    assert outcome == type(outcome)(3, True, outcome.metrics) and "--resume" in said[-1]
    assert not (tmp_path / "cut" / "model").exists()
    assert not resume_run(tmp_path / "cut", {}, say=quiet).interrupted
    assert_same_bits(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "cut"))
    drop = {"seconds", "pictures_per_second"}
    a, b = (
        [{k: v for k, v in line.items() if k not in drop} for line in read_metrics(tmp_path / run / "metrics.jsonl")]
        for run in ("whole", "cut")
    )
    assert a == b, "the log of a resumed run is the log of an uninterrupted one"


def test_a_vae_draws_the_same_noise_after_resuming(pictures, tmp_path):
    values = assigned(
        {key: value for key, value in TINY.items() if key not in ("model.codebook_size", "model.revive_below")}
        | {"model.kind": "vae", "data.source": str(pictures)}
    )
    begin_run(values, tmp_path / "whole", say=quiet)
    begin_run(values, tmp_path / "cut", say=quiet, watch=interrupt_at(3, signal.SIGINT))
    resume_run(tmp_path / "cut", {}, say=quiet)
    assert_same_bits(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "cut"))
    assert isinstance(load_pretrained(tmp_path / "cut" / "model"), VAE)


def test_a_hierarchy_trains_and_reports_each_level(pictures, tmp_path):
    one_level = ("model.codebook_size", "model.dim")
    values = {key: value for key, value in TINY.items() if key not in one_level}
    values |= {
        "model.kind": "vqvae2",
        "model.dims": [4, 3],
        "model.codebook_sizes": [16, 9],
        "data.source": str(pictures),
    }
    begin_run(assigned(values | {"train.picture_every": 3}), tmp_path / "run", say=quiet)
    assert {"perplexity_0", "perplexity_1", "usage_1"} <= read_metrics(tmp_path / "run" / "metrics.jsonl")[-1].keys()
    assert (tmp_path / "run" / "pictures" / "step-000003.png").exists()
    model, _, _ = find_model(tmp_path / "run")
    result = evaluate(model, [torch.zeros(3, 30, 32, dtype=torch.uint8)], codecs=False)
    assert len(result.perplexity) == 2 and result.token_bytes == 64 * 4 // 8 + 16 * 4 // 8
    config = config_from(json.loads((tmp_path / "run" / "config.json").read_text()))
    assert config.model.codebook_sizes == (16, 9), "JSON has no tuples, the configuration does"


def test_resuming_uses_the_checkpoint_before_a_damaged_one(values, tmp_path):
    begin_run(values(), tmp_path / "whole", say=quiet)
    begin_run(values(), tmp_path / "cut", say=quiet)
    newest = checkpoints.list_checkpoints(tmp_path / "cut" / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    said = []
    resume_run(tmp_path / "cut", {}, say=said.append)
    assert "skipped" in said[0] and "step-000000006" in said[0]
    assert_same_bits(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "cut"))


def test_a_run_can_be_made_longer_but_not_become_another_model(values, tmp_path):
    begin_run(values(), tmp_path / "run", say=quiet)
    with pytest.raises(ConfigError, match="model.dim 4 -> 8"):
        resume_run(tmp_path / "run", {"model": {"dim": 8}}, say=quiet)
    assert resume_run(tmp_path / "run", {"train": {"steps": 8}}, say=quiet).step == 8
    begin_run(values(train__steps=8), tmp_path / "long", say=quiet)
    assert_same_bits(final_tensors(tmp_path / "run"), final_tensors(tmp_path / "long"))
    with pytest.raises(ConfigError, match="holds no run"):
        resume_run(tmp_path / "nothing", {}, say=quiet)


def test_accumulation_updates_the_codebook_once_per_optimizer_step(values, tmp_path):
    """Two rounds of four pictures see the same pictures as one of eight, so the counts must be the same numbers."""
    begin_run(values(train__steps=1, train__accumulate=2), tmp_path / "two", say=quiet)
    begin_run(values(train__steps=1, data__batch_size=8), tmp_path / "one", say=quiet)
    two, one = final_tensors(tmp_path / "two"), final_tensors(tmp_path / "one")
    assert int(two["model.quantizer.updates"]) == int(one["model.quantizer.updates"]) == 1
    assert torch.equal(two["model.quantizer.cluster_size"], one["model.quantizer.cluster_size"])
    # Sums of the same latents in another order: a few units in the last place of values below 1.
    assert torch.allclose(two["model.quantizer.codebook"], one["model.quantizer.codebook"], rtol=0, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoints(values, tmp_path):
    def poison(trainer):
        train_step = trainer._train_step

        def stepped(batches):
            if trainer.step == 3:
                with torch.no_grad():
                    next(trainer.model.parameters()).fill_(float("nan"))
            train_step(batches)

        trainer._train_step = stepped

    with pytest.raises(TrainingError, match="the loss is nan at step 4.*step-000000002"):
        begin_run(values(train__log_every=100), tmp_path / "run", say=quiet, watch=poison)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-000000002.safetensors"
    ]


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_no_bit(values, tmp_path):
    """A job of 60 steps is killed again and again, checkpointing every step so that many kills fall into the
    writing of one.
    """
    config = values(
        train__steps=60,
        train__checkpoint_every=1,
        train__keep=2,
        train__learning_rate=3e-3,
        data__size=32,
        model__hidden=32,
    )
    text = "".join(
        f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for section, keys in config.items()
    )
    (tmp_path / "job.toml").write_text(text)
    begin_run(config, tmp_path / "whole", say=quiet)
    command = [
        sys.executable,
        "-m",
        "vqfast",
        "train",
        str(tmp_path / "job.toml"),
        "--out",
        str(tmp_path / "run"),
        "--resume",
    ]
    moments, kills, steps = random.Random(1), 0, set()
    for _ in range(40):
        job = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        before = checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")
        while (
            job.poll() is None
            and kills < 4
            and checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints") == before
        ):
            time.sleep(0.002)  # until it has made progress
        if kills < 4:
            time.sleep(moments.uniform(0, 0.25))
            kills += job.poll() is None
            job.kill()
        if (job.wait(), job.communicate())[0] == 0:
            break
        assert job.returncode == -signal.SIGKILL
        steps.add(len(read_metrics(tmp_path / "run" / "metrics.jsonl")))
    assert job.returncode == 0 and kills == 4 and len(steps) > 1, (kills, steps)
    assert_same_bits(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("*.part")), "what killed writers left is swept up"
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(2, 61, 2))
    assert lines[-1]["reconstruction_loss"] < 0.5 * lines[0]["reconstruction_loss"], "and it learned something"


# ---- the log ----


def test_the_log_forgets_steps_after_the_checkpoint_and_half_a_line(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.append({"step": step, "loss": step / 100})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')
    log = MetricsLog(tmp_path, 20)
    log.append({"step": 30, "loss": 7.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 10, "loss": 0.1},
        {"step": 20, "loss": 0.2},
        {"step": 30, "loss": 7.0},
    ]
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n10,0.1\n20,0.2\n30,7.0\n"


# ---- judging ----


def test_errors_of_known_pictures():
    a, b = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    b[0] = 255
    b[1, 0, 0, 0] = 51  # 0.2 of the range in one of 48 values
    assert squared_errors(a, b).tolist() == pytest.approx([1.0, 0.04 / 48])
    assert psnr(squared_errors(a, b)).tolist() == pytest.approx([0.0, 10 * np.log10(48 / 0.04)])


def test_batches_of_one_size_keep_order_and_lose_nothing():
    sizes = [(8, 8)] * 3 + [(8, 12)] * 2 + [(8, 8)]
    items = [(str(i), torch.full((3, *size), i, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    batches = list(same_size_batches(items, limit=128))
    assert [names for names, _ in batches] == [["0", "1"], ["2"], ["3"], ["4"], ["5"]]
    assert all(torch.equal(batch[i], items[int(name)][1]) for names, batch in batches for i, name in enumerate(names))


def test_evaluation_agrees_with_a_second_way_of_counting(pictures):
    torch.manual_seed(0)
    model = VQVAE(hidden=8, residual_hidden=4, dim=4, codebook_size=13).eval()
    shapes = [(32, 40), (30, 37), (30, 37)]
    items = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for shape in shapes]
    result = evaluate(model, items, codecs=False)
    codes = torch.cat([restore(model, item[None])[1][0].flatten() for item in items])
    p = np.bincount(codes.numpy(), minlength=13) / len(codes)
    assert result.perplexity[0] == pytest.approx(np.exp(-sum(q * np.log(q) for q in p if q)))
    assert result.usage[0] == pytest.approx((p > 0).mean())
    # 32x40 and twice 30x37, padded to 32x40: 80 codes of 4 bits, 40 bytes, each.
    assert result.token_bytes == 40 and result.bits_per_pixel == pytest.approx(8 * 120 / (32 * 40 + 2 * 30 * 37))
    restored = [restore(model, item[None])[0][0].numpy().astype(float) for item in items]
    mse = [((item.numpy() - other) ** 2).mean() / 255**2 for item, other in zip(items, restored, strict=True)]
    assert result.mse == pytest.approx(np.mean(mse)) and result.psnr == pytest.approx(np.mean(-10 * np.log10(mse)))
    assert result.pictures == 3 and result.bits_per_dim > 0


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("target", [1, 900, 1400, 10**6])
def test_codecs_are_taken_at_the_nearest_size(codec, target, pictures):
    from vqfast.train.evaluate import _compress

    items = [torch.from_numpy(np.array(Image.open(pictures / f"p{i}.png"))).permute(2, 0, 1) for i in range(3)]
    name, low, high, _, options = codec
    sizes = {q: np.mean([len(_compress(item, name, q, options)) for item in items]) for q in range(low, high + 1)}
    got = codec_at(codec, items, target, Closeness())
    best = min(abs(size - target) for size in sizes.values())
    # A codec's size may fall by a few bytes between two qualities, so the search may miss the best by that much.
    dip = max(max(sizes[a] for a in range(low, q + 1)) - sizes[q] for q in sizes)
    assert got.bytes == sizes[got.quality] and abs(got.bytes - target) <= best + dip
    assert got.too_large == (target == 1)


def test_evaluation_says_that_lpips_weights_are_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, items = (
        VQVAE(hidden=8, residual_hidden=4, dim=4, codebook_size=13),
        [torch.zeros(3, 32, 32, dtype=torch.uint8)],
    )
    result = evaluate(model, items, codecs=False, perceptual=True)
    assert result.lpips is None and any("vqfast data metrics" in note for note in result.notes)
    with pytest.raises(FileNotFoundError, match="vqfast data metrics"):
        evaluate(model, items, codecs=False, fid=True)


def test_charts_are_valid_and_say_the_same_in_svg_and_png(tmp_path):
    chart = Chart(
        "loss <&>", "step", {"a": ([0, 50, 100], [1.0, float("nan"), 0.01]), "b": ([0, 100], [0.5, -1.0])}, log_y=True
    )
    written = save_charts([chart, Chart("empty", "x")], tmp_path / "plots" / "p.svg")
    assert [path.suffix for path in written] == [".png", ".svg"]
    root = ElementTree.parse(tmp_path / "plots" / "p.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"loss <&>", "no values yet", "a", "b", "0.01", "1"} <= set(texts)
    lines = [
        e.get("points").split()
        for e in root.iter("{http://www.w3.org/2000/svg}polyline")
        if e.get("stroke") == "#1f5fa8"
    ]
    curve = next(line for line in lines if float(line[0].split(",")[1]) != float(line[1].split(",")[1]))
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in curve)
    assert len(curve) == 2 and x0 < x1 and y0 < y1, "two finite points, falling to the right"
    image = np.array(Image.open(tmp_path / "plots" / "p.png"))
    blue = (image == [0x1F, 0x5F, 0xA8]).all(-1)
    assert blue[round(2 * y0) - 4 : round(2 * y0) + 5, round(2 * x0) - 4 : round(2 * x0) + 5].any()


def test_a_grid_shows_every_picture_where_it_belongs():
    rng = np.random.default_rng(0)
    rows = [(name, rng.integers(0, 256, (5, 8, 16, 3), dtype=np.uint8)) for name in ("original", "reconstruction")]
    grid = np.array(picture_grid(rows, columns=3, least=32))
    assert grid.shape == (4 * (16 + 4 + 20) + 4, 3 * 36 + 4, 3)
    for line, (_, items) in enumerate(rows):
        for place in range(5):
            band, column = divmod(place, 3)
            top, left = (2 * band + line) * 40 + 20, 4 + 36 * column
            assert (grid[top : top + 16 : 2, left : left + 32 : 2] == items[place]).all()


def test_a_config_without_values_is_the_default():
    assert config_from({}) == Config()
