"""The rows about copies that are kept: `stillpoint pull` beside what one would take without it.

Each is a copy into a file that was not there, from one frozen export, on the file system that is
measured. `nbdcopy` takes every byte; the script of libnbd reads what is dirty and keeps nothing.
"""

import contextlib
import os
import shutil
import sys
import tempfile

from benchmark import measure
from benchmark.images import MIB, sync
from benchmark.maps import CLIENT, Incremental
from benchmark.processes import output
from benchmark.rows import BACKS_UP, Row, Variant


@contextlib.contextmanager
def target(server):
    """A folder beside the image, which goes again."""
    folder = tempfile.mkdtemp(dir=os.path.dirname(server.image))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        sync(server.image)


def pull(field, uri, folder, *more):
    return [field.binaries["stillpoint"], "pull", "vda", "--quiet", "--uri", uri, "--to", f"{folder}/points", *more]


def same(file, kind, server):
    """Nobody has written since the instant."""
    output(["qemu-img", "compare", "-q", "-f", kind, "-F", "raw", file, server.uri])


class FullCopy(Row):
    """All of a frozen export, into a file."""

    servers = BACKS_UP
    unit = "MiB/s"
    verified_by = "frozen"

    def measure(self, field, name, variant, seed):
        server, size = field.server(name), field.scale.size
        backup = server.begin_backup()
        with target(server) as folder:
            command = variant.options["command"](field, backup.uri, folder)
            done, took, _ = field.client.loop(server, command, 0)
            file = variant.options["file"].format(folder)
            same(file, variant.options["format"], server)
            field.verified["copy", name] = "every copy equals the disk, by qemu-img compare"
        backup.close()
        done.volume, done.rate = size / measure.GIB, size / MIB / took
        return done


class IncrementalCopy(Incremental):
    """What changed, by turns as `stillpoint pull` keeps it and as the script reads it."""

    def measure(self, field, name, variant, seed):
        server = field.server(name)
        server.new_checkpoint()
        with target(server) as folder:
            backup = server.begin_backup()
            output(pull(field, backup.uri, folder))
            backup.close()
            chunks = self.change(field, server, variant.options["share"], seed)
            backup = server.begin_backup()
            bitmap = ["--bitmap", backup.context.rpartition(":")[2]]
            script = [sys.executable, CLIENT, backup.uri, backup.context, "0"]
            ours = pull(field, backup.uri, folder, *bitmap)
            command = script if variant.options["script"] else ours
            done, took, _ = field.client.loop(server, command, 0)
            if not variant.options["script"]:
                same(f"{folder}/points/2/vda.qcow2", "qcow2", server)
                field.verified["incremental-copy", name] = \
                    "each point equals the disk, by qemu-img compare"
            backup.close()
        volume = len(chunks) * 65536
        done.notes["dirty_chunks"] = len(chunks)
        done.volume, done.rate = volume / measure.GIB, volume / MIB / took
        return done


def nbdcopy(*options):
    return lambda field, uri, folder: ["nbdcopy", *options, uri, f"{folder}/copy.raw"]


def nbdcopy_and_read_back(field, uri, folder):
    """What `pull` does too, but for comparing what was read with anything."""
    copy = f"{folder}/copy.raw"
    script = 'nbdcopy --flush "$1" "$2" && dd if="$2" of=/dev/null bs=4M iflag=direct status=none'
    return ["sh", "-c", script, "sh", uri, copy]


ROWS = [
    FullCopy("full-copy", "a frozen export is copied whole into a new file",
             [Variant("nbdcopy", True,
                      {"command": nbdcopy(), "file": "{}/copy.raw", "format": "raw"}),
              Variant("nbdcopy --flush", False,
                      {"command": nbdcopy("--flush"), "file": "{}/copy.raw", "format": "raw"}),
              Variant("nbdcopy --flush, then dd from the device", False,
                      {"command": nbdcopy_and_read_back, "file": "{}/copy.raw", "format": "raw"}),
              Variant("stillpoint pull, synced and verified", True,
                      {"command": pull, "file": "{}/points/1/vda.qcow2", "format": "qcow2"})]),
    IncrementalCopy("incremental-copy", "1 % of the disk, scattered, is pulled by one command",
                    [Variant("a script of libnbd that keeps nothing", True,
                             {"share": 0.01, "script": True}),
                     Variant("stillpoint pull, synced and verified", True,
                             {"share": 0.01, "script": False})]),
]
