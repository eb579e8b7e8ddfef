"""What was measured, as tables for people and as JSON."""

import datetime
import os
import platform
import re
import shlex
import statistics
import subprocess

OURS = "stillpoint"


class Spread:
    """The median of some rounds, and what it lies between."""

    def __init__(self, values):
        self.median, self.low, self.high = statistics.median(values), min(values), max(values)

    def text(self, form):
        if self.low == self.high:
            return form(self.median)
        return f"{form(self.median)} ({form(self.low)}..{form(self.high)})"


def number(value):
    """Three digits are as many as mean something."""
    for limit, unit in [(1e6, "M"), (1e4, "k")]:
        if value >= limit:
            scaled = value / (1e3 if unit == "k" else 1e6)
            return f"{scaled:.0f}{unit}" if scaled >= 100 else f"{scaled:.1f}{unit}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value):
    return f"{value:.2f}"


def milliseconds(value_us):
    return f"{value_us / 1e3:.2f}"


class Table:
    """The measurements by row, variant and server."""

    def __init__(self, rows, results):
        self.rows = rows
        self.by = {}
        for result in results:
            key = result.row, result.variant
            self.by.setdefault(key, {}).setdefault(result.server, []).append(result.measure)

    def lines(self):
        """Each row with its variants, as far as they were measured."""
        for row in self.rows:
            for variant in row.variants:
                found = self.by.get((row.name, variant.label))
                if found:
                    yield row, variant.label, found

    def names(self):
        seen = [name for row in self.rows for name in row.servers]
        return list(dict.fromkeys(seen))


def absent(row, name):
    return "not asked" if name in row.servers else "cannot"


def spread(measures, what):
    return Spread([what(one) for one in measures])


def ratios(found, other, what=lambda one: one.rate):
    """Ours over theirs, round by round: what disturbs a round disturbs both."""
    return Spread([what(ours) / what(theirs)
                   for ours, theirs in zip(found[OURS], found[other]) if what(theirs)] or [0])


def markdown(header, lines):
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def rates(table):
    peers = [name for name in table.names() if name != OURS]
    lines = []
    for row, label, found in table.lines():
        line = [row.name, label, row.unit]
        for name in [OURS, "qemu-storage-daemon"]:
            line.append(spread(found[name], lambda one: one.rate).text(number))
        for name in peers:
            line.append(ratios(found, name).text(ratio) if name in found else absent(row, name))
        lines.append(line)
    return markdown(["row", "", "unit", OURS, "qemu-storage-daemon",
                     *(f"÷ {name}" for name in peers)], lines)


def latencies(table):
    """Milliseconds, of the guest's requests."""
    lines = []
    for row, label, found in table.lines():
        if not found[OURS][0].p99_us:
            continue
        line = [row.name, label]
        for name in table.names():
            measures = found.get(name)
            line.append(" / ".join(
                milliseconds(spread(measures, what).median)
                for what in [lambda one: one.p50_us, lambda one: one.p99_us]
            ) if measures else absent(row, name))
        line.append(ratio(1 / ratios(found, "qemu-storage-daemon", lambda one: one.p99_us).median))
        lines.append(line)
    return markdown(["row", "", *table.names(), "p99 lower by"], lines)


def costs(table):
    lines = []
    for row, label, found in table.lines():
        line = [row.name, label, row.per]
        for name in table.names():
            measures = found.get(name)
            if not measures:
                line.append(absent(row, name))
                continue
            if name == "no-server":
                line.append("")
                continue
            cpu = spread(measures, lambda one: one.cpu_s / one.volume).median
            peak = spread(measures, lambda one: one.peak_kib / 1024).high
            line.append(f"{cpu:.2f} s, {peak:.0f} MiB")
        lines.append(line)
    return markdown(["row", "", "per", *table.names()], lines)


def beside(table):
    """What went on at the same time: a server must not win by starving the other client."""
    lines = []
    for row, label, found in table.lines():
        for note, what in [("guest_rate", "guest, requests/s"), ("pulled_rate", "pull, MiB/s"),
                           ("preserved_share", "share of the disk that was copied before")]:
            if note in found[OURS][0].notes:
                spreads = [spread(found[name], lambda one: one.notes[note])
                           for name in [OURS, "qemu-storage-daemon"]]
                lines.append([row.name, label, what, *(one.text(number) for one in spreads)])
    return markdown(["row", "", "", OURS, "qemu-storage-daemon"], lines)


def copies(table):
    lines = []
    for row, label, found in table.lines():
        for name, measures in found.items():
            if "share" not in measures[0].notes:
                continue
            share = spread(measures, lambda one: one.notes["share"])
            copied = spread(measures,
                            lambda one: one.notes["copied_bytes"] / one.notes["requests"])
            lines.append([row.name, label, name, f"{share.median:.1%}", f"{copied.median:,.0f}"])
    return markdown(["row", "", "server", "writes that copied", "bytes copied per write"], lines)


def head(scale, options, programs, place):
    versions = {name: version([program, "--version"]) for name, program in programs.items()}
    versions |= {"fio": version(["fio", "--version"]), "nbdcopy": version(["nbdcopy", "--version"])}
    model = re.search(r"^model name\s*: (.*)$", open("/proc/cpuinfo").read(), re.M)
    return {
        "mode": "check" if options.check else "short" if options.short else "full",
        "date": datetime.date.today().isoformat(),
        "kernel": platform.release(),
        "processors": f"{os.cpu_count()} of {model.group(1) if model else platform.machine()}",
        "file_system": subprocess.check_output(["findmnt", "-n", "-o", "FSTYPE", "-T", place],
                                               text=True).strip(),
        "versions": versions,
        "cache": options.cache,
        "placement": "servers on core 0, clients on core 1" if options.pin else "not pinned",
        "image_bytes": scale.size,
        "seconds": scale.seconds,
        "rounds": scale.rounds,
        "dirty_runs": scale.runs,
    }


def version(command):
    return subprocess.check_output(command, text=True).splitlines()[0]


def about(head, measures):
    stolen = Spread([one.notes["stolen"] / os.cpu_count() for one in measures])
    return (
        f"{head['date']}, Linux {head['kernel']}, {head['processors']}, {head['file_system']}; "
        f"{', '.join(dict.fromkeys(head['versions'].values()))}. Images of "
        f"{head['image_bytes'] >> 20} MiB, locked in a page cache that was filled by "
        f"{head['cache']} reads; {head['placement']}; {head['rounds']} rounds of "
        f"{head['seconds']} s. Medians (lowest..highest). Of the processors the hypervisor gave "
        f"{stolen.median:.1%} to others, in the worst measurement {stolen.high:.1%}."
    )


def text(head, rows, results, field):
    table = Table(rows, results)
    parts = [f"{about(head, [result.measure for result in results])} "
             f"{head['dirty_runs']:,} dirty runs in a map.", rates(table)]
    for title, lines in [
        ("Latency of the guest's requests, p50 / p99 in ms:", latencies(table)),
        ("Processor time and peak memory of the server:", costs(table)),
        ("What went on at the same time:", beside(table)),
        ("Copies before writes, by Stillpoint's counter and the growth of QEMU's overlay:",
         copies(table)),
    ]:
        if lines.count("\n") > 1:
            parts += [title, lines]
    parts += ["Data verified:", "\n".join(
        f"- {name}, {kind}: {what}" for (kind, name), what in field.verified.items())]
    parts += ["Servers, with what they were told, each kind of command once:",
              servers(field)]
    parts += ["Clients, as of the first round against Stillpoint:", clients(table, field)]
    return "\n\n".join(parts)


def servers(field):
    """The JSON has them all; here folders have short names, and numbers do not make another."""
    shown = {}
    for name, started in field.commands.items():
        for command in (command for commands in started for command in commands):
            key = name, re.sub(r"\d+", "N", shortened(command, field))
            shown.setdefault(key, f"- {name}: `{shortened(command, field)}`")
    return "\n".join(shown.values())


def clients(table, field):
    return "\n".join(f"- {row.name}, {label}: `{shortened(command, field)}`"
                     for row, label, found in table.lines() for command in found[OURS][0].commands)


def shortened(command, field):
    return command.replace(field.folder, "$DIR").replace(field.sockets, "$RUN")


def document(head, results, field):
    return {
        **head, "servers": field.commands,
        "verified": [{"kind": kind, "server": name, "what": what}
                     for (kind, name), what in field.verified.items()],
        "results": [
            {"row": result.row, "variant": result.variant, "server": result.server,
             "round": result.round, **vars(result.measure)}
            for result in results
        ],
    }
