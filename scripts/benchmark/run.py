"""The order of everything: row by row, round by round, server by server."""

import collections
import sys
import time

# What one server did in one round.
Result = collections.namedtuple("Result", "row variant server round measure")


def run(field, rows):
    """All measurements, in the order in which they were made."""
    turns = sum(len(shown(row, field.scale)) * len(row.servers) for row in rows)
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
        for name in order(row.servers, turn):
            begun = time.monotonic()
            # The same requests in the same order for every server, others in every round.
            done = row.measure(field, name, variant, seed=SEED + turn)
            results.append(Result(row.name, variant.label, name, turn, done))
            say(f"{row.name}, {variant.label}, round {turn + 1}, {name}: {done.rate:,.0f} {row.unit} "
                f"({time.monotonic() - begun:.1f} s)")
    return results


def order(servers, turn):
    """Another in every round: nobody always comes after the same one."""
    turned = servers[turn % len(servers):] + servers[:turn % len(servers)]
    return turned[::-1] if turn % 2 else turned


def shown(row, scale):
    return [variant for variant in row.variants if variant.short or not scale.short]


def say(text):
    print(text, file=sys.stderr, flush=True)


SEED = 4242
# What a measurement takes besides its time: starting clients, preparing, syncing.
OVERHEAD_S = 1.0
