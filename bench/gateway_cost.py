"""`python -m bench gateway`: what one inbound message and one connection cost the gateway, beside bare echo servers.

In the same run, from the same driver: echo servers (`peers`), then Trireme's gateway with each of its transports on a
real stack. There the connections authenticate through the real worker, which is then paused (SIGSTOP), so that the
figure is the gateway's alone: receive, decode, check, step the session, put into the ingest stream. Afterwards the
worker goes on, and every message must come out of it as always.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import pymongo
import redis

from bench import figures
from bench.accounts import Account, Community, SetupError
from bench.driver import Check, Connect, Member
from bench.driver_process import DriverError, DriverProcess, open_driver, open_peer
from bench.echo import EchoConnect, EchoRun
from bench.phases import Rounds, Settle
from bench.seed import seed_direct
from bench.services import ServicesError
from bench.stack import Stack, StackError, run_stack
from protocol.codec import SUBPROTOCOL_JSON

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

PEERS: Final = ("trio-websocket", "websockets", "picows")
TRANSPORTS: Final = ("epoll", "trio-websocket")
ECHO_BYTES: Final = 200
CONTENT_BYTES: Final = 120
CONNECTIONS: Final = (100, 1000)
IDLE_CONNECTIONS: Final = 10_000
WARM_UP_MESSAGES: Final = 3000
PORTION_MESSAGES: Final = 4000
"""Taken in during one pause of the worker, which must stay well below its leases' 5 s."""
PHASE_SECONDS: Final = 180.0
SETTLE_SECONDS: Final = 0.3
"""From the driver's last answer until what the gateway still had in hand is on its way."""
PAUSE_LIMIT_SECONDS: Final = 20.0
CATCH_UP_SECONDS: Final = 60.0
DESCRIPTORS: Final = IDLE_CONNECTIONS + 1000
SETTINGS: Final = {
    "TRIREME_WINDOW": "1000000",
    "TRIREME_ACK_TIMEOUT_SECONDS": "120",
    "TRIREME_HEARTBEAT_SECONDS": "120",
    "TRIREME_DEAD_SECONDS": "300",
    "TRIREME_REDIS_OUTSTANDING": "100000",
}
"""A paused worker acknowledges nothing: no window may fill and no send be given up meanwhile."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `gateway`."""
    parser.add_argument("--messages", type=int, default=30_000, help="per server and number of connections")
    parser.add_argument("--idle", type=int, default=IDLE_CONNECTIONS, help="connections of the last step (epoll only)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when no message broke the contract, 1 otherwise."""
    _raise_descriptor_limit()
    try:
        servers: dict[str, dict[str, Any]] = {}
        for peer in PEERS:
            servers[f"{peer} echo"] = measure_peer(peer, args.messages)
        for transport in TRANSPORTS:
            idle = args.idle if transport == "epoll" else 0
            servers[f"gateway {transport}"] = measure_gateway(transport, args.messages, idle)
    except (SetupError, DriverError, StackError, ServicesError) as error:
        print(f"bench gateway: {error}", file=sys.stderr)
        return 1
    violations = [line for server in servers.values() for line in server.pop("violations")]
    found: dict[str, Any] = {"verdict": figures.verdict(violations), **servers, "against": compare(servers)}
    found |= {"settings": {"messages": args.messages, "echo_bytes": ECHO_BYTES, "content_bytes": CONTENT_BYTES}}
    found |= {"machine": figures.machine(), "commit": figures.commit()}
    figures.print_table("bench gateway", found)
    if args.json:
        figures.write_json(args.json, found)
    return 0 if not violations else 1


def compare(servers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that have a target (design.md section 7), where both sides were measured."""
    mine, theirs = servers["gateway epoll"], servers["trio-websocket echo"]
    found = {"times_less_than_trio_websocket_echo": round(_us(theirs, 1000) / _us(mine, 1000), 2)}
    if IDLE_CONNECTIONS in mine["cpu_us_per_message"]:
        found["times_cpu_at_10000_of_100"] = round(_us(mine, IDLE_CONNECTIONS) / _us(mine, 100), 2)
    return found


def _us(server: dict[str, Any], connections: int) -> float:
    figure: float = server["cpu_us_per_message"][connections]
    return figure


def _raise_descriptor_limit() -> None:
    """For this process and all it starts: both ends of every connection are on this machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# --- peers -----------------------------------------------------------------------------------------------------------


def measure_peer(peer: str, messages: int) -> dict[str, Any]:
    """CPU per echo and memory per connection of one bare echo server."""
    cpu: dict[int, float] = {}
    memory: dict[str, float] = {}
    violations: list[str] = []
    with open_peer(peer) as (pid, port), open_driver() as driver:
        opened = 0
        for connections in CONNECTIONS:
            before = figures.memory_kib(pid)
            driver.command(EchoConnect(url=f"ws://127.0.0.1:{port}/", connections=connections - opened), PHASE_SECONDS)
            time.sleep(SETTLE_SECONDS)
            if opened:
                memory = per_connection(before, figures.memory_kib(pid), connections - opened)
            opened = connections
            _echo(driver, connections, WARM_UP_MESSAGES)
            began = figures.thread_cpu_seconds(pid)
            answer = _echo(driver, connections, messages)
            cpu[connections] = per_message(figures.thread_cpu_seconds(pid) - began, messages)
            if answer["missing"] or answer["wrong"]:
                violations.append(f"lost: {peer} echo at {connections}: {answer}")
    return {"cpu_us_per_message": cpu, "kib_per_connection": memory, "violations": violations}


def _echo(driver: DriverProcess, connections: int, messages: int) -> dict[str, Any]:
    run = EchoRun(connections=connections, messages=messages, payload_bytes=ECHO_BYTES, timeout_seconds=PHASE_SECONDS)
    return driver.command(run, PHASE_SECONDS)


def per_message(seconds: float, messages: int) -> float:
    """Microseconds, one decimal."""
    return round(seconds * 1e6 / messages, 1)


def per_connection(before: dict[str, int], after: dict[str, int], connections: int) -> dict[str, float]:
    """Growth in KiB, resident and proportional."""
    return {name: round((after[name] - before[name]) / connections, 2) for name in ("rss", "pss")}


# --- the gateway -----------------------------------------------------------------------------------------------------


def measure_gateway(transport: str, messages: int, idle: int) -> dict[str, Any]:
    """CPU per accepted message at 100, 1,000 and `idle` connections, and memory per authenticated connection.

    Two stacks: memory is measured before any traffic, since a heap that traffic has grown hides what connections take.
    """
    cpu: dict[int, float] = {}
    memory: dict[str, dict[str, float]] = {}
    violations: list[str] = []
    with _ready_gateway(transport, CONNECTIONS[-1]) as (stack, driver, community, pid):
        opened = 0
        for connections in CONNECTIONS:
            _connect(driver, stack, community, opened, connections)
            opened = connections
            cpu[connections] = _cost(driver, stack, pid, connections, messages)
        violations += driver.command(Check(), PHASE_SECONDS)["violations"]
    steps = [*CONNECTIONS, *([idle] if idle > CONNECTIONS[-1] else [])]
    with _ready_gateway(transport, steps[-1]) as (stack, driver, community, pid):
        _connect(driver, stack, community, 0, steps[0])
        for before_count, connections in pairwise(steps):
            before = figures.memory_kib(pid)
            _connect(driver, stack, community, before_count, connections)
            time.sleep(SETTLE_SECONDS)
            memory[f"at_{connections}"] = per_connection(before, figures.memory_kib(pid), connections - before_count)
        if idle in steps:
            cpu[idle] = _cost(driver, stack, pid, idle, messages)
        violations += driver.command(Check(), PHASE_SECONDS)["violations"]
    return {"cpu_us_per_message": cpu, "kib_per_connection": memory, "violations": violations}


@contextmanager
def _ready_gateway(transport: str, connections: int) -> Iterator[tuple[Stack, DriverProcess, Community, int]]:
    """A fresh stack with accounts for so many connections, a driver, and the gateway's pid."""
    with run_stack(settings=SETTINGS | {"TRIREME_GATEWAY_TRANSPORT": transport}) as stack, open_driver() as driver:
        mongodb = pymongo.MongoClient[dict[str, Any]](stack.mongodb_url)
        with redis.Redis.from_url(stack.redis_url) as client, mongodb as mongo:
            community = seed_direct(client, mongo, connections // 2)
        (pid,) = stack.pids["gateway"]
        yield stack, driver, community, pid


def _cost(driver: DriverProcess, stack: Stack, pid: int, connections: int, messages: int) -> float:
    """Microseconds of gateway CPU per accepted message, after a warm-up; in portions, with the worker on in between."""
    portion = max(PORTION_MESSAGES, connections)
    portions = max(1, messages // portion)
    _accept(driver, stack, pid, portion)
    used = sum(_accept(driver, stack, pid, portion) for _ in range(portions))
    return per_message(used, portion * portions)


def _connect(driver: DriverProcess, stack: Stack, community: Community, first: int, end: int) -> None:
    """Authenticate the accounts first..end, two to a conversation, both of them senders. Raises SetupError."""
    members = []
    for number in range(first, end):
        pair: list[Account] = community.members[number // 2]
        account, other = pair[number % 2], pair[1 - number % 2]
        members.append(
            Member(
                number // 2, account.user_id, account.device_id, account.token, receiver_id=other.user_id, sends=True
            )
        )
    command = Connect(
        urls=list(stack.ws_urls),
        subprotocol=SUBPROTOCOL_JSON,
        conversations=community.conversations,
        members=members,
        content_bytes=CONTENT_BYTES,
        receipts=False,
        timeout_seconds=PHASE_SECONDS,
    )
    answer = driver.command(command, PHASE_SECONDS)
    if answer["connected"] != len(members):
        said = driver.command(Check(), PHASE_SECONDS)["violations"]
        raise SetupError(f"{answer['connected']} of {len(members)} connections opened: {said}")


def _accept(driver: DriverProcess, stack: Stack, pid: int, messages: int) -> float:
    """CPU seconds of the gateway for so many messages taken in with the worker paused; then the worker catches up."""
    with _paused(stack.pids["worker"]):
        began = figures.thread_cpu_seconds(pid)
        answer = driver.command(Rounds(messages=messages, timeout_seconds=PAUSE_LIMIT_SECONDS), PAUSE_LIMIT_SECONDS)
        time.sleep(SETTLE_SECONDS)
        used = figures.thread_cpu_seconds(pid) - began
    if not answer["finished"]:
        raise SetupError(f"the gateway did not take {messages} messages in {PAUSE_LIMIT_SECONDS:.0f} s: {answer}")
    settled = driver.command(Settle(timeout_seconds=CATCH_UP_SECONDS), CATCH_UP_SECONDS)
    if not settled["finished"]:
        lost = driver.command(Check(), PHASE_SECONDS)["violations"]
        raise SetupError(f"the worker did not catch up with {messages} messages: {lost or settled}")
    return used


@contextmanager
def _paused(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
