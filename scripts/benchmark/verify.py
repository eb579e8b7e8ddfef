"""That what was measured was also right: a server that loses data is quick.

Each check is made once for each server, and is a sentence of the report.
"""

import hashlib
import random
import shlex
import subprocess

import nbd

from benchmark import processes
from benchmark.images import MIB

BLOCK = 4096
BLOCKS = 64


def once(field, kind, name):
    if (kind, name) not in field.verified:
        field.verified[kind, name] = KINDS[kind](field, field.server(name))


def same(found, expected, what):
    if found != expected:
        raise SystemExit(f"bench: wrong data: {what}: {found} instead of {expected}")


def live(field, server):
    """What is written is read again on another connection, and is in the image."""
    if not server.has_image:
        return "nothing to verify: it keeps nothing"
    if server.uri is None:
        return "nothing to verify: there is none"
    pattern(server, field.scale.size, seed=11)
    same(pulled_digest(server.uri), file_digest(server.image), f"{server.name}, live export")
    return (f"{BLOCKS} blocks read back on another connection; "
            "SHA-256 of the whole export equal to that of the image")


def pattern(server, size, seed):
    chosen = random.Random(seed)
    blocks = {chosen.randrange(size // BLOCK) * BLOCK: chosen.randbytes(BLOCK)
              for _ in range(BLOCKS)}
    writer, reader = connect(server.uri), connect(server.uri)
    for offset, data in blocks.items():
        writer.pwrite(data, offset)
    for offset, data in blocks.items():
        if reader.pread(BLOCK, offset) != data:
            raise SystemExit(f"bench: wrong data: {server.name}: block at {offset}, seed {seed}")
    writer.shutdown()
    reader.shutdown()


def frozen(field, server):
    """A pull after many guest writes is a copy of the instant."""
    before = file_digest(server.image)
    backup = server.begin_backup()
    field.client.fio(server, "write", seed=13, size=field.scale.size, pattern="randwrite",
                     block="4k", depth=32, extra=[f"--io_size={field.scale.size // 8}"])
    if file_digest(server.image) == before:
        raise SystemExit(f"bench: {server.name}: the guest's writes changed nothing")
    same(pulled_digest(backup.uri), before, f"{server.name}, frozen export")
    backup.close()
    return "SHA-256 of a pull after an eighth was overwritten equal to that of the instant"


def connect(uri):
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


def pulled_digest(uri):
    command = ["nbdcopy", uri, "-"]
    process = processes.spawn(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    with process.stdout as stream:
        digest = stream_digest(stream)
    if process.wait():
        raise SystemExit(f"bench: {shlex.join(command)}: exit code {process.returncode}")
    return digest


def file_digest(path):
    with open(path, "rb") as file:
        return stream_digest(file)


def stream_digest(stream):
    digest = hashlib.sha256()
    while piece := stream.read(MIB):
        digest.update(piece)
    return digest.hexdigest()


KINDS = {"live": live, "frozen": frozen}
