"""The seal: what it lists comes back, and no bit of it is free."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import DataFileError, MetadataError
from reshard.format.digest import digest_of, parse_digests
from reshard.format.seal import SEAL_FILE, Seal, SealedFile, decode_seal, encode_seal, read_seal
from reshard.storage import PosixStorage

FILES = {
    "model-0000000-0000001.safetensors": SealedFile(100, 40, digest_of(b"a header")),
    "extra/rank-0000000.safetensors": SealedFile(80, 80, digest_of(b"another")),
    "common.json": SealedFile.whole(b"{}"),
}


def resealed(text: bytes) -> bytes:
    """The same text with a digest that fits it: what is wrong with it is no accident."""
    body = text[: text.rindex(b'"xxh3_128"')]
    return body + f'"xxh3_128":"{digest_of(body).hex()}"}}\n'.encode()


_names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\"), min_size=1, max_size=12)


@given(st.dictionaries(_names.filter(lambda name: name not in (".", "..")), st.binary(max_size=20), max_size=5), st.booleans())
def test_any_files_come_back(contents, in_extra):
    files = {f"extra/{name}" if in_extra else name: SealedFile.whole(data) for name, data in contents.items()}
    text = encode_seal(files)
    assert decode_seal(text, "seal.json") == Seal(files)
    assert len(text.splitlines()) == max(1, len(json.loads(text)["files"])) + 3, "a line for every file"


def test_it_is_json_that_says_what_is_what():
    document = json.loads(encode_seal(FILES))
    assert list(document) == ["seal_version", "writer", "files", "xxh3_128"]
    assert document["seal_version"] == 1
    assert list(document["files"]) == sorted(FILES)
    assert document["files"]["common.json"] == {"size": 2, "xxh3_128": digest_of(b"{}").hex()}
    model = document["files"]["model-0000000-0000001.safetensors"]
    assert model == {"size": 100, "header": 40, "xxh3_128": digest_of(b"a header").hex()}


def test_every_flipped_bit_is_found():
    text = encode_seal(FILES)
    for position in range(len(text)):
        for bit in range(8):
            flipped = bytearray(text)
            flipped[position] ^= 1 << bit
            with pytest.raises(MetadataError) as caught:
                decode_seal(bytes(flipped), "/c/seal.json")
            assert caught.value.file == "/c/seal.json"


def test_a_truncated_seal():
    text = encode_seal(FILES)
    for length in range(len(text)):
        with pytest.raises(MetadataError, match=r"no digest of its own|not as it was saved"):
            decode_seal(text[:length], "seal.json")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"seal_version":1', '"seal_version":2', "another version"),
        ('"seal_version":1', '"seal_version":"1"', "unexpected value"),
        ('"common.json"', '"../common.json"', "can't be"),
        ('"common.json"', '"/etc/passwd"', "can't be"),
        ('"common.json"', '"extra/../common.json"', "can't be"),
        ('"common.json"', '"extra/"', "can't be"),
        ('"common.json"', '"a\\u0000b"', "can't be"),
        ('"size":100,"header":40', '"size":100,"header":101', "can't be"),
        ('"size":100,"header":40', '"size":100,"header":-1', "can't be"),
        ('"size":100,"header":40', '"size":100', "can't be"),
        ('"size":2,', '"size":2,"header":1,', "can't be"),
        ('"size":2,', '"size":-2,', "can't be"),
        ('"size":2,', '"size":2,"size":3,', "same key twice"),
        ('"size":2,', '"size":2.5,', "unexpected value"),
        ('"size":2,', "", "unexpected value"),
        (digest_of(b"{}").hex(), digest_of(b"{}").hex().upper(), "can't be"),
        (digest_of(b"{}").hex(), "0" * 31, "can't be"),
        ('"files":{', '"files":[', "not JSON"),
        ('"common.json"', '"model-0000000-0000001.safetensors"', "same key twice|can't be"),
    ],
)
def test_a_seal_that_no_writer_made(old, new, said):
    text = encode_seal(FILES).decode()
    assert text.count(old) == 1
    with pytest.raises(MetadataError, match=said):
        decode_seal(resealed(text.replace(old, new).encode()), "seal.json")


def test_a_sealed_file_is_held_to_it():
    data = FILES["common.json"]
    data.check(b"{}", "/c/common.json")
    with pytest.raises(MetadataError, match="the file is not as it was saved"):
        data.check(b"[]", "/c/common.json")
    with pytest.raises(MetadataError, match="the file is not as it was saved"):
        data.check(b"{} ", "/c/common.json")
    model = FILES["model-0000000-0000001.safetensors"]
    with pytest.raises(DataFileError, match="truncated"):
        model.check_size(99, "/c/model-0000000-0000001.safetensors")
    with pytest.raises(DataFileError, match="longer"):
        model.check_size(101, "/c/model-0000000-0000001.safetensors")
    with pytest.raises(DataFileError, match="header of the file is not as it was saved"):
        model.check(bytes(40), "/c/model-0000000-0000001.safetensors")
    with pytest.raises(DataFileError, match="doesn't list"):
        Seal(FILES).file("other.safetensors", "/c/other.safetensors")


def test_there_may_be_none(tmp_path: Path):
    assert read_seal(PosixStorage(), str(tmp_path)) is None
    (tmp_path / SEAL_FILE).write_bytes(encode_seal(FILES))
    assert read_seal(PosixStorage(), str(tmp_path)) == Seal(FILES)


def test_a_seal_of_an_impossible_size_is_not_read(tmp_path: Path):
    with (tmp_path / SEAL_FILE).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(MetadataError, match="larger than any"):
        read_seal(PosixStorage(), str(tmp_path))


def test_digests_have_one_spelling():
    digests = [digest_of(bytes([n])) for n in range(3)]
    text = b"".join(digests).hex()
    assert parse_digests(text) == b"".join(digests)
    assert parse_digests("") == b""
    for wrong in (text[:-1], text + "0", text.upper(), text[:-1] + "g", text[:-1] + " ", text[:-1] + "\n"):
        assert parse_digests(wrong) is None
