"""The stack, the phones and the replay together, on real processes: a small log with everything a real one has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from bench.http_api import HttpApi, Refusal
from bench.ledger import Ledger
from bench.pastimes import PastimeCounts, Shares
from bench.phone import Phone, PhoneError
from bench.replay import Replay
from bench.stack import Stack, StackError, run_stack
from bench.transcript import parse
from protocol.errors import ErrorCode
from protocol.models import ConversationType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.services import Services

pytestmark = pytest.mark.slow

LOG = """\
[10:00] <anna> hello
=== carl [~c@example.net]  has joined #x
[10:00] <bert> hi anna
[10:01] <dora> caf\u00e9 \u263a
=== bert is now known as bert_away
[10:01] <bert_away> brb
=== anna [~a@example.net]  has left #x []
[10:02] <carl> and she is gone
=== anna [~a@example.net]  has joined #x
[10:03] <anna> back
[10:04] <emil> who owns this group now?
[10:05] <anna> bert does
""" + "".join(f"[10:{minute:02}] <dora> line {minute}\n" for minute in range(6, 60))
LINKS = "0 2 -\n10 11 -\n"


@pytest.fixture(scope="module")
def stack(services: Services) -> Iterator[Stack]:
    with run_stack(services=services) as running:
        yield running


CHANCES = ("too_late", "unbanned")
"""Who is banned mostly comes back before the ban would have ended."""


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_small_log_ends_with_ok(stack: Stack) -> None:
    replay = Replay(stack, [parse("small", LOG, LINKS)], None, seed=3)
    trio.run(replay.run)
    report = replay.report()
    assert report["verdict"] == "ok"
    assert report["acked"] == report["events"]["messages"] == 62
    assert report["events"]["answers"] == 1
    assert report["events"]["answers_unlinked"] == 1  # bert answers what was said before he came
    assert report["events"]["left"] == 1


def test_a_log_with_everything_people_do_ends_with_ok(stack: Stack) -> None:
    often = Shares(edits=0.2, deletions=0.1, reactions=0.5, admin=0.3, settings=0.1, churn=0.1)
    lines = [f"[10:{minute % 60:02}] <{'abcdefgh'[minute % 8]}> line {minute}\n" for minute in range(110)]
    replay = Replay(stack, [parse("busy", "".join(lines))], None, seed=5, shares=often)
    trio.run(replay.run)
    report = replay.report()
    assert report["verdict"] == "ok"
    assert report["events"]["refused_muted"] > 0
    assert report["events"]["refused_banned"] > 0
    assert min(report["pastimes"][name] for name in PastimeCounts.__struct_fields__ if name not in CHANCES) > 0


def test_a_phone_gets_what_was_said_while_it_was_away(stack: Stack) -> None:
    ledger = Ledger()

    async def play() -> None:
        async with HttpApi(stack.rest_url, stack.admin_token) as api, trio.open_nursery() as nursery:
            users = [await api.create_user(name) for name in ("anna", "bert")]
            tokens = [await api.create_token(user_id, "d") for user_id in users]
            kind = ConversationType.ONE_TO_ONE.value
            conversation_id = await api.create_conversation(kind, users, tokens[0])
            ledger.declare_direct(conversation_id, (users[0], users[1]))
            anna, bert = (
                Phone(stack.ws_urls, user_id, "d", token, ledger.record)
                for user_id, token in zip(users, tokens, strict=True)
            )
            nursery.start_soon(anna.run)
            nursery.start_soon(bert.run)
            with trio.fail_after(20):
                await anna.wait_online()
                await bert.wait_online()
                first = await anna.send(conversation_id, "one", receiver_id=users[1])
                assert first.sequence_number == 1
                await bert.go_offline()
                for text in ("two", "three"):
                    assert not (await anna.send(conversation_id, text)).code
                bert.go_online()
                await bert.wait_until(lambda: bert.client.logs[conversation_id].cursor == 3)
                await bert.read(conversation_id)
                refused = await anna.send("conv_nowhere", "lost")
                assert refused.code == ErrorCode.CONVERSATION_NOT_FOUND.value
            nursery.cancel_scope.cancel()

    trio.run(play)
    assert ledger.verdict() == []
    assert ledger.counts["pushed"] >= 3


def test_a_phone_with_a_bad_token_gives_up(stack: Stack) -> None:
    async def play() -> None:
        phone = Phone(stack.ws_urls, "usr_nobody", "d", "not.a.token", Ledger().record)
        with trio.fail_after(10):
            await phone.run()

    with pytest.raises(PhoneError):
        trio.run(play)


def test_refusals_of_the_api_are_values(stack: Stack) -> None:
    async def play() -> dict[str, object] | Refusal:
        async with HttpApi(stack.rest_url, "wrong") as api:
            return await api.call("POST", "/v1/users", "wrong", {"name": "x"})

    answer = trio.run(play)
    assert isinstance(answer, Refusal)
    assert answer.code is ErrorCode.UNAUTHORIZED


def test_a_stack_ends_all_its_processes(services: Services) -> None:
    with run_stack(gateways=2, services=services) as running:
        started = [pid for role in ("gateway", "worker", "rest") for pid in running.pids[role]]
        assert len(running.ws_urls) == 2
        assert len(started) == 4
        assert all(map(_alive, started))
    assert not any(map(_alive, started))


def test_a_stack_that_cannot_start_shows_the_log(services: Services) -> None:
    with (
        pytest.raises(StackError, match="TRIREME_SHARDS"),
        run_stack(services=services, settings={"TRIREME_SHARDS": "many"}),
    ):
        pytest.fail("it started with a malformed setting")
