"""Token files: what is written is read back, and nothing cut, altered or forged is ever taken for codes."""

import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqfast.tokens import (
    MAGIC,
    TokenFileError,
    TokenReader,
    TokenWriter,
    bits_for,
    model_hash,
    pack_indices,
    packed_bytes,
    unpack_indices,
)


def make(path, sizes=(512, 300), pictures=3, seed=0):
    """A small token file and the records that went in."""
    rng = np.random.default_rng(seed)
    records = []
    with TokenWriter(path, model="m" * 64, codebook_sizes=sizes, info={"made_by": "test"}) as writer:
        for i in range(pictures):
            levels = [rng.integers(0, size, (2 + i, 3 + level)) for level, size in enumerate(sizes)]
            levels[0].flat[0] = sizes[0] - 1  # the highest index is there
            writer.write(f"ordner/bild {i} äß.png", 10 + i, 20 + i, levels)
            records.append(levels)
    return records


def test_round_trip(tmp_path):
    records = make(tmp_path / "t.vqt")
    with TokenReader(tmp_path / "t.vqt") as reader:
        assert reader.codebook_sizes == (512, 300) and reader.model == "m" * 64 and reader.header["made_by"] == "test"
        got = list(reader)
    assert [r.name for r in got] == [f"ordner/bild {i} äß.png" for i in range(3)]
    assert [(r.width, r.height) for r in got] == [(10, 20), (11, 21), (12, 22)]
    for record, levels in zip(got, records, strict=True):
        for a, b in zip(record.levels, levels, strict=True):
            assert a.dtype == np.int64 and a.shape == b.shape and (a == b).all()


def test_every_loop_starts_at_the_first_record(tmp_path):
    make(tmp_path / "t.vqt")
    with TokenReader(tmp_path / "t.vqt") as reader:
        assert next(iter(reader)).width == 10
        assert [record.width for record in reader] == [record.width for record in reader] == [10, 11, 12]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**40), st.integers(1, 40), st.randoms(use_true_random=False))
def test_packing_is_exact_and_as_small_as_it_says(codebook_size, count, random):
    values = np.array([random.randrange(codebook_size) for _ in range(count)] + [codebook_size - 1])
    packed = pack_indices(values, bits_for(codebook_size))
    assert len(packed) == packed_bytes(values.shape, codebook_size)
    assert (unpack_indices(packed, len(values), bits_for(codebook_size)) == values).all()


@pytest.mark.parametrize("size, bits", [(1, 1), (2, 1), (3, 2), (256, 8), (257, 9), (512, 9), (65536, 16), (65537, 17)])
def test_bits(size, bits):
    assert bits_for(size) == bits


def test_layout_is_little_endian_and_lowest_bit_first():
    assert pack_indices(np.array([1, 2, 3]), 4) == bytes([0x21, 0x03])
    assert pack_indices(np.array([0x1FF, 0]), 9) == bytes([0xFF, 0x01, 0x00])


def test_every_truncation_and_every_altered_byte_is_refused(tmp_path):
    """Exhaustive over a small file: all prefixes, and every byte with one bit and with all bits flipped."""
    make(tmp_path / "t.vqt", sizes=(7,), pictures=2)
    whole = (tmp_path / "t.vqt").read_bytes()
    broken = tmp_path / "broken.vqt"

    def refused(content):
        broken.write_bytes(content)
        with pytest.raises(TokenFileError, match="broken.vqt"), TokenReader(broken) as reader:
            list(reader)

    for length in range(len(whole)):
        refused(whole[:length])
    for at in range(len(whole)):
        for flip in (1 << (at % 8), 0xFF):
            refused(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    refused(whole + b"\0")


def test_records_before_the_damage_are_still_given(tmp_path):
    records = make(tmp_path / "t.vqt")
    whole = (tmp_path / "t.vqt").read_bytes()
    (tmp_path / "t.vqt").write_bytes(whole[:-20])
    got = []
    with pytest.raises(TokenFileError, match="too early"), TokenReader(tmp_path / "t.vqt") as reader:
        for record in reader:
            got.append(record)
    assert len(got) == 2 and (got[1].levels[1] == records[1][1]).all()


def _records(content):
    """Start, records and end of a token file as byte strings."""
    at = len(MAGIC) + 6 + struct.unpack_from("<I", content, len(MAGIC) + 2)[0] + 4
    start, records = content[:at], []
    while content[at] == 1:
        length = 1 + 4 + struct.unpack_from("<I", content, at + 1)[0] + 4
        records.append(content[at : at + length])
        at += length
    return start, records, content[at:]


@pytest.mark.parametrize("order", [[1, 0], [0], [0, 0], [0, 1, 1]])
def test_moved_missing_and_repeated_records_are_refused(tmp_path, order):
    make(tmp_path / "t.vqt", pictures=2)
    start, records, end = _records((tmp_path / "t.vqt").read_bytes())
    (tmp_path / "t.vqt").write_bytes(start + b"".join(records[i] for i in order) + end)
    with pytest.raises(TokenFileError, match="end mark"), TokenReader(tmp_path / "t.vqt") as reader:
        list(reader)


def _forge(path, body, sizes=b'{"codebook_sizes": [300], "model": "x"}'):
    """A file with right checksums around any body."""
    start = MAGIC + struct.pack("<HI", 1, len(sizes)) + sizes
    record = struct.pack("<BI", 1, len(body)) + body
    checksum = struct.pack("<I", zlib.crc32(record))
    path.write_bytes(
        start
        + struct.pack("<I", zlib.crc32(start))
        + record
        + checksum
        + struct.pack("<BQI", 0, 1, zlib.crc32(checksum))
    )


@pytest.mark.parametrize(
    "body, why",
    [
        (struct.pack("<H1sIIBI", 1, b"a", 1, 1, 1, 1) + struct.pack("<H", 300), "outside its codebook"),
        (struct.pack("<H1sIIBI", 1, b"a", 1, 1, 1, 2**32 - 1) + b"\0\0", "does not hold"),
        (struct.pack("<H1sIIB4I", 1, b"a", 1, 1, 4, *[2**32 - 1] * 4) + b"\0\0", "does not hold"),
        (struct.pack("<H1sIIB2I", 1, b"a", 1, 1, 2, 0, 2**32 - 1), "does not hold"),
        (struct.pack("<H1sIIBI", 1, b"a", 1, 1, 1, 1) + struct.pack("<HH", 3, 3), "longer"),
        (struct.pack("<H", 9) + b"a", "cannot be read"),
        (struct.pack("<H2sIIBI", 2, b"\xff\xfe", 1, 1, 1, 1) + struct.pack("<H", 3), "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_forged_records_with_right_checksums_are_refused(tmp_path, body, why):
    _forge(tmp_path / "t.vqt", body)
    with pytest.raises(TokenFileError, match=why), TokenReader(tmp_path / "t.vqt") as reader:
        list(reader)


def test_the_forgery_helper_makes_valid_files(tmp_path):
    """Otherwise the test above could pass for a wrong reason."""
    _forge(tmp_path / "t.vqt", struct.pack("<H1sIIBI", 1, b"a", 1, 1, 1, 1) + struct.pack("<H", 299))
    with TokenReader(tmp_path / "t.vqt") as reader:
        assert [int(r.levels[0][0]) for r in reader] == [299]


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}",
        b'{"model": "x", "codebook_sizes": []}',
        b'{"model": 3, "codebook_sizes": [4]}',
        b'{"model": "x", "codebook_sizes": [0]}',
        b'{"model": "x", "codebook_sizes": [true]}',
        b"nojson",
        b'{"model": "\xff"}',
        b"[" * 200_000,
    ],
    ids=range(9),
)
def test_forged_headers_are_refused(tmp_path, header):
    _forge(tmp_path / "t.vqt", b"", sizes=header)
    with pytest.raises(TokenFileError, match="header"):
        TokenReader(tmp_path / "t.vqt")


def test_other_files_and_other_versions_are_refused(tmp_path):
    (tmp_path / "picture.vqt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(TokenFileError, match="no vqfast token file"):
        TokenReader(tmp_path / "picture.vqt")
    make(tmp_path / "t.vqt")
    content = bytearray((tmp_path / "t.vqt").read_bytes())
    content[len(MAGIC)] = 2
    (tmp_path / "t.vqt").write_bytes(bytes(content))
    with pytest.raises(TokenFileError, match="version 2"):
        TokenReader(tmp_path / "t.vqt")


@pytest.mark.parametrize(
    "levels", [[np.array([5])], [np.array([-1])], [np.array([], np.int64)], [np.array([1]), np.array([1])]]
)
def test_the_writer_refuses_what_the_reader_would(tmp_path, levels):
    with pytest.raises(ValueError), TokenWriter(tmp_path / "t.vqt", model="x", codebook_sizes=[5]) as writer:
        writer.write("a", 1, 1, levels)
    assert not list(tmp_path.iterdir()), "a failed file must leave nothing behind"


@pytest.mark.parametrize(
    "width, height, indices, error",
    [
        (1, 1, np.array([1.7]), TypeError),
        (1, 1, np.array([True]), TypeError),
        (1, 1, np.array([1j]), TypeError),
        (1.5, 1, np.array([1]), TypeError),
        (-1, 1, np.array([1]), ValueError),
        (1, 2**33, np.array([1]), ValueError),
    ],
)
def test_the_writer_stores_nothing_else_than_it_was_given(tmp_path, width, height, indices, error):
    with pytest.raises(error), TokenWriter(tmp_path / "t.vqt", model="x", codebook_sizes=[5]) as writer:
        writer.write("a", width, height, [indices])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [dict(codebook_sizes=[]), dict(codebook_sizes=[2**48]), dict(codebook_sizes=[4.5]), dict(model=5), dict(info={"x": "y" * 2**20})],
    ids=range(5),
)
def test_the_writer_refuses_headers_that_the_reader_would(tmp_path, options):
    with pytest.raises((TypeError, ValueError)):
        TokenWriter(tmp_path / "t.vqt", **{"model": "x", "codebook_sizes": [5], **options})


def test_names_that_are_not_utf8_are_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match="rename the picture"), TokenWriter(tmp_path / "t", model="x", codebook_sizes=[5]) as t:
        t.write("caf\udce9", 1, 1, [np.array([1])])


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    make(tmp_path / "t.vqt")
    before = (tmp_path / "t.vqt").read_bytes()
    with pytest.raises(KeyboardInterrupt), TokenWriter(tmp_path / "t.vqt", model="x", codebook_sizes=[5]) as writer:
        writer.write("a", 1, 1, [np.array([3])])
        raise KeyboardInterrupt
    assert (tmp_path / "t.vqt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_model_hash_sees_names_values_shapes_and_dtypes():
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.tensor(3)}
    variants = [
        base,
        {**base, "a": base["a"].reshape(3, 2)},
        {**base, "b": torch.zeros(2, dtype=torch.float16)},
        {**base, "c": torch.tensor(4)},
        {"a": base["a"], "b": base["b"], "d": base["c"]},
    ]
    assert len({model_hash(v) for v in variants}) == len(variants)
    assert model_hash(base) == model_hash(dict(reversed(list(base.items()))))
    assert model_hash(base) == model_hash({**base, "a": base["a"].t().contiguous().t()})


def test_another_models_tokens_are_refused(tmp_path):
    make(tmp_path / "t.vqt")
    with TokenReader(tmp_path / "t.vqt") as reader:
        reader.require_model("m" * 64)
        with pytest.raises(TokenFileError, match="another model"):
            reader.require_model("n" * 64)
