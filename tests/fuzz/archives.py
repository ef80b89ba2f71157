"""What a worker of a Ray cluster sends: damaged on its way, or packed of damaged files."""

import gzip
import io
import shutil
import tarfile

import mutate

from intactkv_eval.sweep.archive import unpack


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
