"""A client beside what is measured."""

import shlex
import subprocess
import threading
import time

from benchmark import processes


class Repeated:
    """A client that is run again as often as it ends, until told to stop."""

    def __init__(self):
        self.process = self.error = None
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        while not self.stopping.is_set() and not self.error:
            self.once()

    def spawn(self, command, **more):
        self.process = processes.spawn(command, stdin=subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **more)

    def wait(self, command):
        """Until it has ended. That it failed is told later, unless it was told to stop."""
        complaint = self.process.communicate()[1].decode()
        if self.process.returncode and not self.stopping.is_set():
            self.error = RuntimeError(f"{shlex.join(command)}: {complaint}")

    def __enter__(self):
        self.begun = time.monotonic()
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.seconds = time.monotonic() - self.begun
        self.stopping.set()
        if self.process:
            self.process.terminate()
        self.thread.join()
