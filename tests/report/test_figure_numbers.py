"""Numbers of figures from a stranger: as numpy wrote them, or refused with one message, at once and in little memory."""

import contextlib
import hashlib
import io
import json
import os
import resource
import struct
import time
import zipfile

import numpy as np
import pytest

from intactkv_eval.errors import ConfigError
from intactkv_eval.report.figure_numbers import read_numbers
from intactkv_eval.report.plots import draw
from intactkv_eval.storage.limits import FIGURES_BYTES, MIB

ARRAYS = {
    "magnitudes": np.arange(1, 13, dtype=np.float32).reshape(3, 4), "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "surface_layer": np.array(2), "none": np.zeros((0, 7), np.float16), "row": np.array([True, False]),
    "bytes": np.arange(5, dtype=np.uint8), "big": np.arange(4, dtype=">i8"),
}  # fmt: skip
SAID = {"settings": "s", "words": ["a"] * 4, "pivot_words": ["a"], "layers": [0], "head": "mean", "cache_layer": 1}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_numpy_wrote_them(tmp_path, save):
    save(tmp_path / "figures.npz", **ARRAYS)
    found, digest = read_numbers(tmp_path / "figures.npz")
    assert digest == hashlib.sha256((tmp_path / "figures.npz").read_bytes()).hexdigest()
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert np.array_equal(found[name], array)


def array(header, content=b"", version=1):
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + content


def header(shape, kind="<f4"):
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"


def packed(path, parts, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts:
            archive.writestr(name, content)


def of_objects():
    held = io.BytesIO()
    np.save(held, np.array([print], dtype=object), allow_pickle=True)
    return held.getvalue()


HOSTILE = {
    "objects": of_objects(),
    "a type with objects": array("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }", bytes(8)),
    "a huge shape": array(header("(1099511627776, 1099511627776)"), bytes(16)),
    "more than it has": array(header("(5,)"), bytes(16)),
    "less than it has": array(header("(3,)"), bytes(16)),
    "a header of a gigabyte": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**30) + b"{",
    "a nested header": array("-" * 60000 + "1"),
    "brackets": array("(" * 60000),
    "a call": array("__import__('os')"),
    "a text": array(header("(1,)", "<U4"), bytes(16)),
    "another version": array(header("(4,)"), bytes(16))[:6] + b"\x03" + array(header("(4,)"), bytes(16))[7:],
    "half": array(header("(4,)"), bytes(16))[:20],
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_array_of_numbers_is_refused(tmp_path, name):
    packed(tmp_path / "figures.npz", [("magnitudes.npy", HOSTILE[name])])
    (tmp_path / "figures.json").write_text(json.dumps(SAID))
    begun, before = time.monotonic(), peak()
    with pytest.raises(ConfigError, match=r"holds no numbers of figures \(figures.npz .*run intactkv figures"):
        draw(tmp_path, ("svg",))
    assert time.monotonic() - begun < 5
    assert peak() - before < 200 * MIB


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def zeros(path, count):
    """An archive of one array of zeros, a thousandth as large, written piece by piece."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w", force_zip64=True) as file,
    ):
        file.write(array(header(f"({count},)", "|u1")))
        for _ in range(count // MIB):
            file.write(bytes(MIB))


def test_a_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "figures.npz"
    zeros(path, FIGURES_BYTES + MIB)
    begun, before = time.monotonic(), peak()
    with pytest.raises(ValueError, match="unpacked; expected at most 512 MiB"):
        read_numbers(path)
    assert time.monotonic() - begun < 2
    assert peak() - before < 50 * MIB


def test_a_bomb_that_says_it_is_small(tmp_path):
    """The list of parts says 128 bytes; what is unpacked ends there."""
    path, count = tmp_path / "figures.npz", FIGURES_BYTES + MIB
    zeros(path, count)
    true = struct.pack("<I", count + len(array(header(f"({count},)", "|u1"))))
    content = path.read_bytes()
    assert true in content
    path.write_bytes(content.replace(true, struct.pack("<I", 128)))
    before = peak()
    with pytest.raises(ValueError, match=r"are not its|Bad CRC"):
        read_numbers(path)
    assert peak() - before < 50 * MIB


def test_a_long_list_of_parts_is_not_read(tmp_path):
    path = tmp_path / "figures.npz"
    entry = b"PK\x01\x02" + bytes(42)
    path.write_bytes(entry * 10**6 + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, 46 * 10**6, 0, 0))
    begun = time.monotonic()
    with pytest.raises(ValueError, match="a list of parts of 46,000,000 bytes; expected at most 64 KiB"):
        read_numbers(path)
    assert time.monotonic() - begun < 2


def damaged(path):
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    return content


@pytest.mark.parametrize(
    "change", [lambda path: b"", lambda path: b"PK", lambda path: path.read_bytes()[:-30], damaged]
)
def test_a_damaged_archive(tmp_path, change):
    path = tmp_path / "figures.npz"
    packed(path, [("a.npy", array(header("(64,)"), os.urandom(256)))])
    path.write_bytes(change(path))
    with pytest.raises(ValueError, match=r"figures\.npz"):
        read_numbers(path)


def test_encrypted_and_twice(tmp_path):
    path = tmp_path / "figures.npz"
    content = array(header("(1,)"), bytes(4))
    packed(path, [("a.npy", content)], zipfile.ZIP_STORED)
    data = path.read_bytes()
    for place in (data.index(b"PK\x03\x04") + 6, data.index(b"PK\x01\x02") + 8):
        data = data[:place] + b"\x01" + data[place + 1 :]
    path.write_bytes(data)
    with pytest.raises(ValueError, match="encrypted"):
        read_numbers(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        packed(path, [("a.npy", content), ("a.npy", content)])
    with pytest.raises(ValueError, match="two parts of one name"):
        read_numbers(path)


@pytest.mark.parametrize("name", ["figures.npz", "figures.json"])
def test_a_pipe_or_a_device(tmp_path, name):
    np.savez(tmp_path / "figures.npz", **ARRAYS)
    (tmp_path / "figures.json").write_text(json.dumps(SAID))
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        (tmp_path / name).unlink()
        make(tmp_path / name)
        with pytest.raises(ConfigError, match=r"is a (pipe|device), or a link to one"):
            draw(tmp_path, ("svg",))


@pytest.mark.parametrize("said", [{}, {**SAID, "words": 7}, {**SAID, "settings": 3}])
def test_words_that_do_not_go_with_the_numbers(tmp_path, said):
    np.savez(tmp_path / "figures.npz", magnitudes=ARRAYS["magnitudes"])
    digest = hashlib.sha256((tmp_path / "figures.npz").read_bytes()).hexdigest()
    (tmp_path / "figures.json").write_text(json.dumps({**said, "numbers_sha256": digest}))
    with pytest.raises(ConfigError, match="do not go together"):
        draw(tmp_path, ("svg",))
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".svg"] == []


@pytest.mark.parametrize("said", [SAID, [], {**SAID, "numbers_sha256": "0" * 64}])
def test_words_of_other_numbers(tmp_path, said):
    """As a kill between the two files leaves them."""
    np.savez(tmp_path / "figures.npz", magnitudes=ARRAYS["magnitudes"])
    (tmp_path / "figures.json").write_text(json.dumps(said))
    with pytest.raises(
        ConfigError, match=r"other numbers than those that figures\.json is about.*run intactkv figures"
    ):
        draw(tmp_path, ("svg",))


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """A disk that is full in the middle of one leaves the picture that was there."""
    np.savez(tmp_path / "figures.npz", magnitudes=ARRAYS["magnitudes"])
    digest = hashlib.sha256((tmp_path / "figures.npz").read_bytes()).hexdigest()
    (tmp_path / "figures.json").write_text(json.dumps({**SAID, "numbers_sha256": digest}))
    assert draw(tmp_path, ("svg",)) == [tmp_path / "outliers.svg"]
    before = (tmp_path / "outliers.svg").read_bytes()

    def half(_figure, file, **_named):
        with file.open("wb") if hasattr(file, "open") else contextlib.nullcontext(file) as opened:
            opened.write(b"<svg")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(OSError, match="No space left"):
        draw(tmp_path, ("svg",))
    assert (tmp_path / "outliers.svg").read_bytes() == before
