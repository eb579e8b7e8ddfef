"""QEMU's storage daemon, and pull-mode backup as its users have to put it together."""

import json
import os
import socket

from benchmark import processes
from benchmark.servers import Server

CLUSTER = 64 << 10


class Qmp:
    """A connection to a monitor; what was said is kept for the record."""

    def __init__(self, path, record):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(processes.PATIENCE_S)
        self.socket.connect(path)
        self.lines = self.socket.makefile("r")
        self.record = record
        self.events = []
        self.receive()
        self.execute("qmp_capabilities")

    def receive(self):
        line = self.lines.readline()
        if not line:
            raise EOFError("the storage daemon has closed its monitor")
        return json.loads(line)

    def execute(self, command, **arguments):
        text = json.dumps({"execute": command, "arguments": arguments})
        self.record.append(f"QMP {text}")
        self.socket.sendall(text.encode() + b"\n")
        while True:
            message = self.receive()
            if "error" in message:
                raise RuntimeError(f"{text}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
            self.events.append(message)

    def wait_for(self, event, **data):
        """Until an event with this data has come, be it before now."""
        while True:
            for message in self.events:
                if message["event"] == event and data.items() <= message["data"].items():
                    self.events.remove(message)
                    return
            self.events.append(self.receive())

    def close(self):
        self.lines.close()
        self.socket.close()


class StorageDaemon(Server):
    """Cached and on io_uring, with a bitmap that records, as a checkpoint of libvirt's does."""

    name = "qemu-storage-daemon"
    can_back_up = True

    def start(self):
        self.serve([
            "--blockdev", f"driver=file,node-name=file,filename={self.image},aio=io_uring,"
                          "cache.direct=off,discard=unmap",
            "--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap",
        ])
        self.qmp.execute("block-dirty-bitmap-add", node="disk", name="checkpoint")

    def serve(self, blockdevs, writable="on"):
        """Exports the node `disk` of these."""
        self.uri = f"nbd+unix:///vda?socket={self.socket}"
        monitor = f"{self.sockets}/qmp"
        self.launch([
            self.binary,
            "--chardev", f"socket,id=qmp,path={monitor},server=on,wait=off",
            "--monitor", "chardev=qmp",
            *blockdevs,
            "--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=0",
            "--export", f"type=nbd,id=live,node-name=disk,name=vda,writable={writable}",
        ])
        self.qmp = Qmp(monitor, self.commands)

    def stop(self):
        self.qmp.close()
        super().stop()

    def new_checkpoint(self):
        self.qmp.execute("block-dirty-bitmap-clear", node="disk", name="checkpoint")

    def begin_backup(self):
        return FleecedBackup(self)


class FleecedBackup:
    """An overlay that old clusters are copied to, exported with a copy of the bitmap."""

    context = "qemu:dirty-bitmap:frozen"

    def __init__(self, server):
        self.server = server
        self.overlay = f"{server.folder}/overlay.qcow2"
        self.uri = f"nbd+unix:///frozen?socket={server.socket}"
        qmp = server.qmp
        server.tell(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", server.image,
                     "-F", "raw", self.overlay, str(os.path.getsize(server.image))])
        qmp.execute("blockdev-add", **{
            "driver": "qcow2", "node-name": "overlay", "backing": "disk",
            "file": {"driver": "file", "filename": self.overlay, "aio": "io_uring"},
        })
        # One transaction: the instant of the bitmap is that of the copy.
        qmp.execute("transaction", actions=[
            {"type": "block-dirty-bitmap-add",
             "data": {"node": "disk", "name": "frozen", "disabled": True}},
            {"type": "block-dirty-bitmap-merge",
             "data": {"node": "disk", "target": "frozen", "bitmaps": ["checkpoint"]}},
            {"type": "blockdev-backup",
             "data": {"job-id": "fleece", "device": "disk", "target": "overlay", "sync": "none"}},
        ])
        qmp.execute("block-export-add", **{
            "type": "nbd", "id": "frozen", "node-name": "overlay", "name": "frozen",
            "bitmaps": [{"node": "disk", "name": "frozen"}],
        })
        self.empty = self.allocated()

    def allocated(self):
        return os.stat(self.overlay).st_blocks * 512

    def kept_in(self):
        return self.overlay

    def copied(self):
        """Copies so far, and their bytes: what the overlay has grown by, in clusters."""
        grown = self.allocated() - self.empty
        return grown // CLUSTER, grown

    def close(self):
        qmp = self.server.qmp
        qmp.execute("block-export-del", id="frozen", mode="hard")
        qmp.wait_for("BLOCK_EXPORT_DELETED", id="frozen")
        qmp.execute("block-job-cancel", device="fleece")
        qmp.wait_for("JOB_STATUS_CHANGE", id="fleece", status="null")
        qmp.execute("blockdev-del", **{"node-name": "overlay"})
        qmp.execute("block-dirty-bitmap-remove", node="disk", name="frozen")
        os.unlink(self.overlay)
        qmp.events.clear()
