"""An archive that a worker sends is measured before it is unpacked: bombs of gzip, of names, of empty and of sparse files."""

import gzip
import io
import resource
import tarfile
import time

import pytest
from test_on_ray import WHOLE, packed

from intactkv_eval.errors import DataError
from intactkv_eval.storage.limits import ARCHIVE_BYTES
from intactkv_eval.sweep.archive import unpack


def refused(results, folder, message):
    """Within seconds and without memory, and nothing is written."""
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=message):
        unpack(results, folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    assert time.process_time() - begun < 5
    assert not list(folder.iterdir())


def test_a_gzip_bomb(tmp_path, monkeypatch):
    """Half a megabyte of gzip took half a gigabyte, and would take any amount."""
    monkeypatch.setattr("intactkv_eval.sweep.archive.ARCHIVE_BYTES", 2**24)
    refused(gzip.compress(bytes(2**29), 9), tmp_path, "unpack to more than 16 MiB")
    assert ARCHIVE_BYTES >= 2**32, "samples of 14,000 documents have hundreds of megabytes"


def test_a_name_of_a_gigabyte(tmp_path):
    """tarfile reads a member's attributes whole, into memory."""
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        member = tarfile.TarInfo("x")
        member.type, member.size = kind, 2**28
        refused(gzip.compress(member.tobuf() + bytes(2**20)), tmp_path, "a name or attributes of 268,435,456 bytes")


def test_millions_of_empty_files(tmp_path, monkeypatch):
    monkeypatch.setattr("intactkv_eval.sweep.archive.ARCHIVE_FILES", 100)
    refused(packed({f"m/{place}": b"" for place in range(400)}), tmp_path, "more than 100 files")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"type": tarfile.GNUTYPE_SPARSE}, "neither a file nor a folder"),
        ({"type": tarfile.FIFOTYPE}, "neither a file nor a folder"),
        ({"pax_headers": {"GNU.sparse.size": "9999999999999"}}, "another size than its header"),
        ({"pax_headers": {"size": "99"}}, "another size than its header"),
    ],
)
def test_what_is_no_file_of_its_size(tmp_path, more, message):
    refused(packed(WHOLE, **more), tmp_path, message)


def test_long_names_are_unpacked(tmp_path):
    name = "m" * 90 + "/" + "n" * 90 + "/" + "o" * 90
    unpack(packed({**WHOLE, f"{name}": b"a"}), tmp_path)
    assert (tmp_path / name).read_bytes() == b"a"
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz", format=tarfile.GNU_FORMAT) as written:
        written.add(tmp_path, arcname=".")
    (tmp_path / "again").mkdir()
    unpack(held.getvalue(), tmp_path / "again")
    assert (tmp_path / "again" / name).read_bytes() == b"a"
