"""One measurement: what a client got, and what it cost the server."""

import dataclasses
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import time

from benchmark import processes
from benchmark.processes import family, output, pinned
from benchmark.repeated import Repeated

TICKS = os.sysconf("SC_CLK_TCK")
GIB = 1 << 30


@dataclasses.dataclass
class Measure:
    """`rate` in the unit of its row; latencies are those of the guest; `volume` is what the
    processor time is divided by, in GiB unless the row says otherwise."""

    rate: float
    volume: float
    p50_us: float = None
    p99_us: float = None
    cpu_s: float = 0.0
    peak_kib: int = 0
    anonymous_kib: int = 0
    commands: list = dataclasses.field(default_factory=list)
    notes: dict = dataclasses.field(default_factory=dict)


class Watch:
    """What a server uses, from the beginning of a measurement to its end."""

    def __init__(self, server):
        self.server = server

    def pids(self):
        pid = self.server.pid()
        return [] if pid is None else family(pid)

    def __enter__(self):
        for pid in self.pids():
            with open(f"/proc/{pid}/clear_refs", "w") as file:
                # The peak starts anew.
                file.write("5")
        self.begun = time.monotonic()
        self.before, self.stolen_before = self.cpu_s(), stolen_s()
        return self

    def cpu_s(self):
        """With children that have ended, whose time is their parent's."""
        ticks = 0
        for pid in self.pids():
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
        return ticks / TICKS

    def kib(self, name):
        total = 0
        for pid in self.pids():
            with open(f"/proc/{pid}/status") as file:
                found = re.search(rf"^{name}:\s+(\d+) kB$", file.read(), re.M)
            # What has just ended has no memory left.
            total += int(found.group(1)) if found else 0
        return total

    def __exit__(self, *_):
        self.used_s = self.cpu_s() - self.before
        self.stolen = (stolen_s() - self.stolen_before) / (time.monotonic() - self.begun)
        self.peak_kib = self.kib("VmHWM")
        self.anonymous_kib = self.kib("RssAnon")

    def into(self, measure):
        measure.cpu_s, measure.notes["stolen"] = self.used_s, self.stolen
        measure.peak_kib, measure.anonymous_kib = self.peak_kib, self.anonymous_kib
        return measure


def stolen_s():
    """Processor time that the hypervisor gave to others, of all processors."""
    with open("/proc/stat") as file:
        return int(file.readline().split()[8]) / TICKS


class Client:
    """Who asks: fio, nbdcopy, nbdinfo and our own client of dirty maps, perhaps on one core."""

    def __init__(self, core=None):
        self.core = core

    def fio_command(self, server, pattern, block, size, seed, depth=1, jobs=1, extra=()):
        # Where it is to repeat itself, fio leaves the seed out of the offsets.
        return pinned([
            "fio", "--name=guest", *server.fio_target(), f"--rw={pattern}",
            f"--bs={block}", f"--size={size}", f"--iodepth={depth}", f"--numjobs={jobs}",
            "--group_reporting", "--randrepeat=0", f"--randseed={seed}", "--thread",
            "--output-format=json", *extra,
        ], self.core)

    def fio(self, server, kind, seconds=None, **options):
        """Runs fio for so long, or until it is through; `kind` is read, write, trim or mixed."""
        extra = list(options.pop("extra", []))
        if seconds is not None:
            extra += ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
        command = self.fio_command(server, extra=extra, **options)
        with Watch(server) as watch:
            text = output(command)
        return watch.into(fio_measure(text, kind, command))

    def loop(self, server, command, seconds):
        """Runs a command again and again, for so long and once at least; how long each took."""
        command = pinned(command, self.core)
        took = []
        with Watch(server) as watch:
            begun = time.monotonic()
            while not took or time.monotonic() - begun < seconds:
                last = time.monotonic()
                text = output(command)
                took.append(time.monotonic() - last)
        measure = Measure(rate=0, volume=0, commands=[shlex.join(command)])
        measure.notes["times"] = len(took)
        measure.notes["each_s"] = statistics.median(took)
        return watch.into(measure), sum(took), text


def fio_measure(text, kind, command):
    # It talks before it answers.
    result = json.loads(text[text.index("{"):])["jobs"][0]
    if result["error"]:
        raise RuntimeError(f"{shlex.join(command)}: error {result['error']}")
    part = result[kind]
    # Where there are flushes it is those that somebody waits for.
    flushes = result.get("sync", {}).get("lat_ns", {})
    latency = flushes if flushes.get("N") else part["clat_ns"]
    percentile = latency["percentile"]
    return Measure(
        rate=part["iops"], volume=part["io_bytes"] / GIB,
        p50_us=percentile["50.000000"] / 1e3, p99_us=percentile["99.000000"] / 1e3,
        commands=[shlex.join(command)],
        notes={"requests": part["total_ios"], "bytes_per_s": part["bw_bytes"],
               "longest_us": latency["max"] / 1e3},
    )


class Guest:
    """A guest that writes while something else is measured, and is then asked how it was."""

    def __init__(self, client, server, **options):
        extra = [*options.pop("extra", []), "--time_based", "--runtime=3600"]
        self.command = client.fio_command(server, extra=extra, **options)
        self.image = server.image

    def __enter__(self):
        before = os.stat(self.image).st_mtime_ns
        self.process = processes.spawn(self.command, stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                       text=True)
        # It writes as soon as somebody has written.
        while os.stat(self.image).st_mtime_ns == before and self.process.poll() is None:
            time.sleep(0.005)
        return self

    def __exit__(self, kind, *_):
        # Asked to stop it still reports.
        self.process.send_signal(signal.SIGINT)
        text, _ = self.process.communicate(timeout=processes.PATIENCE_S)
        self.measure = None if kind else fio_measure(text, "write", self.command)


class Puller(Repeated):
    """Pulls a frozen export over and over."""

    def __init__(self, client, uri, size):
        super().__init__()
        self.client, self.uri, self.size = client, uri, size
        self.hundredths = 0

    def command(self, progress):
        return pinned(["nbdcopy", f"--progress={progress}", self.uri, "null:"], self.client.core)

    def once(self):
        reader, writer = os.pipe()
        self.spawn(self.command(writer), pass_fds=[writer])
        os.close(writer)
        with open(reader) as progress:
            # `N/100`, a line each.
            lines = progress.read().split()
        self.wait(self.command(3))
        self.hundredths += int(lines[-1].split("/")[0]) if lines else 0

    def pulled(self):
        """Bytes, to a hundredth of a pull."""
        if self.error:
            raise self.error
        return self.hundredths * self.size // 100
