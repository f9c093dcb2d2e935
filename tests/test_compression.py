"""Compression with a prior's probabilities: lossless, near the entropy, and refused when anything does not fit."""

import json
import math
import struct
import zlib

import pytest
import torch

from vqfast.models import compression as c
from vqfast.models.pixelcnn import GatedPixelCNN
from vqfast.models.pixelsnail import PixelSNAIL
from vqfast.models.priors import HierarchicalPrior
from vqfast.models.sampling import canonical_logits

constriction = pytest.importorskip("constriction", reason="constriction is not installed")


def build(kind=GatedPixelCNN, seed=0, **fields):
    torch.manual_seed(seed)
    small = dict(channels=10, head_channels=16, layers=2, first_kernel_size=3)
    if kind is PixelSNAIL:
        small = dict(
            channels=8,
            blocks=1,
            layers=1,
            residual_channels=8,
            first_kernel_size=3,
            attention_heads=2,
            key_channels=4,
            value_channels=4,
        )
    prior = kind(**{**small, "codebook_size": 6, **fields}).eval()
    with torch.no_grad():
        for p in prior.parameters():
            p.mul_(2.0)
    return prior


def hierarchy():
    top = build(codebook_size=5, classes=3)
    return HierarchicalPrior([build(PixelSNAIL, condition_codes=5, condition_channels=6, condition_layers=1), top])


def test_round_trip_and_size():
    prior = build()
    codes = torch.cat([prior.sample(3, 8, 9, seed=1), torch.randint(6, (2, 8, 9))])
    streams = c.compress_codes(prior, codes)
    assert torch.equal(c.decompress_codes(prior, streams, 8, 9), codes)
    bits = -canonical_logits(prior, codes)[1].sum((1, 2)) / math.log(2)
    for stream, ideal in zip(streams, bits.tolist()):
        # The range coder's last word is at most 4 bytes longer than it needs to be; probabilities are rounded to
        # 24 bits.
        assert ideal - 1 <= 8 * len(stream) <= ideal + 64
    assert sum(map(len, streams[:3])) < sum(map(len, streams[3:])) * 3 / 2, (
        "likely maps must cost less than random ones"
    )


def test_hierarchy_round_trip_with_labels():
    prior = hierarchy()
    labels = torch.tensor([0, -1, 2])
    levels = prior.sample(3, 3, 2, labels=labels)
    coded = c.compress_levels(prior, levels, labels)
    packed = [[(*codes.shape[1:], stream) for codes, stream in zip(levels, row)] for row in coded]
    for got, want in zip(c.decompress_levels(prior, packed, labels), levels):
        assert torch.equal(got, want)


def test_a_single_code_costs_nothing():
    prior, codes = build(codebook_size=1), torch.zeros(2, 3, 4, dtype=torch.int64)
    streams = c.compress_codes(prior, codes)
    assert streams == [b"", b""] and torch.equal(c.decompress_codes(prior, streams, 3, 4), codes)
    with pytest.raises(c.CompressedFileError, match="single code"):
        c.decompress_codes(prior, [b"", bytes(4)], 3, 4)


def test_probabilities_are_a_softmax_whatever_the_batch():
    logits = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * 5
    got = c.probabilities(logits)
    torch.testing.assert_close(got, logits.double().softmax(1), rtol=1e-13, atol=0)
    assert torch.equal(torch.cat([c.probabilities(row[None]) for row in logits]), got)


@pytest.fixture
def written(tmp_path):
    prior = hierarchy()
    levels = prior.sample(2, 3, 2, labels=torch.tensor([1, -1]))
    coded = c.compress_levels(prior, levels, torch.tensor([1, -1]))
    pictures = [
        c.CompressedPicture(
            f"picture {i}.png", 16, 24, label, [(*codes.shape[1:], s) for codes, s in zip(levels, coded[i])]
        )
        for i, label in enumerate((1, -1))
    ]
    path = tmp_path / "pictures.vqe"
    size = c.write_compressed(path, pictures, model="m" * 64, prior=prior)
    assert path.stat().st_size == size
    return path, prior, pictures


def test_file_round_trip(written):
    path, prior, pictures = written
    assert c.read_compressed(path, model="m" * 64, prior=prior) == pictures


def test_every_cut_and_every_altered_byte_is_refused(written):
    path, prior, _ = written
    content = path.read_bytes()
    for length in range(0, len(content), 5):
        path.write_bytes(content[:length])
        with pytest.raises(c.CompressedFileError):
            c.read_compressed(path, model="m" * 64, prior=prior)
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(c.CompressedFileError):
            c.read_compressed(path, model="m" * 64, prior=prior)
    path.write_bytes(content + b"\0")
    with pytest.raises(c.CompressedFileError, match="goes on"):
        c.read_compressed(path, model="m" * 64, prior=prior)


def test_other_model_prior_or_arithmetic_is_refused(written):
    path, prior, _ = written
    with pytest.raises(c.CompressedFileError, match="model"):
        c.read_compressed(path, model="n" * 64, prior=prior)
    with torch.no_grad():
        prior.priors[1].head.second.bias[0] += 1e-6
    with pytest.raises(c.CompressedFileError, match="prior"):
        c.read_compressed(path, model="m" * 64, prior=prior)
    content = path.read_bytes()
    length = struct.unpack("<I", content[10:14])[0]
    header = json.loads(content[14 : 14 + length]) | {"arithmetic": "another"}
    text = json.dumps(header).encode()
    start = content[:10] + struct.pack("<I", len(text)) + text
    path.write_bytes(start + struct.pack("<I", zlib.crc32(start)) + content[18 + length :])
    with pytest.raises(c.CompressedFileError, match="prior|arithmetic"):
        c.read_compressed(path, model="m" * 64, prior=prior)


@pytest.mark.parametrize(
    "text",
    [b"{", b'{"model": "\xff"}', b"[" * 200_000, b"[]", {"codebook_sizes": 5}, {"codebook_sizes": [6]}, {"pictures": "2"}],
    ids=range(7),
)
def test_forged_headers_are_refused(written, text):
    """The checksum is right."""
    path, prior, _ = written
    content = path.read_bytes()
    length = struct.unpack("<I", content[10:14])[0]
    if isinstance(text, dict):
        text = json.dumps(json.loads(content[14 : 14 + length]) | text).encode()
    start = content[:10] + struct.pack("<I", len(text)) + text
    path.write_bytes(start + struct.pack("<I", zlib.crc32(start)) + content[18 + length :])
    with pytest.raises(c.CompressedFileError, match=path.name):
        c.read_compressed(path, model="m" * 64, prior=prior)


@pytest.mark.parametrize(
    "forged, why",
    [
        (dict(label=3), "label 3"),
        (dict(label=-2), "label -2"),
        (dict(width=400_000, height=400_000), "400000x400000"),
        (dict(levels=[(100_000, 100_000, b""), (3, 2, b"")]), "100000"),
    ],
)
def test_forged_pictures_are_refused(written, forged, why):
    path, prior, pictures = written
    c.write_compressed(path, [pictures[0]._replace(**forged)], model="m" * 64, prior=prior)
    with pytest.raises(c.CompressedFileError, match=why):
        c.read_compressed(path, model="m" * 64, prior=prior)
