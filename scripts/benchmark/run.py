"""The order of everything: row by row, round by round, server by server."""

import collections
import sys
import time

# What one server did in one round.
Result = collections.namedtuple("Result", "row variant server round measure")


def run(field, rows):
    """All measurements, in the order in which they were made."""
    turns = sum(len(asked(row, variant, field.scale))
                for row in rows for variant in shown(row, field.scale))
    seconds = turns * field.scale.rounds * (field.scale.seconds + OVERHEAD_S)
    say(f"{turns} measurements in {field.scale.rounds} rounds: some {seconds / 60:.1f} minutes")
    results = []
    for number, row in enumerate(rows):
        for variant in shown(row, field.scale):
            results += measure(field, row, variant)
        row.done(field)
        field.keep_only({name for later in rows[number + 1:] if not later.own_images
                         for name in later.servers})
    return results


def measure(field, row, variant):
    results = []
    for name in row.servers:
        row.verify(field, name)
    for turn in range(field.scale.rounds):
        for name in order(asked(row, variant, field.scale), turn):
            begun = time.monotonic()
            # The same requests in the same order for every server, others in every round.
            done = row.measure(field, name, variant, seed=SEED + turn)
            results.append(Result(row.name, variant.label, name, turn, done))
            say(f"{row.name}, {variant.label}, round {turn + 1}, {name}: {done.rate:,.0f} "
                f"{row.unit} ({time.monotonic() - begun:.1f} s)")
    return results


def order(servers, turn):
    """Another in every round: forwards, backwards, and then from the next one on."""
    first = turn // 2 % len(servers)
    turned = servers[first:] + servers[:first]
    return turned[::-1] if turn % 2 else turned


def shown(row, scale):
    return [variant for variant in row.variants if variant.short or not scale.short]


def asked(row, variant, scale):
    """The short run asks fewer of the peers where there are several variants."""
    few = scale.short and variant.short == "few"
    return [name for name in row.servers if not few or name in FEW]


def say(text):
    print(text, file=sys.stderr, flush=True)


SEED = 4242
FEW = ["stillpoint", "qemu-storage-daemon", "nbdkit-null"]
# What a measurement takes besides its time: starting clients, preparing, syncing.
OVERHEAD_S = 1.0
