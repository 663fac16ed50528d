"""What a chaos run amounts to: a summary for machines, and one HTML file with a timeline for people.

The page needs nothing but itself: inline SVG, every fault a band beside latency and throughput.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bench.chaos.samples import STEP_SECONDS, Sample

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.chaos.nemesis import Episode

TOTALS: Final = (
    "sent",
    "retried",
    "acked",
    "duplicate_acks",
    "pushed",
    "deferred",
    "refused",
    "connections",
    "migrated",
)
PIXELS_PER_SECOND: Final = 6
LATENCY_HEIGHT: Final = 160
RATE_HEIGHT: Final = 80
LABEL_HEIGHT: Final = 96
LEAST_MS: Final = 1.0
MOST_MS: Final = 60_000.0


class Chapter(msgspec.Struct):
    """One crowd: what it saw, and what its ledger says of it."""

    number: int
    samples: list[Sample]
    result: dict[str, Any]
    audit: list[str] = []

    def violations(self) -> list[str]:
        """What the phones' ledger and the auditor found, and what was still open at the end."""
        found = [f"chapter {self.number}: {text}" for text in [*self.result["violations"], *self.audit]]
        more = self.result["violation_count"] - len(self.result["violations"])
        if more > 0:
            found.append(f"chapter {self.number}: and {more} more")
        return found + [f"chapter {self.number}: open: {text}" for text in self.result["open_ends"]]


def summary(episodes: Sequence[Episode], chapters: Sequence[Chapter], seconds: float) -> dict[str, Any]:
    """Figures of the whole run; `faults` by row."""
    counts: Counter[str] = Counter()
    for chapter in chapters:
        counts.update({name: chapter.result["counts"].get(name, 0) for name in TOTALS})
    well = [
        sample.p99_ms for chapter in chapters for sample in chapter.samples[: round(5 / STEP_SECONDS)] if sample.acked
    ]
    return {
        "faults_injected": len(episodes),
        "messages_audited": sum(chapter.result["stored"] for chapter in chapters),
        "minutes": round(seconds / 60, 1),
        "chapters": len(chapters),
        "counts": dict(counts),
        "group_steps": sum(chapter.result["group_steps"] for chapter in chapters),
        "digests_proven": sum(chapter.result["digests_proven"] for chapter in chapters),
        "slowest_ack_seconds": max((chapter.result["slowest_ack_seconds"] for chapter in chapters), default=0.0),
        "calm_p99_ms": round(median(well), 1) if well else None,
        "late_recoveries": sum(episode.is_late for episode in episodes),
        "faults": rows(episodes),
    }


def rows(episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    """Per row and name: how often, how long until all was well, against its bound."""
    kinds: dict[tuple[str, str], list[Episode]] = {}
    for episode in episodes:
        kinds.setdefault((episode.row, episode.name), []).append(episode)
    found = []
    for (row, name), same in sorted(kinds.items()):
        times = [episode.recovery_seconds for episode in same if episode.recovery_seconds is not None]
        found.append(
            {
                "row": row,
                "name": name,
                "times": len(same),
                "bound_seconds": same[0].bound_seconds,
                "median_seconds": round(median(times), 1) if times else None,
                "longest_seconds": round(max(times), 1) if times else None,
                "late": sum(episode.is_late for episode in same),
            }
        )
    return found


# --- the page --------------------------------------------------------------------------------------------------------

_STYLE: Final = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; }
td { text-align: right; } td:first-child, td:nth-child(2), th { text-align: left; } .late { color: #b00; }
.plot { overflow-x: auto; border: 1px solid #ddd; margin: .5em 0 2em; } text { font-size: 10px; fill: #333; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; }
"""


def write_html(path: Path, found: dict[str, Any], episodes: Sequence[Episode], chapters: Sequence[Chapter]) -> None:
    """Raises OSError."""
    parts = [
        "<!doctype html><meta charset=utf-8><title>Trireme: chaos run</title>",
        f"<style>{_STYLE}</style><h1>Chaos run</h1>",
        _facts(found),
        _table(found["faults"]),
        "<h2>Timeline</h2><p>Bands: faults, from what was done to the end of the script; paler: until all was well. "
        "Red: p99 of acks per half second, blue: p50 (logarithmic); grey: acks per second.</p>",
    ]
    for chapter in chapters:
        mine = [episode for episode in episodes if episode.chapter == chapter.number]
        parts += [f"<h3>Chapter {chapter.number}</h3><div class=plot>", _plot(chapter.samples, mine), "</div>"]
    path.write_text("\n".join(parts) + "\n")


def _facts(found: dict[str, Any]) -> str:
    shown = {name: value for name, value in found.items() if name != "faults"}
    return f"<pre>{html.escape(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode())}</pre>"


def _table(faults: Sequence[dict[str, Any]]) -> str:
    lines = ["<table><tr><th>row<th>fault<th>times<th>bound s<th>median s<th>longest s<th>late"]
    for fault in faults:
        cells = [fault[name] for name in ("times", "bound_seconds", "median_seconds", "longest_seconds", "late")]
        shown = "".join(f"<td>{'–' if cell is None else cell}" for cell in cells)
        late = " class=late" if fault["late"] else ""
        lines.append(f"<tr{late}><td>{fault['row']}<td>{html.escape(fault['name'])}{shown}")
    return "\n".join([*lines, "</table>"])


def _plot(samples: Sequence[Sample], episodes: Sequence[Episode]) -> str:
    if not samples:
        return ""
    start = samples[0].at - STEP_SECONDS
    width = round((samples[-1].at - start) * PIXELS_PER_SECOND) + 1
    height = LABEL_HEIGHT + LATENCY_HEIGHT + RATE_HEIGHT
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">']
    for episode in episodes:
        parts += _band(episode, start, height)
    for level in (1, 10, 100, 1000, 10_000):
        y = _latency_y(level)
        parts.append(
            f'<line x1="0" x2="{width}" y1="{y}" y2="{y}" stroke="#ddd"/><text x="2" y="{y - 2}">{level} ms</text>'
        )
    most = max(sample.acked for sample in samples) / STEP_SECONDS or 1.0
    parts.append(
        _line(samples, start, "#999", lambda sample: height - RATE_HEIGHT * sample.acked / STEP_SECONDS / most)
    )
    parts.append(f'<text x="2" y="{height - RATE_HEIGHT + 10}">{most:.0f} acks/s</text>')
    acked = [sample for sample in samples if sample.acked]
    parts.append(_line(acked, start, "#36c", lambda sample: _latency_y(sample.p50_ms)))
    parts.append(_line(acked, start, "#c22", lambda sample: _latency_y(sample.p99_ms)))
    return "\n".join([*parts, "</svg>"])


def _band(episode: Episode, start: float, height: int) -> list[str]:
    x = (episode.began - start) * PIXELS_PER_SECOND
    width = max(1.0, (episode.ended - episode.began) * PIXELS_PER_SECOND)
    title = html.escape(f"{episode.row} {episode.name}: {episode.detail}; recovered in {episode.recovery_seconds} s")
    tail = (episode.over - episode.began) * PIXELS_PER_SECOND
    box = f'<rect x="{x:.1f}" y="0" height="{height}"'
    return [
        f'<g><title>{title}</title>{box} width="{max(width, tail):.1f}" fill="#fec"/>',
        f'{box} width="{width:.1f}" fill="#fc8"/>',
        f'<text transform="translate({x + 10:.1f},{LABEL_HEIGHT}) rotate(-90)">{html.escape(episode.row)} '
        f"{html.escape(episode.name)[:24]}</text></g>",
    ]


def _latency_y(value_ms: float) -> float:
    share = math.log(max(value_ms, LEAST_MS) / LEAST_MS) / math.log(MOST_MS / LEAST_MS)
    return round(LABEL_HEIGHT + LATENCY_HEIGHT * (1 - min(share, 1.0)), 1)


def _line(samples: Sequence[Sample], start: float, colour: str, y: Any) -> str:
    points = " ".join(f"{(sample.at - start) * PIXELS_PER_SECOND:.1f},{y(sample):.1f}" for sample in samples)
    return f'<polyline fill="none" stroke="{colour}" points="{points}"/>'
