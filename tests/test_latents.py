"""Rows in files as sources of k-means: .npy, .safetensors and token files, read a piece at a time."""

import numpy as np
import pytest
import torch
from check import run_python

import vqfast

pytest.importorskip("PIL")
safetensors = pytest.importorskip("safetensors.torch")

from vqfast.data import DataFileError, TokenLatents, open_latents  # noqa: E402
from vqfast.tokens import TokenFileError, TokenWriter  # noqa: E402


def rows_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(30, 5), (4, 6, 5)])
def test_npy(tmp_path, dtype, shape):
    values = rows_of(*shape).numpy().astype(dtype)
    np.save(tmp_path / "rows.npy", values)
    found = open_latents(tmp_path / "rows.npy")
    assert torch.equal(found, torch.from_numpy(values).reshape(-1, 5))
    found[0, 0] = 7.0  # a copy of that page: the file stays as it is
    assert np.array_equal(np.load(tmp_path / "rows.npy"), values)


def test_npy_in_fortran_order(tmp_path):
    np.save(tmp_path / "rows.npy", np.asfortranarray(rows_of(30, 5).numpy()))
    assert torch.equal(open_latents(tmp_path / "rows.npy"), rows_of(30, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_safetensors(tmp_path, dtype):
    values = rows_of(4, 6, 5).to(dtype)
    safetensors.save_file({"values": values}, tmp_path / "one.safetensors")
    assert torch.equal(open_latents(tmp_path / "one.safetensors"), values.reshape(-1, 5))
    safetensors.save_file({"a": values, "b": values + 1}, tmp_path / "two.safetensors")
    assert torch.equal(open_latents(tmp_path / "two.safetensors", "b"), (values + 1).reshape(-1, 5))
    with pytest.raises(DataFileError, match="2 tensors .*a, b"):
        open_latents(tmp_path / "two.safetensors")
    with pytest.raises(DataFileError, match="no 'c', only a, b"):
        open_latents(tmp_path / "two.safetensors", "c")


def test_what_is_no_file_of_rows(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_latents(tmp_path / "none.npy")
    for name, array in {"ints": np.ones((3, 2), np.int64), "one_axis": np.ones(3), "objects": np.array([{}])}.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(DataFileError, match=name):
            open_latents(tmp_path / f"{name}.npy")
    np.save(tmp_path / "no_width.npy", np.ones((3, 0), np.float32))
    np.save(tmp_path / "bracket.npy", np.ones((3, 2), np.float32))
    (tmp_path / "bracket.npy").write_bytes((tmp_path / "bracket.npy").read_bytes().replace(b"(3, 2)", b"(3, 2 "))
    safetensors.save_file({"values": torch.ones(3, 0)}, tmp_path / "no_width.safetensors")
    safetensors.save_file({"values": torch.ones(3, 2).to(torch.float8_e5m2)}, tmp_path / "float8.safetensors")
    for name in ("no_width.npy", "bracket.npy", "no_width.safetensors", "float8.safetensors"):
        with pytest.raises(DataFileError, match=name):
            open_latents(tmp_path / name)
    np.save(tmp_path / "cut.npy", np.ones((100, 4), np.float32))
    whole = (tmp_path / "cut.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-100])
    (tmp_path / "cut.safetensors").write_bytes(safetensors.save({"values": rows_of(20, 4)})[:-100])
    (tmp_path / "text.txt").write_text("1 2 3")
    for name in ("cut.npy", "cut.safetensors", "text.txt"):
        with pytest.raises(DataFileError, match=name):
            open_latents(tmp_path / name)


def test_k_means_of_a_file_is_that_of_its_rows(tmp_path):
    values = rows_of(700, 6)
    np.save(tmp_path / "rows.npy", values.numpy())
    for options in ({}, {"init": "k-means++"}, {"batch_rows": 128}):
        found = vqfast.kmeans(open_latents(tmp_path / "rows.npy"), 20, iterations=3, **options)
        wanted = vqfast.kmeans(values, 20, iterations=3, **options)
        assert torch.equal(found.codebook, wanted.codebook) and torch.equal(found.indices, wanted.indices)


def write_tokens(path, levels, sizes):
    """A token file with one picture per row of every level's [pictures, H, W]."""
    with TokenWriter(path, model="abc", codebook_sizes=sizes) as writer:
        for number, record in enumerate(zip(*levels, strict=True)):
            writer.write(f"picture {number}", 8, 8, [level.numpy() for level in record])


def test_token_files(tmp_path):
    generator = torch.Generator().manual_seed(1)
    sizes, file = (40, 300), tmp_path / "pictures.vqt"
    levels = [torch.randint(size, (5, side, side), generator=generator) for size, side in zip(sizes, (2, 4))]
    write_tokens(file, levels, sizes)
    codebook = rows_of(300, 6)
    source, rows = TokenLatents(file, codebook, level=1, model="abc"), codebook[levels[1].flatten()]
    assert source.shape == (80, 6) and torch.equal(source[10:33], rows[10:33])
    at = torch.tensor([79, 0, 5, 5])
    assert torch.equal(source[at], rows[at])
    found, wanted = (vqfast.kmeans(x, 12, iterations=2) for x in (source, rows))
    assert torch.equal(found.codebook, wanted.codebook) and torch.equal(found.indices, wanted.indices)
    with pytest.raises(TokenFileError, match="another model"):
        TokenLatents(file, codebook, level=1, model="abd")
    for level in (2, -1):
        with pytest.raises(ValueError, match="2 levels"):
            TokenLatents(file, codebook, level=level)
    with pytest.raises(ValueError, match="has 40 codes"):
        TokenLatents(file, codebook, level=0)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(TokenFileError):
        TokenLatents(file, codebook, level=1)


OUT_OF_CORE = """
import sys
import numpy as np, torch, vqfast
from vqfast.data import open_latents

file, options = sys.argv[1], {"batch_rows": 65536} if sys.argv[2] == "mini_batch" else {}
n, d = 2**20, 64
out = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(n, d))
for begin in range(0, n, 2**16):
    out[begin : begin + 2**16] = np.random.default_rng(begin).standard_normal((2**16, d), dtype=np.float32)
del out

def anonymous():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith("RssAnon"))

rows, largest = open_latents(file), 0.0
vqfast.kmeans(rows[:4096], 8, iterations=1, **options)
before = anonymous()

from vqfast.ops import kmeans
search = kmeans._Rows.search
def watched(self, *args):
    global largest
    found = search(self, *args)
    largest = max(largest, anonymous())
    return found
kmeans._Rows.search = watched
found = vqfast.kmeans(rows, 8, iterations=1, **options)
extra = largest - before
print(f"{extra:.1f} MiB of {n * d * 4 / 2**20:.0f}")
assert found.indices.shape == (n,) and extra < 96, f"{extra:.1f} MiB"
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lloyd", "mini_batch"])
def test_a_file_is_not_read_into_memory(tmp_path, way):
    """256 MiB of rows: O(N) indices and distances are 12 MiB, a piece of rows 32."""
    run_python(OUT_OF_CORE, str(tmp_path / "rows.npy"), way, timeout=280)
