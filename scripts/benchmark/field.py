"""The field: the servers that are running, each on an image of its own, and who asks them."""

import collections
import contextlib
import os
import shutil

from benchmark import images
from benchmark.measure import Client
from benchmark.servers import NbdkitFile, NbdkitNull, NoServer, QemuNbd, Stillpoint
from benchmark.storage_daemon import StorageDaemon

KINDS = {kind.name: kind for kind in [Stillpoint, StorageDaemon, QemuNbd, NbdkitFile, NbdkitNull,
                                       NoServer]}

# How much is measured: bytes of an image, seconds and rounds of a measurement, dirty runs, bytes of
# a wide span, whether only a part of the variants, and whether images are locked into memory.
Scale = collections.namedtuple("Scale", "size seconds rounds runs wide short held")


class Field:
    """When it is closed, everything that it started has ended and everything it made is gone."""

    def __init__(self, scale, binaries, folder, sockets, cache, pin):
        self.scale, self.binaries, self.cache = scale, binaries, cache
        self.folder, self.sockets = folder, sockets
        self.server_core, client_core = (0, 1) if pin else (None, None)
        self.client = Client(client_core)
        self.running = {}
        # For the record: by server, and by kind and server.
        self.commands = {}
        self.verified = {}

    def server(self, name):
        """One on a full image in memory, from the first time that it is asked for."""
        if name not in self.running:
            with contextlib.ExitStack() as stack:
                image = f"{self.place(stack, name)}/image"
                if KINDS[name].has_image:
                    images.write_full(image, self.scale.size)
                    images.fill_cache(image, self.scale.size, self.cache)
                    if self.scale.held:
                        stack.callback(images.Held(image, self.scale.size).release)
                else:
                    images.write_sparse(image, self.scale.size)
                server = self.start(stack, name, image)
                self.running[name] = server, stack.pop_all()
        return self.running[name][0]

    def place(self, stack, name):
        folder = f"{self.folder}/{name}"
        os.mkdir(folder)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def start(self, stack, name, image, options="", kind=None):
        """One on this image until the stack ends, of another kind than the name says if need be."""
        server = (kind or KINDS[name])(self.binaries[name], os.path.dirname(image), self.sockets,
                                       image, core=self.server_core, options=options)
        stack.callback(server.stop)
        self.commands.setdefault(name, []).append(server.commands)
        return server

    def keep_only(self, names):
        """Those that nothing is asked of any more give their room back."""
        for name in [name for name in self.running if name not in names]:
            self.running.pop(name)[1].close()

    def close(self):
        self.keep_only([])
