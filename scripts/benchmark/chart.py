"""A bar for each row: how many times as fast as qemu-storage-daemon, on a scale of doublings."""

import math
from xml.sax.saxutils import escape

from benchmark.report import OURS, Table, ratios

PEER = "qemu-storage-daemon"
LABEL_WIDTH, PLOT_WIDTH, NUMBER_WIDTH = 330, 420, 60
TOP, STEP, BAR = 56, 24, 14
FASTER, SLOWER = "#2a6f97", "#bc4b51"

# Readable on a light page and on a dark one.
STYLE = """
text { font: 12px sans-serif; fill: #24292f }
.title { font-size: 14px; font-weight: bold }
.tick { fill: #57606a; text-anchor: middle }
.grid { stroke: #d0d7de }
.one { stroke: #24292f }
.spread { stroke: #24292f; stroke-opacity: 0.6 }
"""


def svg(head, rows, results):
    bars = [(f"{row.name}: {label}", ratios(found, PEER))
            for row, label, found in Table(rows, results).lines()]
    # At least from a half to two, so that small differences look small.
    low = math.floor(min([-1, *(math.log2(bar.low) for _, bar in bars)]))
    high = math.ceil(max([1, *(math.log2(bar.high) for _, bar in bars)]))

    def x(value):
        return LABEL_WIDTH + PLOT_WIDTH * (math.log2(value) - low) / (high - low)

    width, height = LABEL_WIDTH + PLOT_WIDTH + NUMBER_WIDTH, TOP + STEP * len(bars) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text class="title" x="12" y="22">Stillpoint, as a multiple of {PEER}</text>',
    ]
    for power in range(low, high + 1):
        at, kind = x(2**power), "grid" if power else "one"
        parts.append(f'<line class="{kind}" x1="{at:.1f}" y1="{TOP - 8}" '
                     f'x2="{at:.1f}" y2="{TOP + STEP * len(bars)}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{TOP - 14}">{2.0**power:g}</text>')
    for number, (label, bar) in enumerate(bars):
        parts += lines(label, bar, TOP + STEP * number, x)
    parts.append(f'<text x="12" y="{height - 12}">{escape(footnote(head))}</text></svg>')
    return "\n".join(parts) + "\n"


def lines(label, bar, top, x):
    start, end = sorted([x(1), x(bar.median)])
    middle = top + BAR / 2
    return [
        f'<text x="12" y="{top + 11}">{escape(label)}</text>',
        f'<rect x="{start:.1f}" y="{top}" width="{end - start:.1f}" height="{BAR}" '
        f'fill="{FASTER if bar.median >= 1 else SLOWER}"/>',
        f'<line class="spread" x1="{x(bar.low):.1f}" y1="{middle}" x2="{x(bar.high):.1f}" '
        f'y2="{middle}"/>',
        f'<text x="{LABEL_WIDTH + PLOT_WIDTH + 8}" y="{top + 11}">{bar.median:.2f}</text>',
    ]


def footnote(head):
    return (f"{head['date']}, {head['versions'][OURS]}, {head['versions'][PEER].split(' (')[0]}, "
            f"{head['cache']} reads; lines are spreads of {head['rounds']} rounds")
