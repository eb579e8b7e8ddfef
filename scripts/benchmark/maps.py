"""The rows about what has changed: an incremental, a map with many runs, and a span so wide that
tracking cannot keep it all at hand."""

import contextlib
import hashlib
import json
import os
import random
import sys

from benchmark import images, measure, verify
from benchmark.rows import BACKS_UP, OwnServers, Row, Variant

CHUNK = 64 << 10
# A file of ext4 is smaller than 16 TiB.
LARGE = 15 << 40
CLIENT = f"{os.path.dirname(os.path.abspath(__file__))}/pull_changes.py"


class Incremental(Row):
    """What changed since a checkpoint is asked for, and read."""

    servers = BACKS_UP
    unit = "MiB/s"

    def verify(self, field, name):
        """With the first pull."""

    def measure(self, field, name, variant, seed):
        server = field.server(name)
        server.new_checkpoint()
        chunks = self.change(field, server, variant.options["share"], seed)
        backup = server.begin_backup()
        command = [sys.executable, CLIENT, backup.uri, backup.context, str(field.scale.seconds)]
        # The client repeats by itself, so that its own start is not measured.
        done, _, text = field.client.loop(server, command, 0)
        pull = json.loads(text)
        verify.same(pull["extents"], merged(chunks), f"{name}, dirty map")
        verify.same(pull["sha256"], digest_of(server.image, chunks), f"{name}, dirty chunks")
        field.verified["incremental", name] = \
            "the map of every pull says the chunks that were written, their SHA-256 is the image's"
        backup.close()
        images.sync(server.image)
        volume = len(chunks) * CHUNK * len(pull["took_s"])
        done.notes |= {"times": len(pull["took_s"]), "dirty_chunks": len(chunks)}
        done.volume = volume / measure.GIB
        done.rate = volume / images.MIB / sum(pull["took_s"])
        return done

    def change(self, field, server, share, seed):
        count = field.scale.size // CHUNK
        chunks = sorted(random.Random(seed).sample(range(count), max(1, int(count * share))))
        handle = verify.connect(server.uri)
        for chunk in chunks:
            handle.pwrite(b"changed " * 512, chunk * CHUNK)
        handle.shutdown()
        return chunks


def merged(chunks):
    """Extents as offset and length, as a map has them."""
    extents = []
    for chunk in chunks:
        if extents and sum(extents[-1]) == chunk * CHUNK:
            extents[-1][1] += CHUNK
        else:
            extents.append([chunk * CHUNK, CHUNK])
    return extents


def digest_of(path, chunks):
    digest = hashlib.sha256()
    with open(path, "rb") as image:
        for chunk in chunks:
            image.seek(chunk * CHUNK)
            digest.update(image.read(CHUNK))
    return digest.hexdigest()


class ManyRuns(OwnServers):
    """The dirty map of a large disk, as `nbdinfo` asks for it and prints it."""

    servers = BACKS_UP
    unit = "runs/s"
    per = "million runs"

    def measure(self, field, name, variant, seed):
        server, backup = self.own(field, name)
        done, took, text = field.client.loop(
            server, ["nbdinfo", f"--map={backup.context}", backup.uri], field.scale.seconds)
        runs = sum(line.split()[2] == "1" for line in text.splitlines())
        verify.same(runs, field.scale.runs, f"{name}, dirty runs")
        field.verified["map", name] = f"every map had {runs:,} dirty runs"
        done.volume = done.notes["times"] * runs / 1e6
        done.rate = done.notes["times"] * runs / took
        return done

    def begin(self, field, name):
        image = f"{field.place(self.stack, name + '-large')}/image"
        images.write_sparse(image, LARGE)
        # A first write into a region would wait for a sync: too long, a million times.
        with contextlib.ExitStack() as first:
            own = name == "stillpoint"
            server = field.start(first if own else self.stack, name, image,
                                 ",durability=process" if own else "")
            # A trim of nothing is a change, and takes no room.
            field.client.fio(server, "trim", seed=1, size=field.scale.runs * 2 * CHUNK,
                             pattern="trim:64k", block="64k", depth=32)
        if own:
            server = field.start(self.stack, name, image)
        return server, server.begin_backup()


class WideSpan(Row):
    """A guest that writes all over a sparse disk of which tracking keeps a tenth active."""

    own_images = True

    def verify(self, field, name):
        """After each measurement."""

    def measure(self, field, name, variant, seed):
        # A new image each time: one that was written before is not sparse any more.
        with contextlib.ExitStack() as stack:
            image = f"{field.place(stack, name + '-wide')}/image"
            images.write_sparse(image, field.scale.wide)
            server = field.start(stack, name, image)
            done = field.client.fio(server, "write", field.scale.seconds, seed=seed,
                                    size=field.scale.wide, **variant.options)
            if server.has_image:
                verify.pattern(server, field.scale.wide, seed)
                field.verified["wide", name] = f"{verify.BLOCKS} blocks read back each time"
            # A stop would sync what is thrown away now.
            server.process.kill()
            server.process.wait()
        return done


ROWS = [
    Incremental("incremental", "a small client pulls an incremental: 1 % of the disk, scattered",
                [Variant("1 % of the chunks", True, {"share": 0.01})]),
    ManyRuns("many-runs", "nbdinfo --map of a 15 TiB disk with a million dirty runs",
             [Variant("every other chunk", True, {})]),
    WideSpan("wide-span", "4 KiB writes at random over a sparse 20 GiB, ten times what is active",
             [Variant("depth 32, 1 client", True,
                      {"pattern": "randwrite", "block": "4k", "depth": 32,
                       "extra": ["--norandommap"]})]),
]
