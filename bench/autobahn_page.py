"""One page per transport with the verdict on every Autobahn case, to be kept under `docs/`. Called by `autobahn`."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from bench.autobahn import Gate, Verdict
    from bench.autobahn_suites import Case

_STYLE: Final = (
    "body{font:14px/1.4 sans-serif;margin:2em auto;max-width:70em}table{border-collapse:collapse}"
    "td,th{padding:1px 8px;text-align:left;vertical-align:top}tr:nth-child(even){background:#f4f4f4}"
    ".OK{color:#070}.FAILED{color:#a00}.n{text-align:right}"
)
_DESCRIBED: Final = 110
"""Characters of a case's description."""


def write(
    folder: Path, transport: str, suite: str, gates: Iterable[Gate], verdicts: Iterable[Verdict], cases: dict[str, Case]
) -> Path:
    """`folder`/autobahn-`transport`.html: the gates, then every case that was played."""
    rules = {gate.id: gate.rule for gate in gates}
    rows = [
        f"<tr><td>{verdict.gate}<td class=n>{verdict.played}<td class={'FAILED' if verdict.violations else 'OK'}>"
        f"{'; '.join(map(html.escape, verdict.violations)) or 'passed'}<td>{html.escape(rules[verdict.gate])}"
        for verdict in sorted(verdicts, key=lambda verdict: verdict.gate)
    ]
    played = sorted(cases.items(), key=lambda item: _order(item[0]))
    lines = [
        "<!doctype html><meta charset=utf-8>",
        f"<title>Autobahn: {transport}</title><style>{_STYLE}</style>",
        f"<h1>The {transport} transport against the Autobahn cases</h1>",
        f"<p>Played by {html.escape(suite)} against the gateway's transport class with a host that echoes"
        " (<code>python -m bench autobahn</code>).",
        "<table><tr><th>gate<th>cases<th>verdict<th>asks for",
        *rows,
        "</table><h2>Cases</h2><table><tr><th>gate<th>case<th>behaviour<th>close<th>code<th>ms<th>description",
        *(_line(name, case) for name, case in played),
        "</table>",
    ]
    page = folder / f"autobahn-{transport}.html"
    page.write_text("\n".join(lines) + "\n")
    return page


def _line(name: str, case: Case) -> str:
    gate, number = name.split(" ")
    text = " ".join(re.sub("<[^>]*>", " ", case.description).split())
    short = text if len(text) <= _DESCRIBED else text[:_DESCRIBED] + "…"
    return (
        f"<tr><td>{gate}<td>{number}<td class={case.behavior}>{case.behavior}<td>{case.close}"
        f"<td>{case.code or ''}<td class=n>{case.duration_ms}<td>{html.escape(short)}"
    )


def _order(name: str) -> tuple[str, list[int]]:
    gate, number = name.split(" ")
    return gate, [int(part) for part in number.split(".")]
