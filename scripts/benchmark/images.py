"""Equal images, and a page cache in the same state for all of them.

A cache that was filled by large reads has large folios, and then small writes are dearer; and a
virtual machine may page out within seconds what is idle. So each image is dropped from the cache,
read again in one chosen way, and locked into memory for as long as it is measured.
"""

import ctypes
import errno
import mmap
import os
import random

from benchmark.processes import LIBC

MIB = 1 << 20
GIB = 1 << 30
MAP_FAILED = ctypes.c_void_p(-1).value

LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
                      ctypes.c_long]
LIBC.munmap.argtypes = LIBC.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
LIBC.mlock2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
MLOCK_ONFAULT = 1


def write_full(path, size):
    """An image without a hole and without a zero block, the same for every server."""
    # A piece of any length that is no power of two; its blocks differ from each other.
    piece = random.Random(7).randbytes(MIB - 4096 + 512)
    with open(path, "wb", buffering=0) as image:
        while image.tell() < size:
            image.write(piece[:size - image.tell()])
        os.fsync(image.fileno())


def write_sparse(path, size):
    with open(path, "wb") as image:
        image.truncate(size)


def sync(path):
    """So that the next measurement is not the one that pays for what this one wrote."""
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


def fill_cache(path, size, way):
    """Leaves the whole image in the page cache, read in small pieces or in large ones."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if way == "random":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    step = 4096 if way == "random" else MIB
    for offset in range(0, size, step):
        os.pread(descriptor, step, offset)
    os.close(descriptor)


class Held:
    """A file locked into memory until it is let go."""

    def __init__(self, path, size):
        self.size = size
        with open(path, "rb") as image:
            self.address = LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, image.fileno(),
                                     0)
            if self.address == MAP_FAILED:
                raise OSError(ctypes.get_errno(), f"cannot map {path}")
            if self.lock(image.fileno()):
                raise OSError(ctypes.get_errno(),
                              f"cannot lock {size >> 20} MiB of {path} into memory: "
                              "raise the limit (ulimit -l) or be root")

    def lock(self, _):
        """Says whether that failed."""
        return LIBC.mlock(self.address, self.size)

    def release(self):
        LIBC.munmap(self.address, self.size)


class HeldData(Held):
    """The same of a sparse file: what it has, and not its holes."""

    def __init__(self, path):
        super().__init__(path, os.path.getsize(path))

    def lock(self, descriptor):
        if LIBC.mlock2(self.address, self.size, MLOCK_ONFAULT):
            return True
        for start, end in data(descriptor, self.size):
            for page in range(start, end, mmap.PAGESIZE):
                ctypes.string_at(self.address + page, 1)
        return False


def data(descriptor, size):
    """Where a file has data."""
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end
