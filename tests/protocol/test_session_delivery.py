"""Playbooks of delivery in `protocol.session`: live frames, gaps, pages, lag, sync. C4, C5, C8 for one connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol import frames, records
from protocol.backlog import State
from protocol.commands import Ask, Command, Send, SendEncoded
from tests.protocol.playbook import (
    WALL_MS,
    auth,
    live_session,
    open_answer,
    open_query,
    opening_session,
    page_answer,
    page_query,
)

if TYPE_CHECKING:
    from protocol.session import Session


def page(session: Session, answer: records.PageAnswer) -> list[Command]:
    return session.page(answer, 1.0, WALL_MS)


def pump(session: Session) -> list[Command]:
    return session.pump(1.0, WALL_MS)


def heads_of(command: Command) -> dict[str, int]:
    assert isinstance(command, Send)
    assert isinstance(command.frame, frames.SyncComplete)
    return {name: head.sequence_number for name, head in command.frame.payload.heads.items()}


def test_a_delivery_that_continues_the_cursor_is_written() -> None:
    session = live_session({"conv_1": (5, 5)})
    assert session.deliver("conv_1", 6, 6)
    assert session.deliver("conv_1", 7, 9)
    assert session.cursors == {"conv_1": 9}
    assert session.behind is None


def test_a_new_conversation_starts_at_one() -> None:
    session = live_session()
    assert session.deliver("conv_new", 1, 1)
    assert session.deliver("conv_new", 2, 2)


def test_a_repeated_delivery_is_dropped() -> None:
    session = live_session({"conv_1": (5, 5)})
    assert not session.deliver("conv_1", 4, 5)
    assert session.behind is None
    assert pump(session) == []


def test_a_gap_is_paged_from_the_log() -> None:
    session = live_session({"conv_1": (5, 5)})
    assert not session.deliver("conv_1", 7, 7)
    assert pump(session) == [Ask(page_query("conv_1", 5))]
    assert pump(session) == []
    assert page(session, page_answer("conv_1", 6, 7)) == [SendEncoded(b"conv_1 6..7")]
    assert session.behind is None
    assert session.deliver("conv_1", 8, 8)


def test_a_delivery_that_overlaps_a_page_is_not_written_twice() -> None:
    session = live_session({"conv_1": (5, 5)})
    assert not session.deliver("conv_1", 4, 6)
    assert pump(session) == [Ask(page_query("conv_1", 5))]


def test_a_delivery_during_a_page_waits_behind_it() -> None:
    session = live_session({"conv_1": (0, 3)})
    assert not session.deliver("conv_1", 4, 4)
    assert page(session, page_answer("conv_1", 1, 3)) == [
        SendEncoded(b"conv_1 1..3"),
        Ask(page_query("conv_1", 3)),
    ]
    sent, complete = page(session, page_answer("conv_1", 4, 4))
    assert sent == SendEncoded(b"conv_1 4..4")
    assert heads_of(complete) == {"conv_1": 4}


def test_other_conversations_stay_live_during_a_backlog() -> None:
    session = live_session({"conv_1": (0, 300), "conv_2": (8, 8)})
    assert session.deliver("conv_2", 9, 9)


def test_backlog_pages_go_round_robin_and_end_with_sync_complete() -> None:
    session = opening_session()
    commands = session.opened(open_answer({"a": (0, 200), "b": (0, 150), "c": (3, 3)}), 0.0, WALL_MS)
    assert commands[1:] == [Ask(page_query("a", 0))]
    assert page(session, page_answer("a", 1, 100, has_more=True))[1:] == [Ask(page_query("b", 0))]
    assert page(session, page_answer("b", 1, 100, has_more=True))[1:] == [Ask(page_query("a", 100))]
    assert page(session, page_answer("a", 101, 200))[1:] == [Ask(page_query("b", 100))]
    sent, complete = page(session, page_answer("b", 101, 150))
    assert sent == SendEncoded(b"b 101..150")
    assert heads_of(complete) == {"a": 200, "b": 150, "c": 3}


def test_sync_complete_comes_once() -> None:
    session = live_session({"conv_1": (0, 1)})
    assert len(page(session, page_answer("conv_1", 1, 1))) == 2
    assert pump(session) == []


def test_deliveries_while_opening_are_paged_afterwards() -> None:
    session = opening_session()
    assert not session.deliver("conv_1", 6, 6)
    assert not session.deliver("conv_new", 1, 1)
    commands = session.opened(open_answer({"conv_1": (5, 5)}), 0.0, WALL_MS)
    assert commands[1:] == [Ask(page_query("conv_1", 5))]
    assert page(session, page_answer("conv_1", 6, 6))[1:] == [Ask(page_query("conv_new", 0))]


def test_an_empty_page_ends_the_conversation_it_was_asked_for() -> None:
    session = live_session({"conv_1": (0, 5)})
    (complete,) = page(session, page_answer("conv_1", 1, 0))
    assert heads_of(complete) == {"conv_1": 5}
    assert session.behind is None


def test_a_page_nobody_asked_for_is_dropped() -> None:
    session = live_session({"conv_1": (5, 5)})
    assert page(session, page_answer("conv_1", 1, 5)) == []
    session = live_session({"conv_1": (0, 5), "conv_2": (0, 5)})
    assert page(session, page_answer("conv_2", 1, 5)) == []


def test_a_late_answer_to_a_repeated_question_moves_nothing() -> None:
    session = live_session({"conv_1": (0, 5)})
    session.heard_at = 5.0
    session.tick(5.0, WALL_MS)  # asked a second time: two answers are under way
    session.deliver("conv_1", 6, 6)
    assert page(session, page_answer("conv_1", 1, 5))[1:] == [Ask(page_query("conv_1", 5))]
    assert page(session, page_answer("conv_1", 1, 5)) == []
    sent, _ = page(session, page_answer("conv_1", 6, 6))
    assert sent == SendEncoded(b"conv_1 6..6")


def test_a_late_page_from_before_a_sync_does_not_skip_what_the_sync_asked_for() -> None:
    session = live_session({"conv_1": (20, 20)})
    session.deliver("conv_1", 30, 30)
    assert pump(session) == [Ask(page_query("conv_1", 20))]
    session.receive(frames.Sync(payload=frames.SyncPayload(cursors={"conv_1": 5})), 1.0, WALL_MS)
    assert session.opened(open_answer({"conv_1": (5, 30)}), 1.0, WALL_MS) == [Ask(page_query("conv_1", 5))]
    assert page(session, page_answer("conv_1", 21, 30)) == []
    sent, _ = page(session, page_answer("conv_1", 6, 30))
    assert sent == SendEncoded(b"conv_1 6..30")


# --- lag -------------------------------------------------------------------------------------------------------------


def test_a_lagging_socket_gets_nothing_live_and_is_paged_when_it_has_drained() -> None:
    session = live_session({"conv_1": (5, 5), "conv_2": (1, 1)})
    session.lagging = True
    assert not session.deliver("conv_1", 6, 6)
    assert not session.deliver("conv_1", 7, 7)
    assert not session.deliver("conv_2", 2, 2)
    assert pump(session) == []
    session.lagging = False
    assert pump(session) == [Ask(page_query("conv_1", 5))]
    assert page(session, page_answer("conv_1", 6, 7))[1:] == [Ask(page_query("conv_2", 1))]
    page(session, page_answer("conv_2", 2, 2))
    assert session.cursors == {"conv_1": 7, "conv_2": 2}


def test_what_a_session_holds_does_not_grow_with_what_it_missed() -> None:
    session = live_session({"conv_1": (0, 0)})
    session.lagging = True
    for sequence in range(1, 5_000):
        session.deliver("conv_1", sequence, sequence)
    assert session.behind == {"conv_1": 4_999}


# --- the sweep -------------------------------------------------------------------------------------------------------


def test_c8_a_head_the_cursor_has_not_reached_is_paged() -> None:
    session = live_session({"conv_1": (5, 5)})
    assert not session.head_seen("conv_1", 5)
    assert session.head_seen("conv_1", 6)
    session.note_head("conv_1", 6)
    assert pump(session) == [Ask(page_query("conv_1", 5))]


def test_c8_a_head_that_was_reached_in_the_meantime_is_forgotten() -> None:
    session = live_session({"conv_1": (5, 5)})
    assert session.head_seen("conv_1", 6)
    assert session.deliver("conv_1", 6, 6)
    session.note_head("conv_1", 6)
    assert pump(session) == []


def test_c8_a_conversation_never_heard_of_is_paged_from_the_start() -> None:
    session = live_session()
    session.note_head("conv_new", 2)
    assert pump(session) == [Ask(page_query("conv_new", 0))]


def test_the_sweep_says_nothing_while_opening() -> None:
    assert not opening_session().head_seen("conv_1", 9)


# --- sync and re-auth ------------------------------------------------------------------------------------------------


def test_sync_pages_from_the_clients_cursors() -> None:
    session = live_session({"conv_1": (9, 9), "conv_2": (4, 4)})
    sync = frames.Sync(payload=frames.SyncPayload(cursors={"conv_1": 3}))
    assert session.receive(sync, 1.0, WALL_MS) == [Ask(open_query({"conv_1": 3}))]
    commands = session.opened(open_answer({"conv_1": (3, 9), "conv_2": (4, 4)}), 1.0, WALL_MS)
    assert commands == [Ask(page_query("conv_1", 3))]
    sent, complete = page(session, page_answer("conv_1", 4, 9))
    assert sent == SendEncoded(b"conv_1 4..9")
    assert heads_of(complete) == {"conv_1": 9, "conv_2": 4}


def test_a_sync_does_not_forget_what_was_behind() -> None:
    session = live_session({"conv_1": (7, 7)})
    session.receive(frames.Sync(payload=frames.SyncPayload(cursors={"conv_1": 7})), 1.0, WALL_MS)
    assert not session.deliver("conv_1", 9, 9)
    assert session.opened(open_answer({"conv_1": (7, 7)}), 1.0, WALL_MS) == [Ask(page_query("conv_1", 7))]


def test_a_conversation_younger_than_the_answer_keeps_its_place() -> None:
    session = live_session()
    session.receive(frames.Sync(payload=frames.SyncPayload()), 1.0, WALL_MS)
    assert session.deliver("conv_new", 1, 1)
    session.opened(open_answer({}), 1.0, WALL_MS)
    assert session.deliver("conv_new", 2, 2)


def test_c4_a_token_refresh_does_not_send_live_messages_twice() -> None:
    session = live_session({"conv_1": (5, 5)})
    session.receive(auth(), 1.0, WALL_MS)
    session.admit("usr_a", "phone", "sess_1", 1e9, None, 1.0)
    assert session.deliver("conv_1", 6, 6)
    commands = session.opened(open_answer({"conv_1": (5, 6)}), 1.0, WALL_MS)
    assert not any(isinstance(command, Ask) for command in commands)
    assert session.cursors == {"conv_1": 6}
    assert session.state is State.LIVE
