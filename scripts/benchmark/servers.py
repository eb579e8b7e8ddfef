"""The servers: one way to start each, and what each can do besides serving an image.

Sockets are in a folder of their own, as their paths must be short; images, state and scratch are
on the file system that is measured.
"""

import json
import os
import shlex
import subprocess

from benchmark import processes
from benchmark.processes import output, pinned


class Server:
    """One that serves `image` on `uri` from its start until `stop`."""

    can_back_up = False
    has_image = True

    def __init__(self, binary, folder, sockets, image, core=None, options=""):
        self.binary, self.folder, self.sockets, self.image = binary, folder, sockets, image
        self.core, self.options = core, options
        self.socket = f"{sockets}/{self.name}"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self.commands = []
        self.start()

    def launch(self, command, socket=None):
        command = pinned(command, self.core)
        self.commands.append(shlex.join(command))
        log = f"{self.folder}/{self.name}.log"
        with open(log, "w") as file:
            self.process = processes.spawn(command, stdin=subprocess.DEVNULL,
                                           stdout=file, stderr=file)
        try:
            processes.wait_for_socket(socket or self.socket, self.process, log)
        except BaseException:
            processes.stop(self.process)
            raise

    def tell(self, command):
        """Runs a command beside the server, and keeps it for the record."""
        self.commands.append(shlex.join(command))
        return output(command)

    def pid(self):
        return self.process.pid

    def fio_target(self):
        return ["--ioengine=nbd", f"--uri={self.uri}"]

    def stop(self):
        processes.stop(self.process)
        if os.path.exists(self.socket):
            os.unlink(self.socket)


class Stillpoint(Server):
    """With its defaults, and one checkpoint that it has to know the changes since."""

    name = "stillpoint"
    can_back_up = True

    def start(self):
        self.run_dir = f"{self.sockets}/{self.name}"
        self.uri = f"nbd+unix:///vda?socket={self.run_dir}/live.sock"
        self.launch([self.binary, "serve", "--disk", f"vda={self.disk()}{self.options}",
                     "--run-dir", self.run_dir, "--scratch-reserve", "0"],
                    f"{self.run_dir}/control.sock")
        self.backups = 0
        self.checkpoints = len(self.cli("checkpoint", "list"))
        if not self.checkpoints:
            self.new_checkpoint()

    def disk(self):
        """Where it is, and where its state goes."""
        return self.image

    def stop(self):
        processes.stop(self.process)

    def cli(self, *arguments):
        return json.loads(self.tell([self.binary, "--run-dir", self.run_dir, "--json",
                                     *arguments]))

    def new_checkpoint(self):
        """From now on changes are asked for since this moment, and no other is known."""
        if self.checkpoints:
            self.cli("checkpoint", "delete", self.checkpoint())
        self.checkpoints += 1
        self.cli("checkpoint", "create", self.checkpoint())

    def checkpoint(self):
        return f"cp{self.checkpoints}"

    def begin_backup(self):
        self.backups += 1
        backup = self.cli("backup", "begin", "--id", f"b{self.backups}",
                          "--since", self.checkpoint())
        return StillpointBackup(self, backup)


class StillpointBackup:
    def __init__(self, server, backup):
        self.server, self.id = server, backup["id"]
        self.uri = backup["disks"][0]["uris"][0]
        self.context = f"qemu:dirty-bitmap:{server.checkpoint()}"

    def copied(self):
        """Copies so far, and their bytes."""
        disk = self.server.cli("backup", "show", self.id)["disks"][0]
        return disk["copying_writes"], disk["scratch_used_bytes"]

    def kept_in(self):
        """The file that it copies to."""
        return f"{self.server.image}.stillpoint/backups/{self.id}/scratch"

    def close(self):
        self.server.cli("backup", "abort", self.id)


class QemuNbd(Server):
    name = "qemu-nbd"

    def start(self):
        self.launch([self.binary, "-t", "-e", "8", "-k", self.socket, "-f", "raw",
                     "--cache=writeback", "--aio=io_uring", self.image])


class NbdkitFile(Server):
    name = "nbdkit-file"

    def start(self):
        self.launch([self.binary, "-f", "-U", self.socket, "file", f"file={self.image}"])


class NbdkitNull(Server):
    """A server that does nothing: what one client can ask at most."""

    name = "nbdkit-null"
    has_image = False

    def start(self):
        self.launch([self.binary, "-f", "-U", self.socket, "null",
                     f"size={os.path.getsize(self.image)}"])


class NoServer(Server):
    """fio alone with the file, a thread for each client: what the page cache gives at most."""

    name = "no-server"

    def start(self):
        self.uri = None

    def pid(self):
        return None

    def fio_target(self):
        # What the page cache has is quickest asked for one after the other. It stays there.
        return ["--ioengine=psync", f"--filename={self.image}", "--invalidate=0"]

    def stop(self):
        """Nothing was started."""
