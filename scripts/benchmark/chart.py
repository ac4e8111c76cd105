"""The same as a picture: for each row, how many times better ours is than each peer, on a logarithmic scale.

Written by hand: a few lines and circles need no plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from scripts.benchmark.contenders.table import CONTENDERS
from scripts.benchmark.model import METRICS, Against
from scripts.benchmark.results import Result

_LINE = 18
_LEFT, _WIDTH, _TOP = 240, 640, 70
_LOWEST, _HIGHEST = 0.25, 16.0
_COLOURS = ("#1f77b4", "#17becf", "#9467bd", "#8c564b", "#7f7f7f", "#bcbd22", "#e377c2", "#ff7f0e")
_GOOD, _BAD = "#2ca02c", "#d62728"


def svg(results: Sequence[Result], title: str) -> str:
    """The picture. Right of 1 ours is better; the bar ends at the best peer, a red or green mark is the goal."""
    rows = [result for result in results if not result.left_out and result.ratio(_main(result), _best(result))]
    height = _TOP + _LINE * (len(rows) + 2)
    peers = [name for name in CONTENDERS if any(name in result.peers for result in rows)]
    colours = dict(zip(peers, _COLOURS, strict=False))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 40}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(10, 20, title, size=14),
        *_axis(height),
    ]
    for i, peer in enumerate(peers):
        x = 10 + i * 105
        parts += [_circle(x, 40, colours[peer]), _text(x + 8, 44, peer)]
    for i, result in enumerate(rows):
        parts += _row(result, _TOP + _LINE * (i + 1), colours)
    return "\n".join([*parts, "</svg>", ""])


def _main(result: Result) -> str:
    return result.row.shown[0]


def _best(result: Result) -> str | None:
    return result.best(_main(result))


def _better(metric: str, ratio: float) -> float:
    """Ours/peer as "times better"."""
    return ratio if METRICS[metric].more_is_better else 1 / ratio


def _x(times: float) -> float:
    times = min(max(times, _LOWEST), _HIGHEST)
    return _LEFT + _WIDTH * math.log(times / _LOWEST) / math.log(_HIGHEST / _LOWEST)


def _axis(height: int) -> list[str]:
    parts = []
    for times in (0.25, 0.5, 1, 2, 4, 8, 16):
        x, colour = _x(times), "#000" if times == 1 else "#ddd"
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{height - 10}" stroke="{colour}"/>')
        parts.append(_text(x - 8, _TOP - 10, f"{times:g} x"))
    return parts


def _row(result: Result, y: int, colours: dict[str, str]) -> list[str]:
    metric, best = _main(result), _best(result)
    ratio = result.ratio(metric, best)
    assert ratio is not None
    verdicts = [v for v in result.verdicts() if v.goal.metric == metric and v.goal.against is not Against.NOTHING]
    times = _better(metric, ratio)
    left, right = sorted((_x(1), _x(times)))
    fill = _GOOD if all(v.met for v in verdicts) else _BAD
    name = result.row.name + (" ?" if result.doubts() else "")
    parts = [
        _text(10, y + 4, name),
        f'<rect x="{left:.1f}" y="{y - 5}" width="{right - left:.1f}" height="10" fill="{fill}" opacity="0.35"/>',
    ]
    for verdict in verdicts:
        x = _x(_better(metric, verdict.goal.bound))
        colour = _GOOD if verdict.met else _BAD
        parts.append(f'<line x1="{x:.1f}" y1="{y - 8}" x2="{x:.1f}" y2="{y + 8}" stroke="{colour}" stroke-width="2"/>')
    for peer in result.peers:
        if one := result.ratio(metric, peer):
            parts.append(_circle(_x(_better(metric, one)), y, colours[peer]))
    return parts


def _circle(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="{colour}"/>'


def _text(x: float, y: float, text: str, size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y}" font-size="{size}">{escape(text)}</text>'
