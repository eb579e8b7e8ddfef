"""What a guest feels when something extreme goes on beside it: a table of its own.

Under each condition the guest is measured by turns, calm and disturbed and calm again, and a ratio
is that of a disturbed turn to the mean of its two neighbours. All is Stillpoint's: the guest is
compared with itself.
"""

import contextlib
import dataclasses
import itertools
import statistics
import time

from benchmark import report
from benchmark.run import SEED, say


@dataclasses.dataclass
class Turn:
    condition: str
    number: int
    disturbed: bool
    measure: object


def run(field, conditions):
    """All turns, in the order in which they were made."""
    turns = []
    for condition in conditions:
        begun = time.monotonic()
        with contextlib.ExitStack() as stack:
            server = condition.prepare(field, stack)
            say(f"{condition.name}: prepared in {time.monotonic() - begun:.1f} s")
            # A check has enough of them when each kind had one.
            for number in range(2 * field.scale.rounds + field.scale.held):
                turns.append(turn(field, condition, server, number))
    return turns


def turn(field, condition, server, number):
    disturbed = number % 2 == 1
    options = condition.guest(field) | (condition.disturbed_guest(field) if disturbed else {})
    options = {"pattern": "randrw", "block": "4k", "depth": 4, "size": field.scale.size} | options
    with condition.disturb(field, server) if disturbed else contextlib.nullcontext() as beside:
        done = field.client.fio(
            server, "mixed", field.scale.seconds, seed=SEED + number,
            extra=["--rwmixread=50", "--unified_rw_reporting=mixed", "--norandommap"], **options)
    if beside is not None:
        done.notes |= beside.notes()
        done.commands += beside.commands
    condition.settle(field, server, disturbed)
    say(f"{condition.name}, {'disturbed' if disturbed else 'calm'}: {done.rate:,.0f}/s, "
        f"p99 {done.p99_us / 1e3:.2f} ms")
    return Turn(condition.name, number, disturbed, done)


def ratios(turns, what):
    """Each disturbed turn beside the mean of its neighbours."""
    values = [what(turn.measure) for turn in turns]
    return report.Spread([values[at] / statistics.mean(values[at - 1:at + 2:2])
                          for at in range(1, len(values), 2)])


def by_condition(turns):
    return {name: list(found)
            for name, found in itertools.groupby(turns, lambda turn: turn.condition)}


def table(conditions, turns):
    found = by_condition(turns)
    lines = []
    for condition in conditions:
        line = [condition.name, condition.says]
        halves = [[turn.measure for turn in found[condition.name] if turn.disturbed == disturbed]
                  for disturbed in [False, True]]
        for what, form in COLUMNS:
            line += [form(report.spread(half, what).median) for half in halves]
        for what, _ in COLUMNS:
            line.append(ratios(found[condition.name], what).text(report.ratio))
        lines.append(line)
    names = ["rate", "p50", "p99"]
    return report.markdown(
        ["condition", "", *(f"{name}{kind}" for name in names for kind in [", calm", ""]),
         *(f"÷ {name}" for name in names)], lines)


def text(head, conditions, turns, field):
    parts = [
        report.about(head, [turn.measure for turn in turns]) + " The guest: fio, 4 KiB at random, "
        "half reads, half writes, depth 4. Requests/s and ms; ratios to the calm turns before and "
        "after.",
        table(conditions, turns),
    ]
    beside = notes(turns)
    if beside:
        parts += ["What went on beside the guest, in the median turn:", "\n".join(beside)]
    parts += ["Servers, with what they were told, each kind of command once:",
              report.servers(field), "Clients, as of the first round:", clients(turns, field)]
    return "\n\n".join(parts)


def notes(turns):
    lines = []
    for name, found in by_condition(turns).items():
        measures = [turn.measure for turn in found if turn.disturbed]
        for note in measures[0].notes:
            if note.startswith("beside: "):
                value = report.spread(measures, lambda one, note=note: one.notes[note])
                lines.append(f"- {name}: {note.removeprefix('beside: ')} "
                             f"{value.text(report.number)}")
    return lines


def clients(turns, field):
    return "\n".join(f"- {turn.condition}: `{report.shortened(command, field)}`"
                     for turn in turns if turn.number == 1 for command in turn.measure.commands)


def document(turns):
    return {"cliffs": [{"condition": turn.condition, "number": turn.number,
                        "disturbed": turn.disturbed, **vars(turn.measure)} for turn in turns]}


COLUMNS = [(lambda one: one.rate, report.number),
           (lambda one: one.p50_us, report.milliseconds),
           (lambda one: one.p99_us, report.milliseconds)]
