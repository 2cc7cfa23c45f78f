"""Headers of tars and .npy files are read as Python's and numpy's own readers read them, or refused."""

from __future__ import annotations

import io
import tarfile
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ParseError, ShardCorrupt
from pipeline.parsing.npy import NpyHeader, parse_npy_header
from pipeline.parsing.tar import BLOCK, LARGEST, parse_header, pax_fields, pax_size


def npy(header: bytes, version: int = 1) -> bytes:
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2 if version == 1 else 4, "little") + header


@given(
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
    st.sampled_from(["<f2", "<f4", "|u1", "<i8", ">f8", "|b1"]),
    st.booleans(),
)
def test_numpys_own_files_are_read(shape: tuple[int, ...], dtype: str, fortran: bool) -> None:
    file = io.BytesIO()
    np.save(file, np.zeros(shape, dtype, order="F" if fortran else "C"))
    header = parse_npy_header(file.getvalue())
    loaded = np.load(io.BytesIO(file.getvalue()))
    assert (header.dtype, header.shape, header.elements) == (dtype, shape, loaded.size)
    assert len(file.getvalue()) - header.start == loaded.nbytes


@pytest.mark.parametrize(
    "header",
    [
        b"-" * 9000 + b"1",
        b"1+" * 4000 + b"1",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (0x" + b"f" * 5000 + b",), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000000), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1, " * 40 + b"), }",
        b"{'descr': '|O', 'fortran_order': False}",
        b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }",
        b"{'descr': '<f4', 'fortran_order': '<f4', 'shape': (1,), }",
        b"{'descr': True, 'fortran_order': False, 'shape': (1,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), } + 1",
        b"__import__('os').system('true')",
        b"",
    ],
)
def test_a_hostile_npy_header_is_refused_in_a_moment(header: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(ParseError):
        parse_npy_header(npy(header))
    assert time.monotonic() - began < 0.5


@given(st.binary(max_size=120))
def test_any_bytes_are_an_npy_header_or_a_parse_error(data: bytes) -> None:
    for given_bytes in (data, npy(data), npy(data, 2)):
        try:
            assert isinstance(parse_npy_header(given_bytes), NpyHeader)
        except ParseError:
            pass


def tar_header(name: str = "a.jpg", size: int = 5) -> bytearray:
    info = tarfile.TarInfo(name)
    info.size = size
    return bytearray(info.tobuf(tarfile.GNU_FORMAT))


def with_size(field: bytes) -> bytes:
    header = tar_header()
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("size", [0, 5, 8**11 - 1, 8**11, LARGEST])
def test_a_size_is_read_in_octal_and_in_base_256(size: int) -> None:
    assert parse_header(bytes(tar_header(size=size))).size == size


@pytest.mark.parametrize(
    "field",
    [
        b"-0000001000\0",
        b"-1\0\0\0\0\0\0\0\0\0\0",
        b"+0000001000\0",
        b"0_000001000\0",
        b"0o777777777\0",
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,
        b"12 34 567 1\0",
        b"9999999999 \0",
    ],
)
def test_a_size_that_is_no_number_of_bytes_is_refused(field: bytes) -> None:
    with pytest.raises(ShardCorrupt, match="size"):
        parse_header(with_size(field))


@given(st.binary(max_size=BLOCK))
def test_any_block_is_a_header_with_a_size_or_corrupt(block: bytes) -> None:
    try:
        assert 0 <= parse_header(block).size <= LARGEST
    except ShardCorrupt:
        pass


@given(st.binary(max_size=60))
def test_any_pax_header_is_fields_or_corrupt(data: bytes) -> None:
    try:
        fields = pax_fields(data)
    except ShardCorrupt:
        return
    assert b"".join(b"%s=%s" % pair for pair in fields.items()) or not data


@pytest.mark.parametrize("text", [b"-5", b"1e3", b"", b"9" * 21, b"99999999999999999999", b"\xb2"])
def test_a_pax_size_that_is_no_number_of_bytes_is_refused(text: bytes) -> None:
    with pytest.raises(ShardCorrupt):
        pax_size(text)
