"""`python -m bench agents`: people talk to the echo agent, everything they hear is checked, and the role is killed.

Brings up its own stack with the role `agents` as a process of its own. First a steady run: how long an answer takes,
and how soon after its place in the log a message is with its agent. Then the same while that process is killed
(SIGKILL) again and again: each question still gets one answer. In the end the store is read: sequences without a hole,
one answer under its own key behind each question, no task left, and the auditor's word.
"""

from __future__ import annotations

import random
import sys
import time
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pymongo

from bench import figures
from bench.accounts import SetupError, create_talks
from bench.askers import Ask, Asker, Meet, Part
from bench.driver_process import DriverError, open_driver
from bench.history import audit
from bench.services import HOST, ServicesError, free_port, log_tail, spawn
from bench.stack import PROJECT, Process, Stack, StackError, run_stack, start_again, wait_ready
from workers.agents.replies import reply_key

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from bench.driver_process import DriverProcess

ROLES: Final = ("ingest", "query", "retry", "events")
ECHO: Final = {"name": "Echo", "kind": "python", "handler": "echo", "concurrency": 1000}
WARM_UP_QUESTIONS: Final = 1
GRACE_SECONDS: Final = 30.0
"""For the last answers of a run."""
DOWN_SECONDS: Final = 0.5
"""Between the end of a killed process and the start of its successor: what a supervisor takes."""
ROUTING: Final = "trireme_agent_routing_seconds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `agents`."""
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=4, help="of each user, in either run")
    parser.add_argument("--every-seconds", type=float, default=10.0, help="between two questions of a user")
    parser.add_argument("--kills", type=int, default=3, help="SIGKILLs of the agents process in the second run")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when every question had one answer and the store is sound, 1 otherwise."""
    try:
        with run_stack(roles=ROLES) as stack, _agents_process(stack) as agents, open_driver("bench.askers") as driver:
            found = _run(args, stack, agents, driver)
    except (SetupError, DriverError, StackError, ServicesError) as error:
        print(f"bench agents: {error}", file=sys.stderr)
        return 1
    settings = {name: value for name, value in vars(args).items() if name not in ("command", "json")}
    found |= {"settings": settings, "machine": figures.machine(), "commit": figures.commit()}
    figures.print_table("bench agents", found)
    if args.json:
        figures.write_json(args.json, found)
    return 0 if found["verdict"] == "ok" else 1


@contextmanager
def _agents_process(stack: Stack) -> Iterator[Process]:
    """The role `agents` as a process of the stack, ended with it."""
    assert stack.log_dir is not None
    port = free_port()
    environment = {**stack.environment, "TRIREME_WORKER_METRICS_PORT": str(port)}
    arguments = ["-m", "workers", "agents"]
    log = stack.log_dir / "agents-1.log"
    popen = spawn([sys.executable, *arguments], log, environment, PROJECT)
    process = Process("agents", "agents-1", popen, log, port, arguments, environment)
    stack.processes.append(process)
    stack.pids["agents"] = [popen.pid]
    wait_ready([process])
    yield process


def _run(args: argparse.Namespace, stack: Stack, agents: Process, driver: DriverProcess) -> dict[str, Any]:
    agent_id, talks = create_talks(stack.rest_url, stack.admin_token, ECHO, args.users)
    askers = [
        Asker(stack.ws_urls[0], conversation_id, account.user_id, account.device_id, account.token, agent_id)
        for account, conversation_id in talks
    ]
    met = driver.command(Meet(askers), 120.0)
    if met["violations"] or not met["met"]:
        return {"verdict": met["violations"] or ["not everybody could connect"]}
    driver.command(_asking(WARM_UP_QUESTIONS, args.every_seconds), args.every_seconds + GRACE_SECONDS)
    before = _histogram(agents)
    clock = figures.RoleClock({**stack.pids, "driver": [driver.pid]})
    clock.start()
    asking = _asking(args.questions, args.every_seconds)
    steady = driver.command(asking, asking.timeout_seconds)
    used, elsewhere = clock.used_seconds(), clock.elsewhere_cores()
    routing = _quantiles(before, _histogram(agents))
    killed, kills = _run_killed(args, stack, agents, driver)
    total = args.users * (WARM_UP_QUESTIONS + 2 * args.questions)
    problems = [*killed["violations"], *_read_store(stack, agent_id, total)]
    driver.command_only(Part())
    status, told = audit(stack, [])
    if status:
        problems += [f"audit: exit status {status}", *told[:5]]
    return {
        "verdict": figures.verdict(problems),
        "questions": total,
        "per_second": round(args.users / args.every_seconds, 1),
        "answer_ms": steady["latency_ms"],
        "routing_ms_from_before_the_commit": routing,
        "cpu_us_per_question": figures.cpu_us_per_message(used, args.users * args.questions),
        "elsewhere_cores": elsewhere,
        "killed": {"kills": kills, "answer_ms": killed["latency_ms"], "answered": killed["answered"]},
        "audit": told[0] if told else "",
    }


def _asking(questions: int, every_seconds: float) -> Ask:
    return Ask(questions, every_seconds, questions * every_seconds + GRACE_SECONDS)


def _run_killed(
    args: argparse.Namespace, stack: Stack, agents: Process, driver: DriverProcess
) -> tuple[dict[str, Any], int]:
    """The same run while the process is killed at moments of the seed, and started again."""
    asking = _asking(args.questions, args.every_seconds)
    moments = sorted(
        random.Random(args.seed).uniform(1.0, args.questions * args.every_seconds - 1.0) for _ in range(args.kills)
    )
    began = time.monotonic()
    driver.command_only(asking)
    for moment in moments:
        time.sleep(max(0.0, began + moment - time.monotonic()))
        agents.popen.kill()
        agents.popen.wait()
        time.sleep(DOWN_SECONDS)
        agents = start_again(stack, agents)
    answer = driver.answer(asking.timeout_seconds)
    if agents.popen.poll() is not None:
        raise StackError(f"the agents process ended by itself:\n{log_tail(agents.log)}")
    return answer, len(moments)


def _read_store(stack: Stack, agent_id: str, questions: int) -> list[str]:
    """What is wrong in MongoDB."""
    problems = []
    with pymongo.MongoClient[dict[str, Any]](stack.mongodb_url) as client:
        database = client.get_default_database("trireme")
        tasks = dict.fromkeys(("waiting", "failed", "done"), 0)
        for status in tasks:
            tasks[status] = database["agent_tasks"].count_documents({"status": status})
        if tasks != {"waiting": 0, "failed": 0, "done": questions}:
            problems.append(f"tasks are not all done: {tasks}")
        logs: dict[str, list[dict[str, Any]]] = {}
        fields = {"conversation_id": 1, "sequence_number": 1, "sender_id": 1, "idempotency_key": 1, "type": 1}
        for entry in database["messages"].find({}, fields).sort([("conversation_id", 1), ("sequence_number", 1)]):
            logs.setdefault(entry["conversation_id"], []).append(entry)
    asked = 0
    for name, log in logs.items():
        if [entry["sequence_number"] for entry in log] != list(range(1, len(log) + 1)):
            problems.append(f"{name}: the sequence has a hole")
        answers = [entry["idempotency_key"] for entry in log if entry["sender_id"] == agent_id]
        wanted = [reply_key(entry["_id"]) for entry in log if entry["sender_id"] not in (agent_id, "system")]
        asked += len(wanted)
        if sorted(answers) != sorted(wanted):
            problems.append(f"{name}: {len(wanted)} questions and {len(answers)} answers, not one for each")
    if asked != questions:
        problems.append(f"{asked} questions are stored, {questions} were asked")
    return problems[:20]


Buckets = dict[float, float]


def _histogram(agents: Process) -> Buckets:
    """Upper bound in seconds → how many observations were at most that."""
    with urllib.request.urlopen(f"http://{HOST}:{agents.port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    found: Buckets = {}
    for line in lines:
        if line.startswith(f"{ROUTING}_bucket"):
            bound, _, count = line.partition('le="')[2].partition('"} ')
            found[float(bound)] = float(count)
    return found


def _quantiles(before: Buckets, after: Buckets) -> dict[str, float]:
    """p50, p95, p99 in ms, interpolated in their bucket; and how many there were."""
    counts = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    total = max(counts.values(), default=0.0)
    found: dict[str, float] = {"count": total}
    for name, quantile in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        lower, below = 0.0, 0.0
        for bound, count in counts.items():
            if count >= quantile * total:
                share = (quantile * total - below) / max(count - below, 1.0)
                found[name] = round(1000 * (lower + (min(bound, 10.0) - lower) * share), 1)
                break
            lower, below = bound, count
    return found
