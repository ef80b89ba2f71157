"""Pickles from strangers: plain values and tensors as they were written, all else refused at once and in little memory."""

import pickle
import resource
import struct
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from intactkv_eval.errors import CheckpointError
from intactkv_eval.quantize.awq_search import load_search
from intactkv_eval.storage.plain_pickle import read_plain
from intactkv_eval.storage.torch_pickle import read_torch_file
from intactkv_eval.training.run_state import RunState

PLAIN = [
    (-1.5, True), "text", "é" * 300, None, 7, -(2**40), 2**200, b"bytes", [1, [2, (3,)]], {"a": {"b": 1.0, 3: None}},
    [("a", ["b"], 1)] * 3, list(range(5000)), (), {}, [], float("inf"), "x" * 70000, {None: 1, b"k": 2, True: 3},
]  # fmt: skip


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_read_as_they_were_written(protocol):
    for value in PLAIN:
        if protocol < 3 and (isinstance(value, bytes) or (isinstance(value, dict) and None in value)):
            continue  # bytes are a call there
        assert read_plain(pickle.dumps(value, protocol)) == value


def doubled(levels):
    """Opcodes of a tuple that holds its own part twice, so many times over: 2**levels parts in a few bytes."""
    return b"\x80\x04)\x94" + b"".join(b"0h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(levels))


BOMBS = {
    "a nested tuple as a key": b"\x80\x04}(" + doubled(60)[2:] + b"Nu.",
    "a nested tuple as the key of a dict": b"\x80\x04(" + doubled(60)[2:] + b"Nd.",
    "a nested tuple in a set": b"\x80\x04\x8f(" + doubled(60)[2:] + b"\x90.",
    "2**60 parts": doubled(60) + b".",
    "2**90 levels": doubled(95)[:-1] + b"\x85" * 100 + b".",
    "itself": b"\x80\x04]\x94h\x00a.",
    "steps": b"\x80\x04" + b"N0" * 2_000_000 + b"N.",
    "a text a million times": b"\x80\x04X" + (10**6).to_bytes(4, "little") + b"x" * 10**6 + b"\x940](" + b"h\x00" * 10**5 + b"e.",
    "a number of a megabyte": b"\x80\x04\x8b" + (10**6).to_bytes(4, "little") + b"\x7f" * 10**6 + b".",
    "a call": pickle.dumps(print),
    "an array": pickle.dumps(np.float64(1.5)),
    "a call of nothing": b"\x80\x04N)R.",
    "no value": b"\x80\x04.",
    "two values": b"\x80\x04NN.",
    "an open mark": b"\x80\x04(N.",
    "more than there is": b"\x80\x04N\x87.",
    "no memo": b"\x80\x04h\x07.",
    "half": pickle.dumps(PLAIN)[:-9],
    "a file beside it": b"\x80\x04NQ.",
    "a persistent id of old": b"Pid\n.",
    "an extension": b"\x80\x04\x82\x01.",
    "a buffer": b"\x80\x05\x97.",
    "a list filled as a dict": b"\x80\x04]NNs.",
}  # fmt: skip


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_what_is_more_than_plain_is_refused_at_once(data):
    begun = time.process_time()
    with pytest.raises((pickle.UnpicklingError, ValueError, LookupError)):
        read_plain(data, {})
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_what_is_short_and_shares_nothing_is_read_faster_and_is_plain(data):
    """A short pickle is read by Python itself where it can neither share a part nor name anything."""
    try:
        value = read_plain(data)
    except (pickle.UnpicklingError, ValueError, LookupError, TypeError):
        return
    assert value in (None, ())


NAMED = {
    "GLOBAL": b"cre\ncompile\n.", "STACK_GLOBAL": b"\x80\x04\x8c\x02re\x8c\x07compile\x93.",
    "REDUCE": b"cre\ncompile\n(Va\ntR.", "INST": b"(Va\nire\ncompile\n.", "NEWOBJ": b"\x80\x02cre\nPattern\n)\x81.",
    "in a list": b"](Va\ncre\ncompile\ne.",
}  # fmt: skip


@pytest.mark.parametrize("calls", [None, {}], ids=["read by Python", "read by our own"])
@pytest.mark.parametrize("data", NAMED.values(), ids=NAMED)
def test_no_name_is_looked_up(data, calls):
    """Short ones that Python's own reader gets, since they share no part, and the same by our own."""
    with pytest.raises(pickle.UnpicklingError, match=r"it names re\.|more than plain values"):
        read_plain(data, calls)


def test_the_first_is_a_bomb_to_python_itself():
    """The control: with 24 levels, each one of which doubles the time, Python's reader takes long already."""
    begun = time.process_time()
    pickle.loads(b"\x80\x04}(" + doubled(22)[2:] + b"Nu.")
    assert time.process_time() - begun > 0.02
    with pytest.raises(pickle.UnpicklingError, match="a tuple is a key"):
        read_plain(b"\x80\x04}(" + doubled(22)[2:] + b"Nu.")


def test_tensors_are_read_as_torch_reads_them(tmp_path):
    torch.manual_seed(0)
    base = torch.randn(6, 5)
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    kinds = (
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
    value = {
        "whole": base, "view": base[1:4, 1:3], "turned": base.t(), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3),
        "kinds": [torch.arange(5).to(kind) for kind in kinds], "optimizer": optimizer.state_dict(),
        "model": model.state_dict(), "parameter": torch.nn.Parameter(torch.ones(2)), "size": torch.Size([2, 3]),
        "ordered": OrderedDict(a=1), "plain": PLAIN[:5],
    }  # fmt: skip
    torch.save(value, tmp_path / "x.pt")
    expected = torch.load(tmp_path / "x.pt", weights_only=True)
    _same(read_torch_file(tmp_path / "x.pt"), expected)


def _same(found, expected):
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            _same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _same(one, other)
    else:
        assert found == expected


def packed_again(source, target, compression=zipfile.ZIP_STORED, change=lambda name, data: data):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


@pytest.fixture(params=["search", "state"])
def reader(request):
    """The two readers of such files, each with its error."""
    if request.param == "search":
        return load_search

    def read(path):
        folder = path.parent / "run"
        folder.mkdir(exist_ok=True)
        path.rename(folder / "state.pt")
        RunState(folder, {})

    return read


def search(scale):
    return {"scale": [("norm", ["a"], scale)], "clip": [], "job": "{}"}


def test_a_stretched_tensor_takes_no_memory(tmp_path, reader):
    """A stride of 0 makes one number 12 GB as soon as the tensor is converted."""
    torch.save(search(torch.ones(1).expand(3 * 10**9)), tmp_path / "s.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="of a storage that holds 1 numbers"):
        reader(tmp_path / "s.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, "in KiB"


def test_a_compressed_record_is_not_unpacked(tmp_path, reader):
    """3 MB of a deflated archive were 3 GB in memory; here 50 KB are 50 MB."""
    torch.save(search(torch.zeros(12_500_000)), tmp_path / "plain.pt")
    packed_again(tmp_path / "plain.pt", tmp_path / "s.pt", zipfile.ZIP_DEFLATED)
    assert (tmp_path / "s.pt").stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="a part is compressed"):
        reader(tmp_path / "s.pt")


def test_a_nested_tuple_as_a_key_does_not_hang(tmp_path, reader):
    torch.save({"a": 1}, tmp_path / "plain.pt")
    bomb = b"\x80\x04}(" + doubled(60)[2:] + b"Nu."
    packed_again(
        tmp_path / "plain.pt", tmp_path / "s.pt", change=lambda name, data: bomb if name.endswith("data.pkl") else data
    )
    begun = time.process_time()
    with pytest.raises(CheckpointError, match="a tuple is a key"):
        reader(tmp_path / "s.pt")
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("data/0", lambda data: data[:-4], "is not of the"),
        ("data/0", lambda data: data + b"0000", "is not of the"),
        ("data.pkl", lambda data: data.replace(b"FloatStorage", b"LongTStorage"), "it names torch.LongTStorage"),
        ("data.pkl", lambda data: data.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"), "it names torch._utils"),
        ("byteorder", lambda data: b"big", "little-endian"),
        ("data.pkl", lambda data: data[:20], "UnpicklingError|ValueError"),
        ("data.pkl", lambda data: data.replace(b"K\x00", b"K\x09", 1), "of a storage that holds"),
    ],
)  # fmt: skip
def test_a_tensor_is_what_its_storage_holds(tmp_path, name, change, message):
    torch.save(search(torch.ones(8)), tmp_path / "plain.pt")
    packed_again(
        tmp_path / "plain.pt", tmp_path / "s.pt", change=lambda own, data: change(data) if own.endswith(name) else data
    )
    with pytest.raises(CheckpointError, match=message):
        load_search(tmp_path / "s.pt")


def test_many_tensors_of_one_storage(tmp_path):
    """Each is copied by who reads it: a thousand views of a megabyte are a gigabyte."""
    base = torch.ones(1000)
    torch.save({"scale": [("n", ["a"], base.view(-1)) for _ in range(1000)], "clip": []}, tmp_path / "s.pt")
    with pytest.raises(CheckpointError, match="4 times as large as the file"):
        load_search(tmp_path / "s.pt")


def test_advice_to_trust_the_file_is_given_nowhere(tmp_path):
    torch.save({"scale": ConfigMaker()}, tmp_path / "s.pt")
    with pytest.raises(Exception, match="weights_only"):  # the control: torch's own message
        torch.load(tmp_path / "s.pt", weights_only=True)
    with pytest.raises(CheckpointError, match="it names") as ended:
        load_search(tmp_path / "s.pt")
    assert "weights_only" not in str(ended.value)


class ConfigMaker:
    """Any class of one's own."""


def test_a_long_list_of_parts_is_not_read(tmp_path):
    """Each entry of 46 bytes became an object ten times as large."""
    path, count = tmp_path / "a.pt", 10**6
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, 46 * count, 0, 0)
    path.write_bytes((b"PK\x01\x02" + bytes(42)) * count + end)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match="a list of parts of 46,000,000 bytes; expected at most 32 MiB"):
        read_torch_file(path)
    assert time.monotonic() - begun < 2
