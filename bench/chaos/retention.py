"""F-M8: retention removes the low end of logs under load, and who comes later is told where they begin.

Retention is whole days and a run is minutes, so messages are made old enough, and MongoDB's own TTL monitor removes
them, which in this rig looks every second. The script of the row is `expire_logs`; the ledger goes on to judge the
phones that saw everything, the auditor the logs that begin with their floors.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pymongo
import trio
from msgspec import UNSET
from pymongo.errors import PyMongoError

from bench import journal
from bench.chaos.replica_set import direct_client
from bench.http_api import ApiError, HttpApi
from bench.phone import Phone, PhoneError
from bench.services import ServicesError
from protocol.frames import Retransmit
from workers.store.indexes import RETENTION_INDEX

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from pymongo.database import Database

    from bench.chaos.crowd import Talk
    from bench.chaos.rig import Rig

DIRECT_SHARE: Final = 0.3
"""Part of the 1:1 conversations whose low end expires; one group's does too."""
SEEN_SECONDS: Final = 5.0
"""What is younger stays: every phone of the crowd has had what is older, and its key is written down."""
GROWTH_SECONDS: Final = 8.0
"""A chapter may have just begun: let there be a log first."""
REMOVED_SECONDS: Final = 60.0
COMERS: Final = 6
"""Phones that come later, one per conversation."""
COME_SECONDS: Final = 20.0
BEYOND: Final = 20
"""How far behind the floor a comer asks."""


class Expired(NamedTuple):
    """What became of one conversation: its messages up to `through` are to go."""

    talk: Talk
    through: int
    messages: int


def expire_logs(rig: Rig, rng: random.Random) -> str:
    """F-M8."""
    rig.sleep(GROWTH_SECONDS)
    direct = [talk for talk in rig.talks if not talk.is_group]
    chosen = rng.sample(direct, max(1, round(len(direct) * DIRECT_SHARE)))
    chosen += [talk for talk in rig.talks if talk.is_group][:1]
    try:
        with pymongo.MongoClient[dict[str, Any]](rig.replica_set.url, tz_aware=True, w="majority") as client:
            database = client.get_default_database()
            age = _retention(database) + timedelta(days=1)
            _let_monitor(rig, works=False)  # it would find half a log old
            try:
                expired = [found for talk in chosen if (found := _make_old(database, talk, age, rng)) is not None]
            finally:
                _let_monitor(rig, works=True)
            seconds = _wait_removed(rig, database, expired)
    except PyMongoError as error:
        raise ServicesError(f"MongoDB: {error}") from error
    if not expired:
        raise ServicesError("nothing is old enough to expire")
    comers = rng.sample(expired, min(COMERS, len(expired)))
    rig.troubles += [f"F-M8: {text}" for text in trio.run(_look, rig, comers)]
    removed = sum(found.messages for found in expired)
    return f"{removed:,} messages of {len(expired)} logs in {seconds:.1f} s; {len(comers)} phones came later"


# --- in the database -------------------------------------------------------------------------------------------------


def _retention(database: Database[dict[str, Any]]) -> timedelta:
    index = database["messages"].index_information()[RETENTION_INDEX]
    return timedelta(seconds=index["expireAfterSeconds"])


def _let_monitor(rig: Rig, *, works: bool) -> None:
    """The TTL monitor of every member: whichever is primary is the one that removes."""
    for member in rig.replica_set.members:
        with direct_client(member.port) as client:
            client.admin.command("setParameter", 1, ttlMonitorEnabled=works)


def _make_old(database: Database[dict[str, Any]], talk: Talk, age: timedelta, rng: random.Random) -> Expired | None:
    """Half of the log or more, and its conversation, are so much older from now on; None where there is too little."""
    name = {"conversation_id": talk.conversation_id}
    seen = {**name, "created_at": {"$lt": datetime.now(UTC) - timedelta(seconds=SEEN_SECONDS)}}
    last = database["messages"].find_one(seen, sort=[("sequence_number", -1)])
    if last is None:
        return None
    through = round(last["sequence_number"] * rng.uniform(0.5, 1.0))
    low = {**name, "sequence_number": {"$lte": through}}
    ids = database["messages"].distinct("_id", low)
    older = [{"$set": {"created_at": {"$subtract": ["$created_at", age // timedelta(milliseconds=1)]}}}]
    database["conversations"].update_one({"_id": talk.conversation_id}, older)
    keys = {"$gte": f"{talk.conversation_id}:", "$lt": f"{talk.conversation_id};"}
    database["idempotency_keys"].update_many({"_id": keys, "message_id": {"$in": ids}}, older)
    database["messages"].update_many(low, older)
    return Expired(talk, through, len(ids)) if ids else None


def _wait_removed(rig: Rig, database: Database[dict[str, Any]], expired: Sequence[Expired]) -> float:
    """Until none of them is there any more: how long that took. Raises ServicesError."""
    began = time.monotonic()
    left = {
        "$or": [
            {"conversation_id": found.talk.conversation_id, "sequence_number": {"$lte": found.through}}
            for found in expired
        ]
    }
    while expired and database["messages"].count_documents(left, limit=1):
        if time.monotonic() - began > REMOVED_SECONDS:
            raise ServicesError(f"the TTL monitor has not removed everything within {REMOVED_SECONDS:.0f} s")
        rig.sleep(0.2)
    return time.monotonic() - began


# --- who comes later -------------------------------------------------------------------------------------------------


async def _look(rig: Rig, expired: Sequence[Expired]) -> list[str]:
    """Another device of a member of each: what is wrong with what it is shown."""
    found: list[str] = []
    async with HttpApi(rig.stack.rest_url, rig.stack.admin_token) as api, trio.open_nursery() as nursery:
        for one in expired:
            nursery.start_soon(_come, rig, api, one, found)
    return found


async def _come(rig: Rig, api: HttpApi, expired: Expired, found: list[str]) -> None:
    conversation_id, through = expired.talk.conversation_id, expired.through
    pages: list[journal.Pushed] = []

    def note(event: journal.Event) -> None:
        if isinstance(event, journal.Pushed) and event.payload.conversation_id == conversation_id:
            pages.append(event)

    user_id = expired.talk.members[0].user_id
    try:
        token = await api.create_token(user_id, "comer")
        with trio.fail_after(COME_SECONDS):
            async with trio.open_nursery() as nursery:
                phone = Phone(rig.stack.ws_urls, user_id, "comer", token, note)
                nursery.start_soon(phone.run)
                await phone.wait_online()
                await phone.write(
                    [Retransmit(conversation_id=conversation_id, from_sequence=1, to_sequence=through + BEYOND)]
                )
                await phone.wait_until(lambda: any(page.payload.origin == "retransmit" for page in pages))
                nursery.cancel_scope.cancel()
    except (ApiError, PhoneError, trio.TooSlowError) as error:
        found.append(f"{user_id} could not come to {conversation_id}: {error!r}")
        return
    found += [f"{conversation_id}: {text}" for text in wrong_pages(pages, through)]


def wrong_pages(pages: Sequence[journal.Pushed], through: int) -> list[str]:
    """What pages of a log that has expired `through` a sequence say that is not so (I2, I11). Pure."""
    found: list[str] = []
    backlog = [
        message.sequence_number
        for page in pages
        if page.payload.origin in ("backlog", "live")
        for message in page.payload.messages
    ]
    if backlog and backlog != list(range(backlog[0], backlog[0] + len(backlog))):
        found.append(f"the backlog has a hole or a repeat: {_ends(backlog)}")
    if backlog and backlog[0] <= through:
        found.append(f"{backlog[0]} was shown, and everything through {through} has expired")
    for page in pages:
        if page.payload.origin == "retransmit":
            found += _wrong_answer(page, through)
    return found


def _wrong_answer(page: journal.Pushed, through: int) -> list[str]:
    payload = page.payload
    numbers = [message.sequence_number for message in payload.messages]
    told = None if payload.expired_through is UNSET else payload.expired_through
    end = payload.to_sequence if isinstance(payload.to_sequence, int) else 0
    found = []
    if told != through:
        found.append(f"a retransmit says that {told} is the last that expired; it is {through}")
    if numbers != list(range(through + 1, end + 1)):
        found.append(f"a retransmit accounts for what is through {end} and shows {_ends(numbers)}")
    return found


def _ends(numbers: Sequence[int]) -> str:
    return f"{len(numbers)} from {numbers[0]} to {numbers[-1]}" if numbers else "nothing"
