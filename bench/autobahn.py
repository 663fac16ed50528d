"""`python -m bench autobahn`: the Autobahn cases against both transports, and four gates over their verdicts.

The cases are played against the gateway's own transport classes (`echo_gateway`), by kosoku (Python 3, in the tests) or
by the original Autobahn|Testsuite (Python 2.7, which it installs into an environment of its own). Both write the same
report; what counts is its `index.json`, never an exit status. The gates are G1 to G4 of reliability.md section 1;
`--tls` plays them over TLS, which is G5.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec
import trustme

from bench import autobahn_page, figures
from bench.autobahn_suites import SUITES, Case, SuiteError
from bench.driver_process import open_peer
from bench.services import HOST
from gateway.transport import WEBSOCKET_PATH
from protocol.errors import CloseCode

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence

    from bench.autobahn_suites import Suite

TRANSPORTS: Final = ("epoll", "trio-websocket")
BINARY: Final = ("1.2.*", "9.2.*", "9.4.*", "9.6.*", "9.8.*")
"""The cases that send binary messages; every other sends text."""
EVERY: Final = ("*",)
HANG_MS: Final = 2000
"""A case that is refused for its size must be over by then."""
NON_STRICT: Final = {
    # UTF-8 is judged frame by frame: what is wrong inside of an unfinished frame shows when the frame is whole.
    "epoll": frozenset(("6.4.3", "6.4.4")),
    # A good message directly before a bad frame, in the same segment, is lost with it: wsproto raises first.
    "trio-websocket": frozenset(
        ("3.2", "3.3", "3.4", "4.1.3", "4.1.4", "4.1.5", "4.2.3", "4.2.4", "4.2.5", "5.15"),
    ),
}
"""RFC 6455 leaves these to the implementation: the connection fails as it must, sooner or with one echo less."""


class Gate(msgspec.Struct, frozen=True):
    """So many cases, played against these limits, each of which `judge` must find good."""

    id: str
    cases: tuple[str, ...]
    limits: Literal["suite", "production"]
    count: int
    rule: str


GATES: Final = (
    Gate(
        "G1",
        ("1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*"),
        "suite",
        247,
        "OK, INFORMATIONAL, or NON-STRICT where listed; closed OK or INFORMATIONAL",
    ),
    Gate("G2", ("9.*",), "suite", 54, "OK with a limit of 16 MiB"),
    Gate("G3", ("9.*",), "production", 54, "OK up to 64 KiB, beyond it 1009 within 2 s"),
    Gate("G4", ("12.*", "13.*"), "production", 216, "UNIMPLEMENTED: no extension is ever negotiated"),
)
ABOVE_PRODUCTION: Final = ("9.1.[2-6]", "9.2.[2-6]", "9.3.*", "9.4.*", "9.5.*", "9.6.*")
"""Messages of more than 64 KiB."""


class Verdict(msgspec.Struct, frozen=True):
    """How one gate went."""

    gate: str
    played: int
    violations: list[str]
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `autobahn`."""
    parser.add_argument("--transport", choices=(*TRANSPORTS, "both"), default="both")
    parser.add_argument("--suite", choices=SUITES, default="kosoku")
    parser.add_argument("--cases", nargs="+", metavar="GLOB", help="only these cases; then their number is not judged")
    parser.add_argument("--at-once", type=int, default=1, help="cases played side by side (kosoku)")
    parser.add_argument("--tls", action="store_true", help="over TLS (G5): trio-websocket and the original suite only")
    parser.add_argument("--python2", metavar="FILE", help="a Python 2.7 for the original suite")
    parser.add_argument("--pages", metavar="FOLDER", help="write a page of the results per transport there")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when every gate is passed."""
    transports = TRANSPORTS if args.transport == "both" else (args.transport,)
    if args.tls:
        if args.suite != "autobahn":
            print("bench autobahn: kosoku speaks no TLS; say --suite autobahn", file=sys.stderr)
            return 2
        transports = ("trio-websocket",)
    found: dict[str, object] = {}
    violations: list[str] = []
    try:
        suite = SUITES[args.suite](args.python2, args.at_once)
        for transport in transports:
            verdicts, cases = play(transport, suite, args.cases or EVERY, secure=args.tls)
            violations += [line for verdict in verdicts for line in verdict.violations]
            found[transport] = {
                verdict.gate: f"{verdict.played} cases, {len(verdict.violations)} bad, {verdict.seconds:.0f} s"
                for verdict in verdicts
            }
            if args.pages:
                autobahn_page.write(Path(args.pages), transport, suite.title, GATES, verdicts, cases)
    except SuiteError as error:
        print(f"bench autobahn: {error}", file=sys.stderr)
        return 1
    found |= {"verdict": figures.verdict(violations), "suite": args.suite, "commit": figures.commit()}
    figures.print_table("bench autobahn", found)
    if args.json:
        figures.write_json(args.json, found)
    return 1 if violations else 0


def play(
    transport: str, suite: Suite, only: Sequence[str] = EVERY, *, secure: bool = False
) -> tuple[list[Verdict], dict[str, Case]]:
    """Every gate against this transport: the verdicts, and every case by gate and id. Raises SuiteError.

    `secure`: over TLS, with a certificate made for it (gate G5 is the other four over TLS).
    """
    verdicts: list[Verdict] = []
    found: dict[str, Case] = {}
    for limits in ("suite", "production"):
        with ExitStack() as exits:
            directory = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="trireme-autobahn-")))
            tls = _issue(directory) if secure else []
            urls = {kind: exits.enter_context(_open_echo(transport, kind, limits, tls)) for kind in ("text", "binary")}
            for gate in GATES:
                if gate.limits == limits:
                    began = time.monotonic()
                    cases = _play_gate(gate, urls, suite, only, directory)
                    violations = judge(gate, transport, cases, whole=only is EVERY)
                    verdicts.append(Verdict(gate.id, len(cases), violations, time.monotonic() - began))
                    found |= {f"{gate.id} {name}": case for name, case in cases.items()}
    return verdicts, found


@contextmanager
def _open_echo(transport: str, kind: str, limits: str, tls: list[str]) -> Iterator[str]:
    with open_peer(transport, kind, limits, *tls, module="bench.echo_gateway") as (_, port):
        yield f"{'wss' if tls else 'ws'}://127.0.0.1:{port}{WEBSOCKET_PATH}"


def _issue(directory: Path) -> list[str]:
    """Options of `echo_gateway` for a new certificate."""
    issued = trustme.CA().issue_cert(HOST)
    chain, key = directory / "chain.pem", directory / "key.pem"
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    return ["--tls", str(chain), str(key)]


def _play_gate(gate: Gate, urls: dict[str, str], suite: Suite, only: Sequence[str], directory: Path) -> dict[str, Case]:
    wanted = _meet(gate.cases, only)
    text = [glob for glob in wanted if not _matches(glob, BINARY)]
    cases: dict[str, Case] = {}
    if text:
        cases |= suite.run(urls["text"], text, BINARY, directory / f"{gate.id}-text")
    if binary := _meet(wanted, BINARY):
        cases |= suite.run(urls["binary"], binary, (), directory / f"{gate.id}-binary")
    return cases


def _meet(some: Iterable[str], others: Sequence[str]) -> list[str]:
    """The patterns that match what both do, where one of two patterns always contains the other or neither."""
    pairs = ((one, other) for one in some for other in others)
    return [
        one if fnmatchcase(one, other) else other
        for one, other in pairs
        if _matches(one, [other]) or _matches(other, [one])
    ]


def judge(gate: Gate, transport: str, cases: dict[str, Case], *, whole: bool = True) -> list[str]:
    """What is wrong with these verdicts, a line each. `whole`: all cases of the gate were to be played."""
    said = [
        f"{gate.id} {transport} {name}: {reason}"
        for name, case in cases.items()
        if (reason := _fault(gate, transport, name, case))
    ]
    if whole and len(cases) != gate.count:
        said.append(f"{gate.id} {transport}: {len(cases)} cases instead of {gate.count}")
    if whole and gate.id == "G1" and ((first := cases.get("1.1.1")) is None or first.behavior != "OK"):
        # A wrong address looks like a server that fails everything.
        said.append(f"{gate.id} {transport}: 1.1.1 is not OK: {first}")
    return said


def _fault(gate: Gate, transport: str, name: str, case: Case) -> str:
    """Why this gate does not take this verdict; empty where it does."""
    shown = f"{case.behavior}, close {case.close}, code {case.code}, {case.duration_ms} ms"
    if gate.id == "G4":
        return "" if case.behavior == "UNIMPLEMENTED" else shown
    if gate.id == "G3" and _matches(name, ABOVE_PRODUCTION):
        return "" if case.code == CloseCode.TOO_LARGE and case.duration_ms <= HANG_MS else shown
    allowed = {"OK"}
    if gate.id == "G1":
        allowed |= {"INFORMATIONAL", *({"NON-STRICT"} if name in NON_STRICT[transport] else ())}
    return "" if case.behavior in allowed and case.close in ("OK", "INFORMATIONAL") else shown


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
