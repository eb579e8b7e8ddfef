"""A machine under QEMU's software emulation, with a kernel from Debian and an initramfs made here.

Its second serial port takes lines of shell, one at a time, and answers with what they print and
the code that they end with.
"""

import glob
import os
import re
import shutil
import socket
import subprocess
import time

# Waiting for an emulated machine; much longer than it ever took.
PATIENCE_S = 90

BEGIN = """#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in {modules}; do modprobe $module; done
"""

SERVE_CONSOLE = """
stty -F /dev/ttyS1 raw -echo
exec </dev/ttyS1 >/dev/ttyS1
echo READY
while read -r line; do
    eval "$line" >/tmp/out 2>&1
    code=$?
    cat /tmp/out
    echo "END $code"
done
"""


class Initramfs:
    """A kernel, and an archive with busybox, the `modules` of that kernel, and `binaries` by name.

    `init` is a shell script that ends in `SERVE_CONSOLE`. The kernel is that of `package`, one of
    Debian's for clouds, which is downloaded where it is None.
    """

    def __init__(self, folder, package, modules, init, binaries):
        self.folder, self.modules = folder, modules
        self.fetch(package)
        self.kernel = glob.glob(f"{folder}/kernel/boot/vmlinuz-*")[0]
        self.archive = f"{folder}/initramfs"
        self.pack(init, binaries)

    def fetch(self, package):
        downloads = f"{self.folder}/downloads"
        os.makedirs(downloads, exist_ok=True)
        if package is None and not glob.glob(f"{downloads}/linux-image-*.deb"):
            text = subprocess.check_output(
                ["apt-cache", "depends", "linux-image-cloud-amd64"], text=True
            )
            name = re.search(r"Depends: (\S+)", text).group(1)
            subprocess.check_call(["apt-get", "download", "-q", name], cwd=downloads)
        if not glob.glob(f"{downloads}/busybox-static*.deb"):
            subprocess.check_call(["apt-get", "download", "-q", "busybox-static"], cwd=downloads)
        package = package or glob.glob(f"{downloads}/linux-image-*.deb")[0]
        busybox = glob.glob(f"{downloads}/busybox-static*.deb")[0]
        for name, deb in [("kernel", package), ("busybox", busybox)]:
            if not os.path.isdir(f"{self.folder}/{name}"):
                subprocess.check_call(["dpkg-deb", "-x", deb, f"{self.folder}/{name}"])
        release = os.listdir(f"{self.folder}/kernel/lib/modules")[0]
        self.depmod = [f"{self.folder}/busybox/bin/busybox", "depmod", "-b"]
        subprocess.check_call([*self.depmod, f"{self.folder}/kernel", release])

    def pack(self, init, binaries):
        root = f"{self.folder}/root"
        shutil.rmtree(root, ignore_errors=True)
        for name in ["bin", "proc", "sys", "dev", "srv", "run", "tmp", "lib64"]:
            os.makedirs(f"{root}/{name}")
        shutil.copy(f"{self.folder}/busybox/bin/busybox", f"{root}/bin/busybox")
        commands = subprocess.check_output([f"{root}/bin/busybox", "--list"], text=True)
        for command in commands.split():
            if command != "busybox":
                os.symlink("busybox", f"{root}/bin/{command}")
        for name, binary in binaries.items():
            self.copy_binary(root, name, binary)
        self.copy_modules(root)
        with open(f"{root}/init", "w") as file:
            file.write(BEGIN.format(modules=" ".join(self.modules)) + init)
        os.chmod(f"{root}/init", 0o755)
        subprocess.check_call(
            f"cd '{root}' && find . | cpio --quiet -o -H newc > '{self.archive}'", shell=True
        )

    @staticmethod
    def copy_binary(root, name, binary):
        shutil.copy(binary, f"{root}/bin/{name}")
        libraries = subprocess.check_output(["ldd", binary], text=True)
        for path in re.findall(r"(/\S+) \(", libraries):
            target = f"{root}{path}"
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy(path, target)

    def copy_modules(self, root):
        modules = glob.glob(f"{self.folder}/kernel/lib/modules/*")[0]
        release = os.path.basename(modules)
        wanted = f"{root}/lib/modules/{release}"
        os.makedirs(wanted)
        needed = {}
        for line in open(f"{modules}/modules.dep"):
            module, others = line.split(":")
            needed[module] = others.split()
        builtin = open(f"{modules}/modules.builtin").read()
        for name in self.modules:
            if f"/{name}.ko" in builtin:
                continue
            path = next(path for path in needed if path.endswith(f"/{name}.ko"))
            for file in [path, *needed[path]]:
                os.makedirs(os.path.dirname(f"{wanted}/{file}"), exist_ok=True)
                shutil.copy(f"{modules}/{file}", f"{wanted}/{file}")
        for name in ["modules.builtin", "modules.order"]:
            shutil.copy(f"{modules}/{name}", wanted)
        subprocess.check_call([*self.depmod, root, release])


class Machine:
    """A machine that is running, until its power is cut.

    `options` are QEMU's, for its disks and what else it has; `log` is where its kernel speaks.
    """

    def __init__(self, folder, initramfs, options, log):
        self.console = f"{folder}/console"
        command = [
            "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "512", "-smp", "2",
            "-nographic", "-nodefaults", "-no-reboot",
            "-kernel", initramfs.kernel, "-initrd", initramfs.archive,
            "-append", "console=ttyS0 quiet panic=-1",
            "-serial", f"file:{log}",
            "-serial", f"unix:{self.console},server=on,wait=off",
            *options,
        ]
        if os.path.exists(self.console):
            os.unlink(self.console)
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            self.stream = self.connect()
            self.until("READY")
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def connect(self):
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                stream = socket.socket(socket.AF_UNIX)
                stream.connect(self.console)
                stream.settimeout(PATIENCE_S)
                return stream.makefile("rw")
            except OSError:
                stream.close()
                if time.monotonic() > end or self.process.poll() is not None:
                    raise
                time.sleep(0.02)

    def until(self, start):
        lines = []
        while True:
            line = self.stream.readline()
            if not line:
                raise EOFError("the machine is gone")
            line = line.rstrip("\r\n")
            if line.startswith(start):
                return lines, line
            lines.append(line)

    def run(self, command):
        self.stream.write(command + "\n")
        self.stream.flush()
        lines, end = self.until("END ")
        return int(end.split()[1]), "\n".join(lines)

    def cut(self):
        self.process.kill()
        self.process.wait()
        self.stream.close()
