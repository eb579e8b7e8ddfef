#!/usr/bin/python3
"""A client that is hard on a server beside the guest.

    disturber.py large URI SIZE OFFSET END
    disturber.py slow SOCKET EXPORT CLIENTS BYTES_PER_SECOND

`large` writes and reads SIZE bytes by turns, between OFFSET and END. `slow` is several clients that
ask for much and take their replies that slowly. Both go on until they are ended, and say so once
they were served.
"""

import itertools
import os
import socket
import struct
import sys
import time

import nbd

REQUEST = 1 << 20
REPLY_HEADER = 16
# Requests that each slow client has asked and not yet been answered.
AHEAD = 16
TICK_S = 0.01
FIXED_NEWSTYLE_NO_ZEROES = 3
EXPORT_NAME = 1


def large(uri, size, offset, end):
    size, offset, end = int(size), int(offset), int(end)
    handle = nbd.NBD()
    handle.connect_uri(uri)
    data = os.urandom(size)
    for turn, place in enumerate(itertools.cycle(range(offset, end - size + 1, size))):
        handle.pwrite(data, place)
        if turn == 0:
            print("served", flush=True)
        handle.pread(size, place)


class SlowClient:
    """It never looks at what it gets: only how much there was says what it may ask next."""

    def __init__(self, path, export):
        self.stream = socket.socket(socket.AF_UNIX)
        # The replies are to wait at the server, not in this end's buffer.
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.stream.connect(path)
        self.receive(18)
        name = export.encode()
        self.stream.sendall(struct.pack(">IQII", FIXED_NEWSTYLE_NO_ZEROES,
                                        int.from_bytes(b"IHAVEOPT"), EXPORT_NAME, len(name)) + name)
        self.size = struct.unpack(">QH", self.receive(10))[0]
        self.asked = self.received = 0

    def receive(self, length):
        data = self.stream.recv(length, socket.MSG_WAITALL)
        if len(data) != length:
            sys.exit("the server has closed a slow client's connection")
        return data

    def take(self, length):
        self.receive(length)
        self.received += length

    def ask(self):
        while self.asked < self.received // (REQUEST + REPLY_HEADER) + AHEAD:
            offset = self.asked * REQUEST % (self.size - REQUEST + 1)
            self.stream.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, self.asked, offset,
                                            REQUEST))
            self.asked += 1


def slow(path, export, clients, bytes_per_second):
    readers = [SlowClient(path, export) for _ in range(int(clients))]
    piece = int(int(bytes_per_second) * TICK_S)
    for tick in itertools.count(1):
        for reader in readers:
            reader.ask()
            reader.take(piece)
        if tick == 1:
            print("served", flush=True)
        time.sleep(TICK_S)


if __name__ == "__main__":
    {"large": large, "slow": slow}[sys.argv[1]](*sys.argv[2:])
