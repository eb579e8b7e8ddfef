"""Drives a server with libnbd's Python binding, and prints what it saw as one JSON object.

usage: libnbd_client.py LIVE-URI FROZEN-URI
"""

import json
import sys

import nbd


def live(uri):
    h = nbd.NBD()
    h.connect_uri(uri)
    h.pwrite(b"\x09" * 4096, 8192, nbd.CMD_FLAG_FUA)
    h.zero(4092, 8196)
    h.trim(65536, 1 << 20)
    h.cache(65536, 0)
    h.flush()
    # Several in flight.
    buffers = [nbd.Buffer(512) for _ in range(32)]
    cookies = [h.aio_pread(each, 512 * n) for n, each in enumerate(buffers)]
    for cookie in cookies:
        while not h.aio_command_completed(cookie):
            h.poll(-1)
    seen = {
        "size": h.get_size(),
        "structured": h.get_structured_replies_negotiated(),
        "read": h.pread(8, 8192).hex(),
    }
    h.shutdown()
    return seen


def frozen(uri):
    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    h.add_meta_context("qemu:dirty-bitmap:cp1")
    h.connect_uri(uri)
    maps = {}

    def extents(context, offset, entries, error):
        maps[context] = list(zip(entries[::2], entries[1::2]))

    h.block_status(h.get_size(), 0, extents)
    seen = {
        "read_only": h.is_read_only(),
        "read": h.pread(2, 0).hex(),
        "dirty": maps["qemu:dirty-bitmap:cp1"],
        "write_fails": None,
    }
    # What libnbd would not send by itself is sent all the same.
    h.set_strict_mode(0)
    try:
        h.pwrite(b"x", 0)
    except nbd.Error as error:
        seen["write_fails"] = error.errno
    h.shutdown()
    return seen


print(json.dumps({"live": live(sys.argv[1]), "frozen": frozen(sys.argv[2])}))
