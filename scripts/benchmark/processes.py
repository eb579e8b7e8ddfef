"""Child processes that end with whoever started them."""

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import time

# Much longer than any server ever took to start, or to end.
PATIENCE_S = 60
PR_SET_PDEATHSIG = 1

LIBC = ctypes.CDLL(None, use_errno=True)


def end_with_parent():
    """In the child, before it is the program: not even a kill of the benchmark leaves it behind."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def pinned(command, core):
    """The same command on one core, or anywhere."""
    return command if core is None else ["taskset", "-c", str(core), *command]


def spawn(command, **streams):
    return subprocess.Popen(command, preexec_fn=end_with_parent, **streams)


def output(command):
    """What a command prints; if it fails, what it complained of."""
    done = subprocess.run(command, preexec_fn=end_with_parent, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: exit code {done.returncode}\n"
                           f"{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def stop(process):
    """Ends a process that was spawned here, politely if it listens."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_socket(path, process, log):
    """Until somebody answers on a Unix socket, or the process that should has gone."""
    end = time.monotonic() + PATIENCE_S
    while True:
        with socket.socket(socket.AF_UNIX) as stream:
            try:
                stream.connect(path)
                return
            except OSError:
                pass
        if process.poll() is not None or time.monotonic() > end:
            with open(log) as file:
                raise RuntimeError(f"nobody answers on {path}: {file.read()[-2000:]}")
        time.sleep(0.01)


def family(pid):
    """A process and all its descendants."""
    pids = [pid]
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                children = file.read().split()
        except (FileNotFoundError, ProcessLookupError):
            # A thread that has ended meanwhile.
            continue
        for child in children:
            pids += family(int(child))
    return pids
