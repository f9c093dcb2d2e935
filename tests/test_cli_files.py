"""The commands that read and write files: names, outputs that must not be lost or overwritten, and an end half-way."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vqfast import _files, cli
from vqfast.cli import decode, decompress, sample
from vqfast.data import find_pictures, save_picture
from vqfast.data.fetch import complete_folder
from vqfast.models import VQVAE
from vqfast.models.compression import CompressedPicture
from vqfast.tokens import TokenWriter, model_hash
from vqfast.train.runs import find_model

posix = pytest.mark.skipif(os.name == "nt", reason="these names and files exist on POSIX only")


def vqfast(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command, run in this process."""
    code = cli.main([str(part) for part in argv])
    return code, *capsys.readouterr()


def some(*names, folder, side=8):
    """Small pictures of noise under these names."""
    for seed, name in enumerate(names):
        pixels = np.random.default_rng(seed).integers(0, 256, (3, side, side), dtype=np.uint8)
        save_picture(folder / "x.png", torch.from_numpy(pixels))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder / "x.png", folder / name)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(model, its prior), untrained, with codebooks of 16 codes; the prior of two training steps."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    VQVAE(hidden=8, residual_hidden=4, dim=4, codebook_size=16).save_pretrained(folder / "model")
    pictures = some("a.png", "b.png", folder=folder / "pictures")
    argv = ["train-prior", folder / "model", pictures, "--out", folder / "prior", "--size", 8, "--channels", 8, "--layers", 2]
    assert cli.main([str(part) for part in [*argv, "--steps", 2, "--batch-size", 2, "--views", 1]]) == 0
    return folder / "model", folder / "prior"


@pytest.fixture(params=["tokens", "compressed"])
def way(request, base):
    """(what packs pictures into a file, what unpacks it): the first words of the commands."""
    if request.param == "tokens":
        return ["encode", base[0]], ["decode", base[0]]
    pytest.importorskip("constriction", reason="constriction is not installed")
    return ["compress", *base], ["decompress", *base]


# ---- names ----


@posix
@pytest.mark.parametrize(
    "names, places",
    [
        (["a 12:30.png", "b\\c.png", "c:/d.png", "x" * 245 + ".png"], None),
        (["a.jpg", "a.png/b.png"], ["a.png", "a.png.2/b.png"]),
        (["a.png/b.png", "a.webp"], ["a.png/b.png", "a.webp.png"]),
    ],
    ids=["odd", "file then folder", "folder then file"],
)
def test_every_picture_of_a_folder_comes_back(way, names, places, capsys, tmp_path):
    pack, unpack = way
    some(*names, folder=tmp_path / "in")
    assert vqfast(capsys, *pack, tmp_path / "in", tmp_path / "f")[0] == 0
    code, _, err = vqfast(capsys, *unpack, tmp_path / "f", tmp_path / "out")
    assert code == 0, err
    found = [path.relative_to(tmp_path / "out").as_posix() for path in find_pictures(tmp_path / "out")]
    assert found == sorted(places or names, key=Path)


def test_one_name_that_leaves_the_folder_does_not_keep_the_others(base, capsys, tmp_path):
    model, _, _ = find_model(base[0])
    with TokenWriter(tmp_path / "t.vqt", model=model_hash(model.state_dict()), codebook_sizes=[16]) as writer:
        for name in ("a.png", "../b.png", "/c.png", "d.png"):
            writer.write(name, 8, 8, [np.zeros((2, 2), int)])
    code, _, err = vqfast(capsys, "decode", base[0], tmp_path / "t.vqt", tmp_path / "out")
    assert code == 2 and "'../b.png', '/c.png'" in err and "2 pictures are in" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "d.png"]
    assert not (tmp_path / "b.png").exists()


@posix
def test_names_that_are_not_utf8_are_left_out_and_named(way, capsys, tmp_path):
    some("a.png", os.fsdecode(b"caf\xe9.png"), folder=tmp_path / "in")
    (tmp_path / "in" / os.fsdecode(b"damaged\xe9.png")).write_bytes(b"")
    code, out, _ = vqfast(capsys, *way[0], tmp_path / "in", tmp_path / "f")
    assert code == 0 and "caf\\udce9.png has a name that is not UTF-8" in out and "damaged\\xe9.png cannot be read" in out
    assert vqfast(capsys, *way[1], tmp_path / "f", tmp_path / "out")[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


# ---- outputs ----


def test_a_picture_that_is_read_is_not_written_over(way, base, capsys, tmp_path):
    some("a.png", "b.png", folder=tmp_path)
    before = (tmp_path / "a.png").read_bytes()
    for source in (tmp_path, tmp_path / "a.png"):
        code, _, err = vqfast(capsys, *way[0], source, tmp_path / "a.png")
        assert code == 2 and "is one of the pictures to read" in err
        code, _, err = vqfast(capsys, "reconstruct", base[0], source, tmp_path / "sub" / "..")
        assert code == 2 and "is where the pictures come from" in err
    assert (tmp_path / "a.png").read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


@posix
def test_links_are_written_through_and_other_kinds_are_refused(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("later")
    os.mkfifo(tmp_path / "pipe")
    _files.write_atomic(tmp_path / "link", "new")
    _files.write_atomic(tmp_path / "dangling", "new")
    for name, target in {"link": "real", "dangling": "later"}.items():
        assert (tmp_path / name).is_symlink() and (tmp_path / target).read_text() == "new"
    for path in (tmp_path / "pipe", Path(os.devnull), tmp_path):
        with pytest.raises(OSError, match="name a file"):
            _files.write_atomic(path, "new")
    assert (tmp_path / "pipe").is_fifo() and not list(tmp_path.glob(".*"))


def test_a_full_disk_is_named_whatever_was_written(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "out.vqt").write_text("old")
    with pytest.raises(OSError, match="No space left.*out.vqt"):
        _files.write_atomic(tmp_path / "out.vqt", "new")
    assert (tmp_path / "out.vqt").read_text() == "old" and not list(tmp_path.glob(".*"))


@posix
@pytest.mark.parametrize("command", ["encode", "compress", "sample", "sample folder", "decode", "decompress", "reconstruct"])
def test_outputs_are_checked_before_the_work(base, command, capsys, tmp_path, monkeypatch):
    """Nothing is read or drawn: pictures and files that do not exist are not even missed."""
    name, _, folder = command.partition(" ")
    to_folder = bool(folder) or name in ("decode", "decompress", "reconstruct")
    file, closed = tmp_path / "file", tmp_path / "closed.png"
    file.write_text("precious")
    closed.mkdir()
    argv = [name, *base] if name in ("compress", "decompress", "sample") else [name, base[0]]
    argv += [] if name == "sample" else [tmp_path / "nowhere"]
    taken = file if to_folder else closed
    code, _, err = vqfast(capsys, *argv, taken)
    assert code == 2 and f"{taken}: is a {'file' if to_folder else 'folder'}" in err
    code, _, err = vqfast(capsys, *argv, file / ("a" if to_folder else "a.png"))
    assert code == 2 and f"{file}: is a file" in err
    monkeypatch.setattr(_files.os, "access", lambda *_: False)
    code, _, err = vqfast(capsys, *argv, closed / "new" / ("a" if to_folder else "a.png"))
    assert code == 2 and f"{closed}: cannot be written" in err and not list(closed.iterdir())


@posix
def test_an_encode_that_is_asked_to_end_leaves_nothing(base, tmp_path):
    some("a.png", folder=tmp_path / "in", side=256)
    for i in range(400):
        os.link(tmp_path / "in" / "a.png", tmp_path / "in" / f"{i}.png")
    (tmp_path / "out").mkdir()
    argv = [sys.executable, "-m", "vqfast", "encode", base[0], tmp_path / "in", tmp_path / "out" / "t.vqt"]
    process = subprocess.Popen(list(map(str, argv)), env={**os.environ, "OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 120
    while not list((tmp_path / "out").iterdir()) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM and not list((tmp_path / "out").iterdir())


# ---- the rest ----


def test_decompress_takes_a_bounded_number_of_pictures_at_a_time():
    of = lambda side: CompressedPicture("a", side, side, -1, [(side // 4, side // 4, b"")])  # noqa: E731
    pictures = [of(256)] * 11 + [of(2048)] * 2 + [of(4)] * 3
    found = list(decompress.batches(pictures))
    assert [len(group) for group in found] == [4, 4, 3, 1, 1, 3] and sum(found, []) == pictures


def test_names_never_meet_whatever_the_order():
    taken = {}
    names = ["a/b.jpg", "a", "a.png/c.png", "a.png", "a.png/c.png", "a.png.png", "a.jpg"]
    places = [decode.picture_name(name, taken) for name in names]
    assert len(set(places)) == len(names)
    assert not any(parent in places for place in places for parent in place.parents)


def test_half_a_data_set_does_not_count_as_there(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("cifar10", "photos"):
        (tmp_path / "vqfast" / name).mkdir(parents=True)
    (tmp_path / "vqfast" / "photos" / "COPYRIGHT").write_text("")
    _, out, _ = vqfast(capsys, "data")
    assert "cifar10    not here" in out and f"photos     in {tmp_path}" in out
    assert complete_folder("cifar10", tmp_path / "vqfast" / "cifar10") is None


def test_a_class_that_is_no_number_is_one_sentence():
    for name in ("²", "3", "9" * 5000, "-1"):
        with pytest.raises(cli.UserError, match="there is no class"):
            sample.class_number(name, ["a", "b", "c"])
    assert sample.class_number("2", ["a", "b", "c"]) == 2
