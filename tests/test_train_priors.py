"""Training priors: the configuration, labels, what is written, signals and resumption, several processes."""

import json
import os
import signal

import pytest
import torch

from vqfast.data import PictureFolder, photographs, save_picture
from vqfast.models import GatedPixelCNN, HierarchicalPrior, PixelSNAIL, load_pretrained, pixels_to_float
from vqfast.models.vqvae2 import VQVAE2
from vqfast.train.codes import Crops, encode_dataset, labels_of
from vqfast.train.config import ConfigError, assigned, config_from, read_toml
from vqfast.train.log import read_metrics
from vqfast.train.priors import begin_priors, find_priors, prior_preset_values, read_description, resume_priors
from vqfast.train.ranks import Ranks
from vqfast.train.runs import begin_run

ALONE = Ranks(0, 1, torch.device("cpu"))
TINY = {
    "model.channels": 8,
    "model.layers": 2,
    "data.size": 16,
    "data.batch_size": 3,
    "train.steps": 4,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "train.picture_every": 0,
    "train.threads": 1,
}


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A VQ-VAE-2 and a folder of pictures in two classes."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    pictures = photographs("train", size=20)
    for i in range(5):
        save_picture(folder / "pictures" / ("dark" if i % 2 else "light") / f"{i}.png", pictures[i])
    model = VQVAE2(hidden=8, residual_hidden=4, residual_layers=1, dims=(4, 5), codebook_sizes=(9, 6)).eval()
    model.init_codebooks_(pixels_to_float(torch.stack([pictures[i][:, :16, :16] for i in range(4)])))
    model.save_pretrained(folder / "model")
    return folder


def values_for(work, **changes):
    given = {"data.source": str(work / "pictures"), "codes.model": str(work / "model"), **TINY}
    return assigned(given | {key.replace("__", "."): value for key, value in changes.items()})


def weights(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("model.safetensors"))}


def test_a_toml_file_says_it_all(work, tmp_path):
    (tmp_path / "prior.toml").write_text(
        f"""
        [model]
        kind = "snail"
        channels = 8
        layers = 1
        blocks = 1
        residual_channels = 8
        [level-1]
        blocks = 2
        [codes]
        model = "{work / "model"}"
        labels = true
        views = 3
        [data]
        source = "{work / "pictures"}"
        size = 16
        batch_size = 2
        [train]
        steps = 2
        log_every = 1
        """
    )
    assert not begin_priors(read_toml(tmp_path / "prior.toml"), tmp_path / "prior", say=quiet).interrupted
    model, prior, settings = find_priors(work / "model", tmp_path / "prior")
    assert isinstance(prior, HierarchicalPrior) and all(isinstance(level, PixelSNAIL) for level in prior.priors)
    assert [level.config.blocks for level in prior.priors] == [1, 2], "what a level says holds for it alone"
    assert [level.config.codebook_size for level in prior.priors] == [9, 6]
    assert prior.priors[0].config.condition_codes == 6 and prior.priors[0].config.condition_scale == 2
    assert settings["classes"] == ["dark", "light"] and settings["shapes"] == [[4, 4], [2, 2]]
    assert all(level.config.classes == 2 for level in prior.priors)
    for level in (0, 1):
        place = tmp_path / "prior" / f"level-{level}"
        assert [line["step"] for line in read_metrics(place / "metrics.jsonl")] == [1, 2]
        assert (place / "plots" / "training.svg").exists()
        judged = json.loads((place / "held_out.json").read_text())
        assert 0 < judged["bits_per_code"] and judged["uniform"] == pytest.approx(torch.tensor([9.0, 6.0]).log2()[level])
        found = load_pretrained(place / "model")
        assert json.loads((place / "config.json").read_text())["model"]["kind"] == "snail"
        assert torch.equal(found.logits.weight, prior.priors[level].logits.weight)


def interrupt(level: int, step: int, number: int):
    """A ``watch`` that sends this process a signal during one step of one level."""

    def watch(trainer):
        train_step = trainer._train_step

        def stepped(batches):
            train_step(batches)
            if (trainer.level, trainer.step) == (level, step - 1):
                os.kill(os.getpid(), number)

        trainer._train_step = stepped

    return watch


@pytest.mark.parametrize("level, number", [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_a_stopped_run_ends_with_the_bytes_of_an_unbroken_one(work, tmp_path, level, number):
    values = values_for(work, model__kind="snail", model__blocks=1, model__dropout=0.5, train__checkpoint_every=0)
    begin_priors(values, tmp_path / "whole", say=quiet)
    said = []
    outcome = begin_priors(values, tmp_path / "cut", say=said.append, watch=interrupt(level, 3, number))
    assert outcome.interrupted and outcome.step == 3 and said[-1].endswith(f"vqfast train-prior --resume {tmp_path / 'cut'}")
    with pytest.raises(ConfigError, match="not complete.*train-prior --resume"):
        find_priors(work / "model", tmp_path / "cut")
    assert not resume_priors(tmp_path / "cut", {}, say=quiet).interrupted
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole") and len(weights(tmp_path / "cut")) == 2


def test_a_run_can_be_made_longer_but_not_become_another(work, tmp_path):
    out = tmp_path / "prior"
    begin_priors(values_for(work), out, say=quiet)
    said = []
    resume_priors(out, {"train": {"steps": 6}}, say=said.append)
    assert sum("train.steps 4 -> 6" in line for line in said) == 2
    assert read_metrics(out / "level-0" / "metrics.jsonl")[-1]["step"] == 6
    with pytest.raises(ConfigError, match="cannot change: model.channels 8 -> 9"):
        resume_priors(out, {"model": {"channels": 9}}, say=quiet)
    other = VQVAE2.from_pretrained(work / "model")
    with torch.no_grad():
        other.pre_quantizers[0].weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="another model's codes"):
        resume_priors(out, {"codes": {"model": str(tmp_path / "other")}}, say=quiet)
    resume_priors(out, {"train": {"steps": 7}}, say=quiet)  # what was refused has left no trace
    with pytest.raises(ConfigError, match="nothing to resume"):
        resume_priors(tmp_path / "none", {}, say=quiet)
    with pytest.raises(ConfigError, match="already holds a run"):
        begin_priors(values_for(work), out, say=quiet)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model__codebook_size": 9}, "model.codebook_size follows from the codes"),
        ({"level-0__classes": 9}, "level-0.classes follows from the codes"),
        ({"level-2__channels": 9}, r"\[level-2\].*level-0, level-1"),
        ({"model__kind": "vqvae"}, "a prior is one of gated, pixelcnn, snail"),
        ({"model__chanels": 9}, "did you mean model.channels"),
        ({"codes__model": ""}, "say whose codes"),
        ({"codes__views": -1}, "codes.views is -1"),
        ({"data__source": "photographs", "codes__labels": True}, "no labels"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_written(work, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        begin_priors(values_for(work, **changes), tmp_path / "prior", say=quiet)
    assert not (tmp_path / "prior").exists()


def test_train_refuses_a_prior(work, tmp_path):
    with pytest.raises(ConfigError, match="vqfast train-prior"):
        begin_run({"model": {"kind": "gated"}}, tmp_path / "run", say=quiet)


@pytest.mark.parametrize("name", ["small", "imagenet128", "imagenet256", "ffhq1024"])
def test_presets_are_configurations(name):
    values = prior_preset_values(name)
    networks = [keys for section, keys in values.items() if section.startswith("level-")] or [{}]
    base = {section: keys for section, keys in values.items() if not section.startswith("level-")}
    for network in networks:
        config = config_from({**base, "model": {**base["model"], **network}})
        assert config.kind in ("gated", "snail") and config.train.steps >= 2000
    assert len(networks) == {"imagenet256": 2, "ffhq1024": 3}.get(name, 1)
    with pytest.raises(ConfigError, match="did you mean imagenet256"):
        prior_preset_values("imagnet256")


# ---- codes ----


def test_codes_are_those_of_the_pictures(work):
    model = VQVAE2.from_pretrained(work / "model")
    pictures = PictureFolder(work / "pictures", size=16, flip=True)
    codes = encode_dataset(model, pictures, ALONE, labels=True, batch=2)
    assert [tuple(level.shape) for level in codes.levels] == [(5, 4, 4), (5, 2, 2)]
    for i in range(5):
        for got, want in zip(codes.levels, model.encode(pixels_to_float(pictures[i][None]))):
            assert torch.equal(got[i], want[0])
    assert codes.classes == ("dark", "light") and codes.labels.tolist() == [0, 0, 1, 1, 1]
    some = encode_dataset(model, pictures, ALONE, views=2, limit=3, labels=True, seed=7)
    assert len(some) == 6 and some.labels.tolist() == [0, 0, 1] * 2
    again = encode_dataset(model, pictures, ALONE, views=2, limit=3, seed=7, batch=1)
    assert all(torch.equal(a, b) for a, b in zip(some.levels, again.levels)), "crops are a function of the seed"
    assert not torch.equal(some.levels[0][:3], some.levels[0][3:]), "each view is another crop"
    rows = codes.rows(torch.tensor([4, 0]), 0)
    assert torch.equal(rows[0][1], codes.levels[0][0]) and rows[1].tolist() == [1, 0]
    assert torch.equal(rows[2], codes.levels[1][[4, 0]])
    assert codes.rows(torch.tensor([0]), 1)[2] is None


def test_shares_of_several_processes_make_the_same_codes(work):
    """Each process' share, put together as its gather would."""

    class Part(Ranks):
        def gather(self, value):
            shares[self.rank].append(value)
            return [value] * self.world_size

    model, pictures = VQVAE2.from_pretrained(work / "model"), PictureFolder(work / "pictures", size=16)
    shares = [[], [], []]
    for rank in range(3):
        encode_dataset(model, pictures, Part(rank, 3, torch.device("cpu")))
    alone = encode_dataset(model, pictures, ALONE)
    for level, whole in enumerate(alone.levels):
        together = torch.stack([share[level] for share in shares], dim=1).flatten(0, 1)
        assert torch.equal(together[: len(whole)], whole)


def test_a_picture_that_stands_in_for_a_damaged_one_brings_its_own_class(tmp_path):
    pictures = photographs("train", size=16)
    for i, name in enumerate(("a", "b", "b", "c")):
        save_picture(tmp_path / name / f"{i}.png", pictures[i])
    for name in ("b/1.png", "c/3.png"):
        (tmp_path / name).write_bytes(b"no picture")
    folder = PictureFolder(tmp_path, size=16)
    shown = [folder[i] for i in range(4)]
    labels, classes = labels_of(folder)
    assert classes == ("a", "b", "c") and labels.tolist() == [0, 1, 1, 0]
    assert torch.equal(shown[1], shown[2]) and torch.equal(shown[3], shown[0])
    with pytest.raises(ConfigError, match="the class 'b'"):
        labels_of(folder, ("a", "c"))
    save_picture(tmp_path / "loose.png", pictures[0])
    with pytest.raises(ConfigError, match="have no labels"):
        labels_of(PictureFolder(tmp_path, size=16))


def test_crops_refuse_what_is_too_small():
    whole = photographs("test")
    assert torch.equal(Crops(whole, 352, 704)[0], whole[0])
    assert torch.equal(Crops(whole, 2, 4)[0], whole[0][:, 175:177, 350:354])
    with pytest.raises(ConfigError, match="fewer than the crops"):
        Crops(whole, 353, 16)[0]


def test_labels_reach_the_network(work, tmp_path):
    begin_priors(values_for(work, codes__labels=True, train__steps=40, train__learning_rate=0.02), tmp_path, say=quiet)
    prior = load_pretrained(tmp_path / "level-1" / "model")
    assert isinstance(prior, GatedPixelCNN) and read_description(tmp_path)["classes"] == ["dark", "light"]
    codes = encode_dataset(VQVAE2.from_pretrained(work / "model"), PictureFolder(work / "pictures", size=16), ALONE, labels=True)
    right, wrong = (prior.log_prob(codes.levels[1], labels).sum() for labels in (codes.labels, 1 - codes.labels))
    assert right > wrong + 1, "a trained prior finds pictures likelier under their own class"
