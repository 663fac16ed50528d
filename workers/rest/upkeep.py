"""What a change of an account means everywhere else, finished whatever happens: by the request that began it, or by the
next REST process that finds it unfinished.

Every step may be done twice. The account's document says what is under way (`store.users`), so nothing is lost when a
process dies between two steps.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

import anyio
import structlog

from protocol import keys, records
from protocol.errors import ErrorCode
from protocol.models import ConversationType, UserStatus
from workers import revocation
from workers.broker import BrokerUnavailable
from workers.instances import TooManyWaiting
from workers.rest.desk import now_ms
from workers.rest.device_keys import retire
from workers.rest.devices import key_devices
from workers.rest.errors import RestError
from workers.rest.shapes import moment_at
from workers.store.errors import StoreUnavailable
from workers.store.users import DELETION, READ_RECEIPTS, REMAINS

if TYPE_CHECKING:
    from workers.rest.desk import Desk
    from workers.store.blocks import Change
    from workers.store.users import Unfinished

EVERY_SECONDS: Final = 15.0
ABANDONED_SECONDS: Final = 60.0
"""Work that began so long ago and has not ended lost its process. Doing it twice at once is harmless."""
_AT_ONCE: Final = 20
"""Conversations whose owners are asked at the same time, and blocks that are read at once."""
_GONE: Final = frozenset((ErrorCode.NOT_FOUND, ErrorCode.CONVERSATION_NOT_FOUND))

log = structlog.get_logger(__name__)


class Undecided(Exception):
    """An owner did not answer in time: the work stays unfinished."""


def stored_only() -> RestError:
    """For who asked: it is stored, and not in force everywhere yet."""
    return RestError(ErrorCode.STORAGE_UNAVAILABLE, "stored, and soon in force everywhere; it is not yet")


async def run(desk: Desk) -> None:
    """Finish what others began and left, until cancelled."""
    while True:
        await anyio.sleep(EVERY_SECONDS)
        try:
            while await finish_one(desk, ABANDONED_SECONDS):
                pass
        except (StoreUnavailable, BrokerUnavailable, TooManyWaiting, Undecided) as error:
            log.warning("upkeep_interrupted", error=str(error) or type(error).__name__)


async def finish_one(desk: Desk, abandoned_seconds: float) -> bool:
    """Finish the work that was left longest ago; False where there is none. Raises what its steps raise."""
    now = moment_at(now_ms())
    before = now - timedelta(seconds=abandoned_seconds)
    change = await desk.store.blocks.take_unfinished(before, now)
    if change is not None:
        log.info("upkeep_resumed", user_id=change.user_id, work="block")
        await finish_block(desk, change)
        return True
    untold = await desk.store.devices.take_untold(before, now)
    if untold is not None:
        log.info("upkeep_resumed", user_id=untold.user_id, work="revocation")
        await revocation.tell(desk.store, desk.broker, untold.user_id, untold.device_id, untold.tokens_valid_from)
        await retire(desk.store, desk.broker, untold.user_id, untold.device_id)
        return True
    found = await desk.store.users.take_unfinished(before, now)
    if found is None:
        return False
    log.info("upkeep_resumed", user_id=found.user_id, work=found.work)
    await _finish(desk, found)
    return True


async def finish(desk: Desk, user_id: str) -> None:
    """Do all that is unfinished for an account, and say so. Raises StoreUnavailable, BrokerUnavailable, TooManyWaiting,
    Undecided: it stays."""
    found = await desk.store.users.unfinished(user_id)
    if found is not None:
        await _finish(desk, found)


async def _finish(desk: Desk, found: Unfinished) -> None:
    for step in STEPS[found.work]:
        await step(desk, found.user_id)
    await desk.store.users.finished(found, LATER.get(found.work), moment_at(now_ms()))
    log.info("upkeep_finished", user_id=found.user_id, work=found.work)


# --- blocks ----------------------------------------------------------------------------------------------------------


async def finish_block(desk: Desk, change: Change) -> None:
    """The owner of their 1:1 conversation has looked at the block list since it changed. Raises as `finish`.

    Where there is no conversation yet, its owner looks behind its creation.
    """
    conversation_id = keys.direct_conversation_id(change.user_id, change.blocked_id)
    if await desk.store.memberships.role(conversation_id, change.user_id) is not None:
        await _have_looked(desk, conversation_id, change.user_id)
    await desk.store.blocks.finished(change)


async def _have_looked(desk: Desk, conversation_id: str, user_id: str) -> None:
    record = records.LookAtAccount(desk.instance.instance_id, desk.new_id("req"), conversation_id, user_id)
    shard = keys.shard_of(conversation_id, desk.settings.shards)
    if await desk.instance.command(shard, record, desk.settings.command_timeout_seconds) is None:
        raise Undecided(f"looking at {user_id}")


# --- deletion --------------------------------------------------------------------------------------------------------


async def revoke_everything(desk: Desk, user_id: str) -> None:
    """No token is good, no connection stays, nobody watches."""
    await revocation.revoke_others(desk.store, desk.broker, user_id, None, now_ms())
    await desk.broker.publish_presence(user_id, records.PresenceChange(UserStatus.OFFLINE, 0, hidden_from="*"))


async def leave_groups(desk: Desk, user_id: str) -> None:
    """Through the log, as anybody leaves. A 1:1 conversation stays: it is the other's as well."""
    async for page in desk.store.stays.stays(user_id, live=True):
        for stay in page:
            if stay.conversation.conversation_type is not ConversationType.GROUP:
                continue
            conversation_id = stay.membership.conversation_id
            record = records.RemoveParticipant(
                desk.instance.instance_id,
                desk.new_id("req"),
                f"cmd_gone_{user_id}",
                conversation_id,
                user_id,
                user_id,
            )
            shard = keys.shard_of(conversation_id, desk.settings.shards)
            outcome = await desk.instance.command(shard, record, desk.settings.command_timeout_seconds)
            if outcome is None or (outcome.code is not None and outcome.code not in _GONE):
                raise Undecided(f"leaving {conversation_id}")


async def forget_keys(desk: Desk, user_id: str) -> None:
    """The devices' public keys, and word of it to those who had them."""
    for device_id in await key_devices(desk, user_id):
        await retire(desk.store, desk.broker, user_id, device_id)
    await desk.store.device_keys.forget_user(user_id)


async def forget_blocks(desk: Desk, user_id: str) -> None:
    """Whom the account blocked: lifted one by one, as anybody lifts a block."""
    while blocks := (await desk.store.blocks.listed(user_id, "", _AT_ONCE))[0]:
        for block in blocks:
            change = await desk.store.blocks.unblock(user_id, block.user_id, moment_at(now_ms()))
            if change is not None:
                await finish_block(desk, change)


async def abandon_media(desk: Desk, user_id: str) -> None:
    """What no message carries goes with the next sweep; the rest is the others' as well."""
    await desk.store.media.abandon(user_id, moment_at(now_ms()))


async def forget_devices(desk: Desk, user_id: str) -> None:
    """The devices and their sessions, and what waited for them."""
    await desk.store.devices.forget_user(user_id)
    await desk.store.push_tokens.forget_user(user_id)
    await desk.broker.forget_inbox(user_id)


# --- read receipts ---------------------------------------------------------------------------------------------------


async def tell_owners(desk: Desk, user_id: str) -> None:
    """Every owner of a live conversation has looked, since the change, whether the account hides what it reads. Of
    later stays their owners look by themselves.

    Two changes at once do no harm: whoever looks sees the account as it is.
    """
    unheard: list[Exception] = []
    at_once = anyio.Semaphore(_AT_ONCE)

    async def tell(conversation_id: str) -> None:
        async with at_once:
            try:
                await _have_looked(desk, conversation_id, user_id)
            except (BrokerUnavailable, TooManyWaiting, Undecided) as error:
                unheard.append(error)

    async for page in desk.store.stays.stays(user_id, live=True):
        async with anyio.create_task_group() as group:
            for stay in page:
                group.start_soon(tell, stay.membership.conversation_id)
        if unheard:
            raise unheard[0]


STEPS: Final = {
    DELETION: (revoke_everything, leave_groups, forget_keys, forget_blocks, abandon_media, forget_devices),
    REMAINS: (forget_keys, forget_blocks, abandon_media, forget_devices),
    READ_RECEIPTS: (tell_owners,),
}
"""Work → its steps, in order. Each may be repeated."""
LATER: Final = {DELETION: REMAINS}
"""Work → what is left to do `ABANDONED_SECONDS` after it: requests that were under way may have written past every
look at the account."""
