"""The rows: what each asks of a server, and in which state it finds it.

A row has variants; each is measured on every server that can do it, in turn, round by round.
"""

import collections
import contextlib

from benchmark import measure, verify
from benchmark.images import MIB, HeldData, sync

# What is measured: how it is called, whether the short run has it (True, False, or "few" for some
# of the peers), and what it is made of.
Variant = collections.namedtuple("Variant", "label short options")

EVERYONE = ["stillpoint", "qemu-storage-daemon", "qemu-nbd", "nbdkit-file", "nbdkit-null"]
BACKS_UP = ["stillpoint", "qemu-storage-daemon"]


class Row:
    """`unit` is what the rate counts, `per` what processor time is divided by."""

    servers = EVERYONE
    unit = "requests/s"
    per = "GiB"
    # What has to be right about the data, in the words of verify.py.
    verified_by = "live"
    # Whether it starts servers of its own.
    own_images = False

    def __init__(self, name, says, variants):
        self.name, self.says, self.variants = name, says, variants

    def verify(self, field, name):
        verify.once(field, self.verified_by, name)

    def measure(self, field, name, variant, seed):
        raise NotImplementedError

    def done(self, field):
        """After its last measurement."""


class OwnServers(Row):
    """Servers of the row's own, each from its first measurement to the row's last, and right at its start."""

    own_images = True

    def __init__(self, name, says, variants):
        super().__init__(name, says, variants)
        self.stack = contextlib.ExitStack()
        self.begun = {}

    def verify(self, field, name):
        """When it begins, or with every measurement."""

    def own(self, field, name):
        if name not in self.begun:
            self.begun[name] = self.begin(field, name)
        return self.begun[name]

    def begin(self, field, name):
        raise NotImplementedError

    def done(self, field):
        self.stack.close()
        self.begun.clear()


def settle(stack, field, server, backup):
    """What made a state is not written back while it is measured; and what was copied is in memory as
    the image is, until the stack is closed."""
    for path in [server.image, backup.kept_in()]:
        sync(path)
    if field.scale.held:
        stack.callback(HeldData(backup.kept_in()).release)


class Plain(Row):
    """A guest alone with its disk."""

    servers = [*EVERYONE, "no-server"]

    def __init__(self, name, says, kind, variants, unit="requests/s"):
        super().__init__(name, says, variants)
        self.kind, self.unit = kind, unit

    def measure(self, field, name, variant, seed):
        server = field.server(name)
        done = field.client.fio(server, self.kind, field.scale.seconds, seed=seed,
                                size=field.scale.size, **variant.options)
        if self.unit == "MiB/s":
            done.rate = done.notes["bytes_per_s"] / MIB
        if self.kind == "write" and server.has_image:
            sync(server.image)
        return done


class DuringBackup(Row):
    """A guest that writes at random while a backup is open."""

    servers = BACKS_UP
    verified_by = "frozen"

    def __init__(self, name, says, preserved, variants):
        super().__init__(name, says, variants)
        self.preserved = preserved

    def measure(self, field, name, variant, seed):
        server, size = field.server(name), field.scale.size
        backup = server.begin_backup()
        with contextlib.ExitStack() as stack:
            if self.preserved:
                # All of it, in large pieces: the quick way to the same state.
                field.client.fio(server, "write", seed=seed, size=size, pattern="write",
                                 block="1m", depth=8)
                settle(stack, field, server, backup)
            copies, copied = backup.copied()
            puller = measure.Puller(field.client, backup.uri, size)
            with puller if variant.options["pulled"] else contextlib.nullcontext():
                done = self.write(field, server, variant, seed)
        copies, copied = (after - before
                          for after, before in zip(backup.copied(), (copies, copied)))
        done.notes |= {"copies": copies, "copied_bytes": copied,
                       "share": copies / done.notes["requests"]}
        if variant.options["pulled"]:
            done.notes["pulled_rate"] = puller.pulled() / MIB / puller.seconds
            done.commands.append(" ".join(puller.command(3)))
        backup.close()
        sync(server.image)
        return done

    def write(self, field, server, variant, seed):
        options = {"seed": seed, "size": field.scale.size, "pattern": "randwrite", "block": "4k",
                   "depth": 32}
        if self.preserved:
            return field.client.fio(server, "write", field.scale.seconds, **options)
        # Without a time it ends when every block was written once, as the order of a random map is.
        share = variant.options.get("share", 1)
        extra = [f"--runtime={round(field.scale.seconds * 1000)}ms",
                 f"--io_size={field.scale.size // share}"]
        return field.client.fio(server, "write", extra=extra, **options)


class FrozenPull(Row):
    """A frozen export is copied whole; a quarter of its granules is in scratch."""

    servers = BACKS_UP
    unit = "MiB/s"
    verified_by = "frozen"

    def measure(self, field, name, variant, seed):
        server, size = field.server(name), field.scale.size
        backup = server.begin_backup()
        field.client.fio(server, "write", seed=seed, size=size, pattern="randwrite",
                         block=variant.options["block"], depth=32,
                         extra=[f"--io_size={size // 4}"])
        before = backup.copied()[1]
        with contextlib.ExitStack() as stack:
            settle(stack, field, server, backup)
            done = self.pull(field, server, backup, variant, seed)
        done.notes["preserved_share"] = before / size
        backup.close()
        sync(server.image)
        return done

    def pull(self, field, server, backup, variant, seed):
        done, took, _ = field.client.loop(server, ["nbdcopy", backup.uri, "null:"],
                                          field.scale.seconds)
        done.volume = done.notes["times"] * field.scale.size / measure.GIB
        done.rate = done.notes["times"] * field.scale.size / MIB / took
        return done


class FrozenPullUnderWrites(FrozenPull):
    """The same while the guest writes on; the latencies are the guest's."""

    def pull(self, field, server, backup, variant, seed):
        extra = [f"--rate_iops={rate}" for rate in variant.options["rate"]]
        guest = measure.Guest(field.client, server, seed=seed + 1000, size=field.scale.size,
                              pattern="randwrite", block="4k", depth=32, extra=extra)
        with guest:
            done = super().pull(field, server, backup, variant, seed)
        done.p50_us, done.p99_us = guest.measure.p50_us, guest.measure.p99_us
        done.notes["guest_rate"] = guest.measure.rate
        done.commands += guest.measure.commands
        return done


def depths(pattern):
    """The four shapes of a random load."""
    short = {(1, 1): "few", (32, 1): True, (1, 2): False, (32, 2): "few"}
    return [
        Variant(f"depth {depth}, {jobs} client{'s' * (jobs > 1)}", short[depth, jobs],
                {"pattern": pattern, "block": "4k", "depth": depth, "jobs": jobs,
                 "extra": ["--norandommap"]})
        for jobs in [1, 2] for depth in [1, 32]
    ]


def sequential(pattern):
    return [Variant("depth 32", True, {"pattern": pattern, "block": "64k", "depth": 32})]


QUIET_OR_PULLED = [Variant("nobody pulls", True, {"pulled": False}),
                   Variant("a client pulls", True, {"pulled": True})]

ROWS = [
    Plain("random-read", "4 KiB reads at random", "read", depths("randread")),
    Plain("random-write", "4 KiB writes at random", "write", depths("randwrite")),
    Plain("sequential-read", "64 KiB reads in order", "read", sequential("read"), "MiB/s"),
    Plain("sequential-write", "64 KiB writes in order", "write", sequential("write"), "MiB/s"),
    Plain("write-flush", "a 4 KiB write at random and a flush, by turns", "write",
          [Variant("depth 1", True, {"pattern": "randwrite", "block": "4k", "depth": 1,
                                     "extra": ["--norandommap", "--fsync=1"]})]),
    DuringBackup("backup-fresh", "4 KiB writes at random while a backup is open, each granule "
                 "once, depth 32", False,
                 [*QUIET_OR_PULLED,
                  Variant("nobody pulls, a sixteenth of the granules", False,
                          {"pulled": False, "share": 16})]),
    DuringBackup("backup-preserved", "4 KiB writes at random while a backup is open that has every "
                 "granule already, depth 32", True, QUIET_OR_PULLED),
    FrozenPull("frozen-pull", "nbdcopy of a frozen export with a quarter of it preserved",
               [Variant("in pieces of 4 KiB", True, {"block": "4k"}),
                Variant("in pieces of 64 KiB", False, {"block": "64k"})]),
    FrozenPullUnderWrites("frozen-pull-writes", "the same while the guest writes at random",
                          [Variant("2,000 writes/s", True, {"block": "4k", "rate": [2000]}),
                           Variant("all it can, depth 32", True, {"block": "4k", "rate": []})]),
]
