"""Archives: what a worker of a Ray cluster sends, and the numbers of figures; damaged, or packed of damaged files."""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import zipfile

import mutate
import numpy as np

from intactkv_eval.report.plots import _read
from intactkv_eval.sweep.archive import unpack

ARRAYS = {"magnitudes": np.ones((3, 4), np.float32), "surface_layer": np.array(2), "nats": np.zeros((2, 3))}
HEADERS = ["{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "(" * 300, "-" * 9000 + "1",
           "{'descr': '<f8', 'fortran_order': True, 'shape': (99999999, 99999999), }",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }"]  # fmt: skip


def packed(folder):
    """The folder as a tar, as bytes."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as written:
        written.add(folder, arcname=".", filter=nobodys)
    return held.getvalue()


def nobodys(member):
    """An input that is kept must not tell of the machine."""
    member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
    return member


def damaged(plain, draw):
    """The tar, compressed; bytes of one of the two are changed, or one of its members asks for more than it has."""
    if draw.random() < 0.2:
        member = tarfile.TarInfo(draw.choice(["x", "x" * 200, "a/" * 99]))
        member.type = draw.choice([tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, tarfile.REGTYPE])
        member.size = draw.choice([0, 512, 2**20, 2**32, 2**35 - 1])
        member.pax_headers = draw.choice([{}, {"size": "99999999999"}, {"GNU.sparse.realsize": "99999999999"}])
        asking = member.tobuf() + bytes(draw.choice([0, 512, 2**24]))
        return gzip.compress(draw.choice([asking, asking + plain, plain[:-1024] + asking]), mtime=0)
    if draw.random() < 0.5:
        return mutate.of_bytes(gzip.compress(plain, mtime=0), draw)
    return gzip.compress(mutate.of_bytes(plain, draw), mtime=0)


def read(place, data):
    """As the driver does, into a new folder."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    unpack(data, place)


def damaged_numbers(draw):
    """An archive of arrays whose bytes are changed, those of an array before they are packed or all of them after."""
    held, broken = io.BytesIO(), draw.choice([None, *ARRAYS])
    with zipfile.ZipFile(held, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, array in ARRAYS.items():
            one = io.BytesIO()
            np.save(one, array)
            content = one.getvalue()
            if name == broken and draw.random() < 0.5:
                text = draw.choice(HEADERS).encode() + b"\n"
                content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16)
            elif name == broken:
                content = mutate.of_bytes(content, draw)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content)
    return held.getvalue() if broken and draw.random() < 0.5 else mutate.of_bytes(held.getvalue(), draw)


def read_figures(path):
    """As whoever draws them again does, with words that are of these numbers."""
    said = {"settings": "s", "numbers_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.with_name("figures.json").write_text(json.dumps(said))
    _read(path.parent)
