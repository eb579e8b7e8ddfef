"""The rows about disks that are not a file as its bytes are: qcow2 images, and exports of another
server, with what it costs to have somebody in between."""

import os
import shlex
import subprocess

from benchmark import images, processes, verify
from benchmark.processes import output
from benchmark.rows import OwnServers, Variant
from benchmark.servers import NbdkitFile, QemuNbd, Stillpoint
from benchmark.storage_daemon import StorageDaemon


class Qcow2Stillpoint(Stillpoint):
    """Of what cannot be written there is nothing to track."""

    def start(self):
        self.run_dir = f"{self.sockets}/{self.name}"
        self.uri = f"nbd+unix:///vda?socket={self.run_dir}/live.sock"
        self.launch([self.binary, "serve", "--disk",
                     f"vda={self.image},format=qcow2,read-only", "--run-dir", self.run_dir],
                    f"{self.run_dir}/control.sock")


class Qcow2StorageDaemon(StorageDaemon):
    def start(self):
        self.serve([
            "--blockdev", f"driver=file,node-name=file,filename={self.image},aio=io_uring,"
                          "cache.direct=off,read-only=on",
            "--blockdev", "driver=qcow2,node-name=disk,file=file,read-only=on",
        ], "off")


class Qcow2QemuNbd(QemuNbd):
    def start(self):
        self.launch([self.binary, "-t", "-r", "-e", "8", "-k", self.socket, "-f", "qcow2",
                     "--cache=writeback", "--aio=io_uring", self.image])


class Base:
    """The server that has the image, for one that stands between it and the client."""

    def __init__(self, server):
        self.socket = f"{server.sockets}/base-{server.name}"
        command = ["nbdkit", "-f", "-U", self.socket, "file", f"file={server.image}"]
        command = processes.pinned(command, server.core)
        server.commands.append(shlex.join(command))
        log = f"{server.folder}/base.log"
        with open(log, "w") as file:
            self.process = processes.spawn(command, stdin=subprocess.DEVNULL, stdout=file,
                                           stderr=file)
        try:
            processes.wait_for_socket(self.socket, self.process, log)
        except BaseException:
            self.stop()
            raise

    def stop(self):
        processes.stop(self.process)
        if os.path.exists(self.socket):
            os.unlink(self.socket)


class BasedStillpoint(Stillpoint):
    def start(self):
        self.base = Base(self)
        try:
            super().start()
        except BaseException:
            self.base.stop()
            raise

    def disk(self):
        return f"nbd+unix:///?socket={self.base.socket},state={self.folder}/state"

    def stop(self):
        super().stop()
        self.base.stop()


class BasedStorageDaemon(StorageDaemon):
    def start(self):
        self.base = Base(self)
        try:
            self.serve([
                "--blockdev", "driver=nbd,node-name=file,server.type=unix,"
                              f"server.path={self.base.socket},discard=unmap",
                "--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap",
            ])
        except BaseException:
            self.base.stop()
            raise
        self.qmp.execute("block-dirty-bitmap-add", node="disk", name="checkpoint")

    def stop(self):
        super().stop()
        self.base.stop()


class Own(OwnServers):
    """A guest alone with its disk, on servers of the row's own."""

    def __init__(self, name, says, kinds, variants, unit="requests/s"):
        super().__init__(name, says, variants)
        self.kinds, self.servers, self.unit = kinds, list(kinds), unit

    def measure(self, field, name, variant, seed):
        server, kind = self.own(field, name), variant.options["kind"]
        load = {key: value for key, value in variant.options.items() if key != "kind"}
        done = field.client.fio(server, kind, field.scale.seconds, seed=seed,
                                size=field.scale.size, **load)
        if self.unit == "MiB/s":
            done.rate = done.notes["bytes_per_s"] / images.MIB
        if kind == "write":
            images.sync(server.image)
        return done

    def in_memory(self, field, image):
        size = os.path.getsize(image)
        images.fill_cache(image, size, field.cache)
        if field.scale.held:
            self.stack.callback(images.Held(image, size).release)


class OfQcow2(Own):
    def begin(self, field, name):
        folder = field.place(self.stack, f"{name}-qcow2")
        raw, image = f"{folder}/raw", f"{folder}/image"
        images.write_full(raw, field.scale.size)
        expected = verify.file_digest(raw)
        output(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image])
        os.unlink(raw)
        self.in_memory(field, image)
        server = field.start(self.stack, name, image, kind=self.kinds[name])
        verify.same(verify.pulled_digest(server.uri), expected, f"{name}, qcow2")
        field.verified["qcow2", name] = \
            "SHA-256 of the whole export equal to that of what the image was made of"
        return server


class OnBase(Own):
    def begin(self, field, name):
        image = f"{field.place(self.stack, name + '-base')}/image"
        images.write_full(image, field.scale.size)
        self.in_memory(field, image)
        server = field.start(self.stack, name, image, kind=self.kinds[name])
        field.verified["base", name] = verify.live(field, server)
        return server


QCOW2 = {"stillpoint": Qcow2Stillpoint, "qemu-storage-daemon": Qcow2StorageDaemon,
         "qemu-nbd": Qcow2QemuNbd}
# The last of them is the base itself.
BASED = {"stillpoint": BasedStillpoint, "qemu-storage-daemon": BasedStorageDaemon,
         "nbdkit-file": NbdkitFile}


def at_random(kind):
    return {"kind": kind, "pattern": f"rand{kind}", "block": "4k", "depth": 32,
            "extra": ["--norandommap"]}


def in_order(kind):
    return {"kind": kind, "pattern": kind, "block": "64k", "depth": 32}


ROWS = [
    OfQcow2("qcow2-random", "4 KiB reads at random of a qcow2 image", QCOW2,
            [Variant("reads, depth 32", True, at_random("read"))]),
    OfQcow2("qcow2-sequential", "64 KiB reads in order of a qcow2 image", QCOW2,
            [Variant("reads, depth 32", True, in_order("read"))], "MiB/s"),
    OnBase("base-random", "4 KiB at random on an export of nbdkit file, and on that itself", BASED,
           [Variant("reads, depth 32", True, at_random("read")),
            Variant("writes, depth 32", True, at_random("write"))]),
    OnBase("base-sequential", "64 KiB in order on an export of nbdkit file, and on that itself",
           BASED,
           [Variant("reads, depth 32", True, in_order("read")),
            Variant("writes, depth 32", True, in_order("write"))], "MiB/s"),
]
