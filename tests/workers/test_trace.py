"""One message through all processes: by any of its names, wherever it lies, and by one id in everybody's log."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest
import structlog
from structlog.testing import capture_logs

from protocol import keys, records
from tests.workers.lanes import INSTANCE, SHARDS, eventually, run_lane, settled
from tests.workers.letters import POISON, postpone, refusing
from tests.workers.seeding import Rest, refusal
from workers.inspection import EntryState
from workers.trace import trace

if TYPE_CHECKING:
    from tests.workers.lanes import Yard
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio


async def test_a_message_that_nobody_has_read_waits_in_its_stream_without_an_owner(yard: Yard) -> None:
    conv = keys.direct_conversation_id("ann", "bob")
    await yard.send(conv, "ann", "k1")
    for name in ("k1", "c-k1", keys.trace_id(conv, "ann", "k1")):
        (found,) = await trace(yard.store, yard.broker, SHARDS, name)
        assert (found.conversation_id, found.sender_id, found.idempotency_key) == (conv, "ann", "k1")
        (entry,) = found.entries
        assert (entry.state, entry.owner, entry.client_message_id) == (EntryState.WAITING, "", "c-k1")
        assert found.message is None
        assert "not committed: nobody has an ack for it" in found.story
        assert any("nobody owns its shard" in line for line in found.story)


async def test_a_message_that_was_read_and_not_decided_is_pending(yard: Yard) -> None:
    conv = keys.direct_conversation_id("ann", "bob")
    await yard.send(conv, "ann", "k1")
    shard = keys.shard_of(conv, SHARDS)
    await yard.broker.hold_leases("worker-1", [shard])
    await yard.broker.read_ingest([shard], 10, 100)
    await yard.broker.read_pending(shard, b"0", 10)
    (found,) = await trace(yard.store, yard.broker, SHARDS, "k1", conv, "ann")
    (entry,) = found.entries
    assert (entry.state, entry.deliveries, entry.owner) == (EntryState.PENDING, 2, "worker-1")
    assert any("was read 2 times" in line and "owner is worker-1" in line for line in found.story)


async def test_a_committed_message_shows_number_digest_recipients_cursors_and_receipts(yard: Yard) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        first = await yard.said(conv, "ann", "k1", "not to be shown")
        message_id = await yard.said(conv, "ann", "k2", "not to be shown")
        await yard.delivered(first, "bob")
        await eventually(lambda: settled(yard))
        (after_one,) = await trace(yard.store, yard.broker, SHARDS, message_id)
        await yard.read(message_id, "bob")
        await eventually(lambda: settled(yard))
        found = None
        for name in (message_id, "k2", keys.trace_id(conv, "ann", "k2")):
            (found,) = await trace(yard.store, yard.broker, SHARDS, name)
            assert found.message is not None
            assert (found.message.message_id, found.message.sequence_number) == (message_id, 2)
    assert found is not None
    stored = (await yard.log(conv))[1]
    assert found.message is not None
    assert found.message.digest == stored["digest"].hex()
    bob_then, bob = [next(one for one in seen.recipients if one.user_id == "bob") for seen in (after_one, found)]
    assert (bob_then.delivered, bob_then.read, bob_then.cursors) == (False, False, {"d1": 1})
    assert (bob.delivered, bob.read, bob.online) == (True, True, [INSTANCE])
    assert all(entry.state is EntryState.ACKNOWLEDGED for entry in found.entries)
    assert "not to be shown" not in str(found)


async def test_an_offline_recipient_has_it_in_the_inbox(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        message_id = await yard.said(conv, "ann", "k1")

        async def in_inbox() -> bool:
            (found,) = await trace(yard.store, yard.broker, SHARDS, message_id)
            bob = next(one for one in found.recipients if one.user_id == "bob")
            return bob.in_inbox and bob.online == []

        await eventually(in_inbox)


async def test_a_dead_letter_is_part_of_the_story(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        async with refusing(yard.store):
            await yard.send(conv, "ann", "k1", POISON)
            await yard.acks(1)
        await postpone(yard.store)
    (found,) = await trace(yard.store, yard.broker, SHARDS, "k1")
    (letter,) = found.dead_letters
    assert (letter.status, letter.error_type) == ("pending", "storage_failed")
    assert any(line.startswith(f"dead letter {letter.letter_id}: pending") for line in found.story)
    assert POISON not in str(found)


async def test_nothing_goes_by_an_unknown_name(yard: Yard) -> None:
    assert await trace(yard.store, yard.broker, SHARDS, "nobody") == []
    assert await trace(yard.store, yard.broker, SHARDS, "msg_" + "0" * 26) == []


async def test_one_id_names_a_message_in_the_log_of_its_owner(yard: Yard) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))
    try:
        with capture_logs() as lines:
            async with run_lane(yard):
                conv = await yard.create("ann", "bob")
                message_id = await yard.said(conv, "ann", "k1", "not to be shown")
    finally:
        structlog.reset_defaults()
    named = [line for line in lines if line.get("trace") == keys.trace_id(conv, "ann", "k1")]
    assert [line["event"] for line in named] == ["< entry", "= committed"]
    assert named[1]["message_id"] == message_id
    assert "not to be shown" not in str(lines)


def test_a_retry_has_the_trace_id_of_the_first_try_and_a_change_one_of_its_sender() -> None:
    def sent(connection: int) -> records.ChangeMessage:
        change = records.Edit("x")
        return records.ChangeMessage("gw", connection, "", "ann", "d1", "conv_1", "c", "k1", "msg_1", change)

    assert records.trace_of(sent(1)) == records.trace_of(sent(2)) == keys.trace_id("conv_1", "ann", "k1")


# --- over HTTP and on the command line -------------------------------------------------------------------------------


async def sent_over_rest(rest: Rest) -> tuple[str, str, str]:
    """(sender's token, conversation, message id)."""
    _, token = await rest.user("Ann")
    bob, _ = await rest.user("Bob")
    created = await rest.call("POST", "/v1/conversations", token, {"type": "1:1", "participants": [bob]})
    conversation_id = created.json()["_id"]
    body = {"content": "not to be shown", "type": "text", "timestamp": 1}
    path = f"/v1/conversations/{conversation_id}/messages"
    sent = await rest.call("POST", path, token, body, Idempotency_Key="the-key")
    return token, conversation_id, sent.json()["message_id"]


async def test_the_administrator_traces_over_http_and_a_user_cannot(rest: Rest) -> None:
    token, conversation_id, message_id = await sent_over_rest(rest)
    by_id = await rest.call("GET", f"/v1/traces/{message_id}", rest.admin_token)
    (found,) = by_id.json()["items"]
    assert (found["conversation_id"], found["message"]["sequence_number"]) == (conversation_id, 1)
    by_trace = await rest.call("GET", f"/v1/traces/{found['trace_id']}", rest.admin_token)
    assert by_trace.json()["items"][0]["message"]["message_id"] == message_id
    assert "not to be shown" not in by_id.text + by_trace.text
    assert (await rest.call("GET", "/v1/traces/nobody", rest.admin_token)).json()["items"] == []
    assert refusal(await rest.call("GET", f"/v1/traces/{message_id}", token)) == (404, "not_found")
    assert refusal(await rest.call("GET", f"/v1/traces/{message_id}", None)) == (401, "unauthorized")
    assert refusal(await rest.call("GET", "/v1/traces/x?conversation_id=$", rest.admin_token)) == (
        400,
        "validation_failed",
    )


async def test_the_command_line_tells_the_story(rest: Rest, settings: Settings, store: Store) -> None:
    _, conversation_id, message_id = await sent_over_rest(rest)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRIREME_")}
    environ |= {"TRIREME_REDIS_URL": settings.redis_url, "TRIREME_MONGODB_URL": settings.mongodb_url}

    async def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        def start() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "workers", "trace", *arguments],
                env=environ,
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )

        return await anyio.to_thread.run_sync(start)

    told = await run(message_id)
    assert (told.returncode, told.stderr) == (0, "")
    assert f"as {message_id}, number 1" in told.stdout
    as_json: Any = json.loads((await run("the-key", "--json")).stdout)
    assert as_json["message"]["message_id"] == message_id
    assert as_json["conversation_id"] == conversation_id
    assert "not to be shown" not in told.stdout + json.dumps(as_json)
    unknown = await run("nobody")
    assert unknown.returncode == 1
    assert unknown.stdout.startswith("nobody: nothing goes by that name")
