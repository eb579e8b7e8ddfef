#!/usr/bin/python3
"""Pulls an incremental: asks an export what is dirty and reads that alone, many reads at a time.

    pull_changes.py URI CONTEXT SECONDS

Does so again and again for that long, and once at least, each time over a new connection. Prints
the extents, the SHA-256 of their bytes, and how long each pull took.
"""

import hashlib
import json
import sys
import time

import nbd

STEP = 1 << 30
READ_MAX = 1 << 20
IN_FLIGHT_MAX = 64


def dirty_extents(handle, context):
    """Merged where they touch, in order."""
    dirty = []

    def note(name, offset, entries, _error):
        if name != context:
            return 1
        for length, state in zip(entries[::2], entries[1::2]):
            if state & 1:
                if dirty and sum(dirty[-1]) == offset:
                    dirty[-1] = (dirty[-1][0], dirty[-1][1] + length)
                else:
                    dirty.append((offset, length))
            offset += length
        note.end = offset
        return 1

    size, note.end = handle.get_size(), 0
    while note.end < size:
        handle.block_status(min(STEP, size - note.end), note.end, note)
    return dirty


def pieces(extents):
    for offset, length in extents:
        for start in range(offset, offset + length, READ_MAX):
            yield start, min(READ_MAX, offset + length - start)


def read_all(handle, extents):
    """The bytes of the extents, in order, as buffers."""
    buffers = []
    failures = []

    def done(error):
        if error:
            failures.append(error)
        return 1

    for offset, length in pieces(extents):
        buffer = nbd.Buffer(length)
        buffers.append(buffer)
        handle.aio_pread(buffer, offset, done)
        while handle.aio_in_flight() >= IN_FLIGHT_MAX:
            handle.poll(-1)
    while handle.aio_in_flight():
        handle.poll(-1)
    if failures:
        sys.exit(f"{len(failures)} reads failed, the first with error {failures[0]}")
    return buffers


def pull(uri, context):
    handle = nbd.NBD()
    handle.add_meta_context(context)
    handle.connect_uri(uri)
    if not handle.can_meta_context(context):
        sys.exit(f"{uri} has no {context}")
    extents = dirty_extents(handle, context)
    buffers = read_all(handle, extents)
    handle.shutdown()
    return extents, buffers


def main(uri, context, seconds):
    took = []
    begun = time.monotonic()
    while not took or time.monotonic() - begun < float(seconds):
        last = time.monotonic()
        extents, buffers = pull(uri, context)
        took.append(time.monotonic() - last)
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer.to_bytearray())
    print(json.dumps({"extents": extents, "sha256": digest.hexdigest(), "took_s": took}))


if __name__ == "__main__":
    main(*sys.argv[1:])
