"""`python -m bench persist`: documents per second through the ingest worker against bare insert_many.

The streams are filled while the worker stands still, so it is timed alone, on everything it does for a message: read,
authorise, number, insert, tell the sender and the recipient, acknowledge. Then the very same documents go into a second
collection with the same indexes and write concern, 500 at a time, from a process that does nothing else.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import pymongo
import redis

from bench import figures
from bench.accounts import Community, SetupError
from bench.seed import append, seed_direct, wait_until
from bench.services import ServicesError
from bench.stack import Stack, StackError, run_stack
from protocol import codec, keys, records
from protocol.models import ConnectionRegistry, MessageType
from workers.store import WRITE_CONCERN
from workers.store.indexes import index_models

if TYPE_CHECKING:
    import argparse

INSTANCE: Final = "persist-bench"
BARE_BATCH: Final = 500
"""The worker's own batch (design.md section 5)."""
COMMIT_SECONDS: Final = 120.0
TARGET_RATIO: Final = 0.7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `persist`."""
    parser.add_argument("--messages", type=int, default=40_000)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--content-bytes", type=int, default=120)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when every message was committed once, in order and gap-free."""
    try:
        with run_stack(gateways=0, roles=("ingest",)) as stack:
            found = _measure(args, stack)
    except (SetupError, StackError, ServicesError) as error:
        print(f"bench persist: {error}", file=sys.stderr)
        return 1
    found |= {"machine": figures.machine(), "commit": figures.commit()}
    figures.print_table("bench persist", found)
    if args.json:
        figures.write_json(args.json, found)
    return 0 if found["verdict"] == "ok" else 1


def _measure(args: argparse.Namespace, stack: Stack) -> dict[str, Any]:
    mongodb = pymongo.MongoClient[dict[str, Any]](stack.mongodb_url)
    with redis.Redis.from_url(stack.redis_url) as client, mongodb as mongo:
        community = seed_direct(client, mongo, args.conversations)
        database = mongo.get_default_database("trireme")
        _pretend_online(client, community)
        clock = figures.RoleClock(stack.pids)
        warm = _messages(community, len(community.conversations), args.content_bytes, 0)
        _through_the_worker(client, database, warm, len(warm), stack.pids["worker"], clock)
        wave = _messages(community, args.messages, args.content_bytes, len(warm))
        seconds = _through_the_worker(client, database, wave, len(warm) + len(wave), stack.pids["worker"], clock)
        used = clock.used_seconds()
        documents = list(database["messages"].find().sort("_id", 1))
        bare_seconds = _bare(mongo, documents[len(warm) :])
    worker_rate, bare_rate = args.messages / seconds, args.messages / bare_seconds
    return {
        "verdict": figures.verdict(_check(documents, community, len(warm) + len(wave))),
        "worker_documents_per_second": round(worker_rate),
        "bare_documents_per_second": round(bare_rate),
        "ratio": round(worker_rate / bare_rate, 3),
        "target_ratio": TARGET_RATIO,
        "cpu_us_per_document": figures.cpu_us_per_message(used, args.messages),
        "settings": {"messages": args.messages, "conversations": args.conversations, "content": args.content_bytes},
    }


def _pretend_online(client: redis.Redis, community: Community) -> None:
    """One live instance that holds every member, so that acks and deliveries are made and published as in real life."""
    info = records.InstanceInfo(kind="gateway", endpoint="", load=0, draining=False)
    client.set(keys.instance(INSTANCE), codec.encode_value(info), ex=600)
    client.sadd(keys.INSTANCES, INSTANCE)
    client.xadd(keys.down(INSTANCE), {keys.FIELD: codec.encode_down([])})
    entry = codec.encode_value(ConnectionRegistry(instance_id=INSTANCE, connection_id="1", timestamp=0))
    pipe = client.pipeline(transaction=False)
    for members in community.members:
        for account in members:
            pipe.hset(keys.connection(account.user_id), account.device_id, entry)
    pipe.execute()


def _messages(community: Community, count: int, content_bytes: int, first: int) -> list[records.SendMessage]:
    """`count` messages over all conversations in turn."""
    sends = []
    for number in range(count):
        place = number % len(community.conversations)
        sender, receiver = community.members[place]
        sends.append(
            records.SendMessage(
                instance=INSTANCE,
                connection=place + 1,
                sender_id=sender.user_id,
                device_id=sender.device_id,
                conversation_id=community.conversations[place],
                client_message_id=str(first + number),
                idempotency_key=f"persist-{first + number}",
                receiver_id=receiver.user_id,
                content="x" * content_bytes,
                message_type=MessageType.TEXT,
                media_url=None,
                reply_to_message_id=None,
                timestamp=time.time_ns() // 1_000_000,
            )
        )
    return sends


def _through_the_worker(
    client: redis.Redis,
    database: Any,
    wave: list[records.SendMessage],
    expected: int,
    worker_pids: list[int],
    clock: figures.RoleClock,
) -> float:
    """Fill the streams with the worker paused (far below its lease's 5 s), let it run; seconds until all is there."""
    for pid in worker_pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        append(client, wave)
    finally:
        clock.start()
        began = time.perf_counter()
        for pid in worker_pids:
            os.kill(pid, signal.SIGCONT)
    deadline = began + COMMIT_SECONDS
    while database["messages"].estimated_document_count() < expected:
        if time.perf_counter() > deadline:
            raise SetupError(f"not all of {expected} documents committed after {COMMIT_SECONDS:.0f} s")
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    wait_until(lambda: _settled(client), "settled streams")
    return seconds


def _settled(client: redis.Redis) -> bool:
    """Everything read and acknowledged? (The trim leaves the last acknowledged entry, so the length does not tell.)"""
    stored: Any = client.get(keys.SHARDS)
    for shard in range(int(stored)):
        groups: Any = client.xinfo_groups(keys.ingest(shard))
        if any(group["pending"] or group["lag"] for group in groups):
            return False
    return True


def _bare(mongo: Any, documents: list[dict[str, Any]]) -> float:
    """Seconds for the same documents into a fresh collection with the same indexes."""
    database = mongo.get_database("bare", write_concern=WRITE_CONCERN)
    database.drop_collection("messages")
    database["messages"].create_indexes(index_models(90)["messages"])
    began = time.perf_counter()
    for start in range(0, len(documents), BARE_BATCH):
        database["messages"].insert_many(documents[start : start + BARE_BATCH], ordered=True)
    return time.perf_counter() - began


def _check(documents: list[dict[str, Any]], community: Community, expected: int) -> list[str]:
    """Every key once, and in each conversation the sequence 1, 2, 3, … in the order of sending."""
    violations = []
    if len(documents) != expected or len({document["idempotency_key"] for document in documents}) != expected:
        violations.append(f"lost or doubled: {len(documents)} documents for {expected} messages")
    for conversation_id in community.conversations:
        log = sorted(
            (document["sequence_number"], int(document["idempotency_key"].partition("-")[2]))
            for document in documents
            if document["conversation_id"] == conversation_id
        )
        if [sequence for sequence, _ in log] != list(range(1, len(log) + 1)):
            violations.append(f"lost: the sequence of {conversation_id} has a hole or a repeat")
        if [number for _, number in log] != sorted(number for _, number in log):
            violations.append(f"out of order: {conversation_id}")
    return violations
