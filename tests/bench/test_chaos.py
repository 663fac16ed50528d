"""The parts of the chaos run that judge and choose, on scripted samples; the links, on real sockets."""

from __future__ import annotations

import contextlib
import errno
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
import trio
from msgspec import UNSET

from bench import journal
from bench.chaos import recovery, report
from bench.chaos.faults import FAULTS
from bench.chaos.links import Link, Weather
from bench.chaos.nemesis import Episode, chapters, schedule
from bench.chaos.retention import wrong_pages
from bench.chaos.samples import STEP_SECONDS, Sample, Sampler
from bench.chaos.server import Valkey
from bench.services import free_port
from protocol.frames import MessagesPayload
from protocol.models import MessageStatus, MessageType, StoredMessage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


def samples(*steps: tuple[int, float, float]) -> list[Sample]:
    """(acked, p99 ms, age of the oldest) per step, from 0 s on."""
    return [
        Sample((number + 1) * STEP_SECONDS, acked, p99 / 2, p99, 10, oldest, 5)
        for number, (acked, p99, oldest) in enumerate(steps)
    ]


GOOD = (100, 50.0, 0.1)


def test_recovery_ends_with_the_last_step_that_was_not_well() -> None:
    seen = samples(GOOD, GOOD, (0, 0.0, 1.0), (300, 900.0, 1.0), *[GOOD] * 10)
    assert recovery.recovery_seconds(seen, 1.0, 1.5, 200.0) == 1.0


def test_an_old_message_without_an_outcome_is_not_well_however_fast_the_others_are() -> None:
    seen = samples(*[GOOD] * 4, *[(100, 50.0, 6.0)] * 3, *[GOOD] * 10)
    assert recovery.recovery_seconds(seen, 0.0, 2.0, 200.0) == 3.5


def test_calm_before_the_script_s_end_proves_nothing() -> None:
    """A process that stands still is not missed at once."""
    seen = samples(*[GOOD] * 14)
    assert recovery.recovery_seconds(seen, 0.0, 5.0, 200.0) is None
    assert recovery.recovery_seconds(seen + samples(*[GOOD] * 24)[14:], 0.0, 5.0, 200.0) == 0.0


def test_without_five_calm_seconds_nothing_has_recovered() -> None:
    assert recovery.recovery_seconds(samples(*[GOOD] * 9), 0.0, 0.0, 200.0) is None
    assert recovery.recovery_seconds(samples(*[GOOD, GOOD, (5, 300.0, 0.1)] * 9), 0.0, 0.0, 200.0) is None


def test_the_limit_follows_a_machine_that_is_slow_without_any_fault() -> None:
    assert recovery.limit_ms(samples(*[GOOD] * 20)) == 200.0
    assert recovery.limit_ms(samples(*[(100, 160.0, 0.1)] * 20)) == 400.0
    assert recovery.limit_ms([]) == 200.0


def test_acks_within_a_silence_are_counted_only_in_whole_steps() -> None:
    seen = samples((5, 1.0, 0.0), (7, 1.0, 0.0), (11, 1.0, 0.0), (13, 1.0, 0.0))
    assert recovery.broken_silence(seen, 0.25, 1.75) == 18


def test_a_schedule_is_the_seed_s_and_each_round_has_every_row() -> None:
    assert schedule(FAULTS, 60, 7) == schedule(FAULTS, 60, 7)
    assert schedule(FAULTS, 60, 7) != schedule(FAULTS, 60, 8)
    turn = len(FAULTS) + sum(fault.often for fault in FAULTS)
    planned = schedule(FAULTS, turn, 1)
    assert {fault.name for fault in planned} == {fault.name for fault in FAULTS}
    assert [len(part) for part in chapters(planned[:25], 10)] == [10, 10, 5]


def test_every_row_has_a_name_of_its_own() -> None:
    assert len({(fault.row, fault.name) for fault in FAULTS}) == len(FAULTS)


def test_latency_counts_from_the_word_and_the_oldest_without_an_outcome_is_known() -> None:
    sampler = Sampler()
    for key in ("k1", "k2", "k3"):
        sampler.said("usr_a", key)
    sampler.acked("usr_a", "k1", time.monotonic() + 0.5)
    sampler.acked("usr_a", "k1", time.monotonic() + 9.0)  # the ack of a repeat
    sampler.refused("usr_a", "k3")
    sampler.step(online=1)
    (step,) = sampler.take()
    assert (step.acked, sampler.total_acked, step.outstanding) == (1, 1, 1)
    assert 400 < step.p99_ms < 600
    assert 0 <= step.oldest_seconds < 0.5
    assert sampler.take() == []


def episode(**changes: object) -> Episode:
    fields = {
        "row": "F-W1",
        "name": "worker kill -9",
        "detail": "<worker-1>",
        "began": 2.0,
        "ended": 3.0,
        "since": 2.0,
        "recovery_seconds": 4.0,
        "bound_seconds": 6.0,
        "limit_ms": 200.0,
        "acked": 100,
        "chapter": 1,
        "gave_up": 50.0,
    }
    return Episode(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_recovery_that_was_never_seen_is_late() -> None:
    assert not episode().is_late
    assert episode(recovery_seconds=6.5).is_late
    assert episode(recovery_seconds=None, bound_seconds=None).is_late
    (row,) = report.rows([episode(), episode(recovery_seconds=8.0), episode(recovery_seconds=None)])
    assert row == {
        "row": "F-W1",
        "name": "worker kill -9",
        "times": 3,
        "bound_seconds": 6.0,
        "median_seconds": 6.0,
        "longest_seconds": 8.0,
        "late": 2,
    }


def test_the_page_shows_every_fault_and_nothing_of_it_is_markup(tmp_path: Path) -> None:
    result = {
        "stored": 900,
        "violations": ["lost: x"],
        "violation_count": 3,
        "open_ends": [],
        "counts": {"acked": 900},
        "group_steps": 1,
        "digests_proven": 2,
        "slowest_ack_seconds": 1.0,
    }
    chapter = report.Chapter(number=1, samples=samples(*[GOOD] * 20), result=result)
    assert chapter.violations() == ["chapter 1: lost: x", "chapter 1: and 2 more"]
    found = report.summary([episode()], [chapter], 60.0)
    assert (found["messages_audited"], found["faults_injected"], found["counts"]["acked"]) == (900, 1, 900)
    report.write_html(tmp_path / "page.html", found, [episode()], [chapter])
    page = (tmp_path / "page.html").read_text()
    assert "&lt;worker-1&gt;" in page
    assert "<worker-1>" not in page
    assert page.count("<polyline") == 3


def page(origin: str, *numbers: int, first: int = 1, last: int = 0, expired: int | None = None) -> journal.Pushed:
    payload = MessagesPayload(
        conversation_id="c",
        messages=[message(number) for number in numbers],
        origin=origin,
        from_sequence=first,
        to_sequence=last,
        expired_through=UNSET if expired is None else expired,
    )
    return journal.Pushed(user_id="u", device_id="d", connection=1, at=0.0, payload=payload)


def message(number: int) -> StoredMessage:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return StoredMessage(
        conversation_id="c",
        sequence_number=number,
        sender_id="u",
        receiver_id="v",
        message_type=MessageType.TEXT,
        content="",
        timestamp=now,
        status=MessageStatus.SENT,
        created_at=now,
    )


def test_who_comes_behind_an_expired_prefix_sees_the_rest_whole_and_is_told_where_it_begins() -> None:
    answer = page("retransmit", 41, 42, last=42, expired=40)
    assert wrong_pages([page("backlog", 41, 42), page("live", 43), answer], 40) == []
    assert wrong_pages([page("retransmit", last=40, expired=40)], 40) == []
    assert wrong_pages([page("backlog", 40, 41), answer], 40) == ["40 was shown, and everything through 40 has expired"]
    assert wrong_pages([page("backlog", 41, 43)], 40) == ["the backlog has a hole or a repeat: 2 from 41 to 43"]
    for silent in (page("retransmit", 41, 42, last=42), page("retransmit", 41, 42, last=42, expired=39)):
        (wrong,) = wrong_pages([silent], 40)
        assert "it is 40" in wrong
    (wrong,) = wrong_pages([page("retransmit", 41, 43, last=43, expired=40)], 40)
    assert wrong == "a retransmit accounts for what is through 43 and shows 2 from 41 to 43"


# --- links -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def echo_through(link_name: str = "l") -> AsyncIterator[tuple[Link, int]]:
    """A link in front of an echo server, and its port."""

    async def echo(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async for chunk in stream:
                await stream.send_all(chunk)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            trio.serve_tcp,
            echo,
            0,
        )
        link = Link(link_name, listeners[0].socket.getsockname()[1])
        port: int = await nursery.start(link.serve)
        yield link, port
        nursery.cancel_scope.cancel()


async def ask(stream: trio.SocketStream, text: bytes) -> bytes:
    await stream.send_all(text)
    answer = b""
    while len(answer) < len(text):
        answer += await stream.receive_some()
    return answer


@pytest.mark.trio
async def test_a_link_delays_in_order_and_is_good_again_at_once() -> None:
    async with echo_through() as (link, port), await trio.open_tcp_stream("127.0.0.1", port) as stream:
        assert await ask(stream, b"fast") == b"fast"
        link.set(Weather(link="l", delay_ms=80.0, jitter_ms=60.0))
        began = trio.current_time()
        assert await ask(stream, b"one two three four five six" * 1000) == b"one two three four five six" * 1000
        assert trio.current_time() - began > 0.04
        link.set(Weather(link="l"))
        assert await ask(stream, b"again") == b"again"


@pytest.mark.trio
@pytest.mark.parametrize("closed", ["up", "down"])
async def test_what_a_silent_link_swallows_comes_when_it_speaks_again(closed: str) -> None:
    async with echo_through() as (link, port), await trio.open_tcp_stream("127.0.0.1", port) as stream:
        link.set(Weather(link="l", up=closed != "up", down=closed != "down"))
        await stream.send_all(b"hello")
        with trio.move_on_after(0.2) as scope:
            await stream.receive_some()
        assert scope.cancelled_caught
        link.set(Weather(link="l"))
        assert await stream.receive_some() == b"hello"


@pytest.mark.trio
async def test_a_cut_link_resets_what_is_there_and_what_comes() -> None:
    async with echo_through() as (link, port):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await ask(stream, b"x")
        link.set(Weather(link="l", refuses=True))
        with pytest.raises(trio.BrokenResourceError) as broken:
            await stream.receive_some()
        assert isinstance(broken.value.__cause__, OSError)
        assert broken.value.__cause__.errno == errno.ECONNRESET
        again = await trio.open_tcp_stream("127.0.0.1", port)
        with pytest.raises(trio.BrokenResourceError):
            await again.receive_some()
        link.set(Weather(link="l"))
        async with await trio.open_tcp_stream("127.0.0.1", port) as good:
            assert await ask(good, b"y") == b"y"
        await again.aclose()
        await stream.aclose()


@pytest.mark.trio
async def test_a_link_leads_elsewhere_from_then_on_and_stays_so_in_good_weather() -> None:
    async with echo_through() as (link, port):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listeners[0]:
            link.set(Weather(link="l", port=listeners[0].socket.getsockname()[1]))
            link.set(Weather(link="l"))
            async with await trio.open_tcp_stream("127.0.0.1", port), await listeners[0].accept() as other:
                await other.send_all(b"")


@pytest.mark.trio
async def test_a_link_can_be_bad_for_one_program_only() -> None:
    async with (
        echo_through() as (link, port),
        await trio.open_tcp_stream("127.0.0.1", port) as mine,
        await trio.open_tcp_stream("127.0.0.1", port) as other,
    ):
        await ask(mine, b"i am trireme-workers")
        await ask(other, b"i am a member")
        link.set(Weather(link="l", down=False, only="trireme-workers"))
        assert await ask(other, b"quick") == b"quick"
        with trio.move_on_after(0.2) as scope:
            await ask(mine, b"slow")
        assert scope.cancelled_caught


def test_a_file_of_valkey_that_is_broken_in_the_middle_is_cut_there(tmp_path: Path) -> None:
    """What a disk that was full may leave behind, seen after a later kill."""
    valkey = Valkey("valkey", tmp_path, free_port(), tmp_path / "valkey.log")
    valkey.start_ready()
    try:
        with valkey.client() as client:
            for name in ("before", "broken", "behind"):
                client.set(name, name * 20)
        valkey.kill()
        (file,) = valkey.data_dir.glob("appendonlydir/*.incr.aof")
        written = file.read_bytes()
        at = written.index(b"broken")
        file.write_bytes(written[:at] + bytes(64) + written[at + 64 :])
        valkey.start_ready()
        with valkey.client() as client:
            assert (client.exists("before"), client.exists("behind")) == (1, 0)
        assert valkey.cuts == 1
    finally:
        valkey.end()
