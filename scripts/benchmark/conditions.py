"""The conditions that a guest is measured under, and how each is made.

What is only about clients of a frozen export is measured with the backup open in the calm turns
too, and all of the guest's granules preserved before: the two differ by those clients alone.
"""

import contextlib
import os
import shlex
import subprocess
import sys
import time

from benchmark import images, processes
from benchmark.images import GIB, MIB
from benchmark.processes import pinned
from benchmark.repeated import Repeated
from benchmark.servers import Stillpoint

CHUNK = 64 << 10
DISTURBER = f"{os.path.dirname(os.path.abspath(__file__))}/disturber.py"


class Condition:
    """A server that stands for all turns, and what is different in a disturbed one."""

    # Whether the guest's part of the image is locked into memory.
    held = True

    def __init__(self, name, says):
        self.name, self.says = name, says

    def image_size(self, scale):
        """The guest's part comes first; it is all there is unless a condition needs more."""
        return scale.size

    def prepare(self, field, stack):
        """The guest's part of the image is full, and in memory."""
        image = f"{field.place(stack, self.name)}/image"
        self.fill(field, image)
        images.fill_cache(image, field.scale.size, field.cache)
        if self.held and field.scale.held:
            stack.callback(images.Held(image, field.scale.size).release)
        return self.start(field, stack, image)

    def fill(self, field, image):
        images.write_full(image, field.scale.size)
        os.truncate(image, self.image_size(field.scale))

    def start(self, field, stack, image):
        return field.start(stack, "stillpoint", image)

    def guest(self, field):
        """What its fio is told otherwise, in every turn."""
        return {}

    def disturbed_guest(self, field):
        """The same in the disturbed turns."""
        return {}

    def disturb(self, field, server):
        return contextlib.nullcontext()

    def settle(self, field, server, disturbed):
        images.sync(server.image)


class OtherGuest(Condition):
    """What is extreme is the guest itself."""

    def __init__(self, name, says, options):
        super().__init__(name, says)
        self.options = options

    def disturbed_guest(self, field):
        return self.options


class Beside:
    """One client that goes on until it is ended, from its first request to its last."""

    def __init__(self, client, command):
        self.command = pinned(command, client.core)
        self.commands = [shlex.join(self.command)]

    def __enter__(self):
        self.process = processes.spawn(self.command, stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.wait_until_effective()
        return self

    def wait_until_effective(self):
        """It says a word once it has been served."""
        self.process.stdout.readline()

    def __exit__(self, *_):
        self.ended = self.process.poll() is not None
        self.process.terminate()
        complaint = self.process.communicate()[1]
        if self.ended:
            raise RuntimeError(f"{self.commands[0]}: it ended by itself: {complaint}")

    def notes(self):
        return {}


class Looped(Repeated):
    """Counts how often the client ended."""

    def __init__(self, client, command, what):
        super().__init__()
        self.command, self.what = pinned(command, client.core), what
        self.commands = [shlex.join(self.command)]
        self.times = 0

    def once(self):
        self.spawn(self.command)
        self.wait(self.command)
        self.times += not self.process.returncode

    def notes(self):
        if self.error:
            raise self.error
        return {f"beside: {self.what}": self.times}


class Mapped(Condition):
    """`nbdinfo` asks a frozen export for a long map, over and over."""

    def prepare(self, field, stack):
        server = super().prepare(field, stack)
        self.backup = preserved(field, server)
        return server

    def context(self):
        return self.backup.context

    def disturb(self, field, server):
        command = ["nbdinfo", f"--map={self.context()}", self.backup.uri]
        return Looped(field.client, command, "whole maps")


class FragmentedMap(Mapped):
    """A disk that has every other chunk dirty."""

    def image_size(self, scale):
        return 64 * GIB if scale.held else GIB

    def start(self, field, stack, image):
        size, whole = field.scale.size, self.image_size(field.scale)
        # A first write into a region would wait for a sync: too long, so many times.
        with contextlib.ExitStack() as first:
            server = field.start(first, "stillpoint", image, ",durability=process")
            # A trim of nothing is a change, and takes no room.
            field.client.fio(server, "trim", seed=1, size=whole - size, pattern="trim:64k",
                             block="64k", depth=32, extra=[f"--offset={size}"])
        return field.start(stack, "stillpoint", image)


class SmallExtents(Mapped):
    """An image of thousands of data extents between holes, behind the guest's part."""

    def extents(self, scale):
        return 10_000 if scale.held else 1000

    def image_size(self, scale):
        return scale.size + self.extents(scale) * 2 * 4096

    def fill(self, field, image):
        super().fill(field, image)
        with open(image, "r+b", buffering=0) as file:
            for number in range(self.extents(field.scale)):
                file.seek(field.scale.size + number * 2 * 4096)
                file.write(b"extent! " * 512)

    def context(self):
        return "base:allocation"


class SlowClients(Condition):
    """Clients of the frozen export that ask for much and take little."""

    CLIENTS = 8

    def prepare(self, field, stack):
        server = super().prepare(field, stack)
        self.backup = preserved(field, server)
        return server

    def disturb(self, field, server):
        return Beside(field.client, [
            sys.executable, DISTURBER, "slow", f"{server.run_dir}/backup.sock",
            f"vda@{self.backup.id}", str(self.CLIENTS), str(MIB)])


class LargeRequests(Condition):
    """Another client of the live export, behind the guest's part of it."""

    SIZE = 32 * MIB

    def image_size(self, scale):
        return scale.size + 8 * self.SIZE

    def disturb(self, field, server):
        begin, end = field.scale.size, self.image_size(field.scale)
        return Beside(field.client, [
            sys.executable, DISTURBER, "large", server.uri, str(self.SIZE), str(begin), str(end)])


class OpenBackup(contextlib.AbstractContextManager):
    """A new backup for as long as a turn takes."""

    commands = []

    def __init__(self, server):
        self.backup = server.begin_backup()

    def notes(self):
        return {"beside: granules copied": self.copies}

    def __exit__(self, *_):
        self.copies = self.backup.copied()[0]
        self.backup.close()


class SlowScratch(Condition):
    """A backup with a scratch file in which every write takes long."""

    def start(self, field, stack, image):
        return field.start(stack, "stillpoint", image, kind=DelayedScratch)

    def disturb(self, field, server):
        return OpenBackup(server)


class DelayedScratch(Stillpoint):
    """Under strace, which makes every write to a scratch file a millisecond longer."""

    DELAY_US = 1000
    BACKUPS = 16

    def launch(self, command, socket=None):
        scratch = f"{self.folder}/scratch"
        os.mkdir(scratch)
        # A backup's scratch file has a name that can be known before.
        paths = [word for number in range(1, self.BACKUPS + 1)
                 for word in ["-P", f"{scratch}/vda/backups/b{number}/scratch"]]
        # A grandchild that traces: the server stays ours, to be told to stop.
        super().launch(["strace", "--daemonize", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null",
                        *paths, "-e", "trace=pwrite64,pwritev,copy_file_range",
                        f"--inject=all:delay_exit={self.DELAY_US}",
                        *command, "--scratch-dir", scratch], socket)


class Everywhere(Condition):
    """The guest leaves its part and writes all over a sparse disk, with a backup open."""

    def image_size(self, scale):
        return scale.wide

    def disturbed_guest(self, field):
        return {"size": field.scale.wide}

    def disturb(self, field, server):
        return OpenBackup(server)


class Throttled(Condition):
    """Another client writes faster than the disk can, until the kernel makes writers wait."""

    held = False
    PATIENCE_S = 30

    def image_size(self, scale):
        return scale.size + (8 * GIB if scale.held else 64 * MIB)

    def disturb(self, field, server):
        begin = field.scale.size
        command = field.client.fio_command(
            server, "write", "1m", self.image_size(field.scale) - begin, seed=1, depth=8,
            extra=[f"--offset={begin}", "--time_based", "--runtime=3600"])
        return Writer(field, command)

    def settle(self, field, server, disturbed):
        if disturbed:
            begin, end = field.scale.size, self.image_size(field.scale)
            # What was not written back by now need not be.
            field.client.fio(server, "trim", seed=1, size=end - begin, pattern="trim", block="16m",
                             extra=[f"--offset={begin}"])
        super().settle(field, server, disturbed)


class Writer(Beside):
    """Effective only once the kernel throttles it."""

    def __init__(self, field, command):
        super().__init__(field.client, command)
        self.patience_s = Throttled.PATIENCE_S if field.scale.held else 0

    def wait_until_effective(self):
        begun = time.monotonic()
        while dirty_share() < 1 and time.monotonic() - begun < self.patience_s:
            time.sleep(0.05)

    def __exit__(self, *exception):
        self.share = dirty_share()
        super().__exit__(*exception)

    def notes(self):
        return {"beside: dirty memory, as a share of where writers begin to wait": self.share}


def dirty_share():
    """Of what may be dirty before the kernel makes writers wait; it begins halfway between the
    background limit and the limit."""
    with open("/proc/vmstat") as file:
        stat = dict(line.split() for line in file)
    dirty, writeback, limit, background = (int(stat[f"nr_{name}"]) for name in [
        "dirty", "writeback", "dirty_threshold", "dirty_background_threshold"])
    return 2 * (dirty + writeback) / (limit + background)


def preserved(field, server):
    """A backup that has all of the guest's granules."""
    backup = server.begin_backup()
    field.client.fio(server, "write", seed=1, size=field.scale.size, pattern="write", block="1m",
                     depth=8)
    images.sync(server.image)
    return backup


CONDITIONS = [
    FragmentedMap("fragmented-map", "nbdinfo --map of dirty chunks, in a loop on the frozen "
                  "export: 64 GiB, every other chunk dirty"),
    SmallExtents("small-extents", "nbdinfo --map of base:allocation, in a loop on the frozen "
                 "export: 10,000 extents of 4 KiB between holes"),
    OtherGuest("64-connections", "64 guests at depth 1 in place of one at depth 4",
               {"depth": 1, "jobs": 64}),
    LargeRequests("32-mib-requests", "another client of the live export writes and reads 32 MiB "
                  "by turns"),
    OtherGuest("512-byte-requests", "the guest's own requests have 512 bytes", {"block": "512"}),
    SlowScratch("slow-scratch", "a backup is open, and strace makes each write to its scratch file "
                "1 ms longer"),
    SlowClients("slow-clients", "8 clients of the frozen export ask for 16 MiB at a time and take "
                "1 MiB/s"),
    Everywhere("writes-everywhere", "a backup is open, and the guest is all over a sparse 20 GiB, "
               "ten times what is active"),
    Throttled("dirty-throttling", "another client writes 1 MiB requests, as fast as the kernel "
              "lets it; nothing is locked in memory"),
]
