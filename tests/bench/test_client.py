"""Playbooks of the simulated client: what comes in, what it must answer, and when."""

from __future__ import annotations

import pytest

from bench import journal
from bench.client import Client, State
from bench.folds import MessageView
from protocol import frames
from protocol.errors import ErrorCode
from protocol.frames import DeleteScope, ReactionOp
from protocol.models import EventKind
from tests.bench.scripted_log import (
    AUTH_SUCCESS,
    CONVERSATION,
    accounted,
    ack,
    changed,
    digest_of,
    edited,
    erased,
    pushed,
    stored,
    sync_complete,
)

ME = "usr_me"
OTHER = "usr_other"


class Play:
    """A client with a clock of its own and everything it wrote and noted."""

    def __init__(self) -> None:
        self.now = 100.0
        self.events: list[journal.Event] = []
        self.client = Client(ME, "phone-1", "token", self.events.append)

    def go_live(self) -> list[frames.ClientFrame]:
        opening = self.client.opened(self.now)
        assert isinstance(opening[0], frames.Auth)
        return [*opening, *self.give(AUTH_SUCCESS)]

    def give(self, *server_frames: frames.ServerFrame) -> list[frames.ClientFrame]:
        written: list[frames.ClientFrame] = []
        for frame in server_frames:
            written += self.client.receive(frame, self.now, 0)
        return written

    def send(self, content: str = "hello") -> list[frames.ClientFrame]:
        return self.client.send(CONVERSATION, content, now=self.now, wall_ms=0)[1]

    def pass_time(self, seconds: float) -> list[frames.ClientFrame]:
        self.now += seconds
        return self.client.tick(self.now, 0)

    def noted(self, kind: type[journal.Event]) -> list[journal.Event]:
        return [event for event in self.events if type(event) is kind]


@pytest.fixture
def play() -> Play:
    play = Play()
    play.go_live()
    return play


def others(first: int, last: int) -> list[frames.Messages]:
    return [pushed(stored(sequence, OTHER, f"m{sequence}")) for sequence in range(first, last + 1)]


def keys(written: list[frames.ClientFrame]) -> list[str]:
    return [frame.idempotency_key for frame in written if isinstance(frame, frames.Message)]


def test_nothing_is_sent_before_the_server_let_it_in() -> None:
    play = Play()
    assert play.send() == []
    assert [type(frame) for frame in play.client.opened(play.now)] == [frames.Auth]
    assert play.send("second") == []
    assert len(keys(play.give(AUTH_SUCCESS))) == 2


def test_without_an_ack_the_same_key_goes_again_after_ten_seconds(play: Play) -> None:
    first = keys(play.send())
    assert play.pass_time(9.9) == []
    assert keys(play.pass_time(0.2)) == first
    assert keys(play.pass_time(9.9)) == []
    assert keys(play.pass_time(0.2)) == first


def test_after_the_ack_it_never_goes_again(play: Play) -> None:
    (key,) = keys(play.send())
    play.give(ack(key, 1))
    assert play.pass_time(100.0) == []
    assert play.client.deadline() == float("inf")


def test_a_retryable_error_is_tried_again_when_the_server_said_so(play: Play) -> None:
    (key,) = keys(play.send())
    play.give(frames.error_frame(ErrorCode.STORAGE_UNAVAILABLE, "later", idempotency_key=key, retry_after_ms=500))
    assert play.pass_time(0.4) == []
    assert keys(play.pass_time(0.2)) == [key]


def test_i7_what_waits_to_be_said_again_holds_back_what_is_behind_it_and_nothing_else(play: Play) -> None:
    (first,) = keys(play.send())
    (second,) = keys(play.send())
    for key in (second, first):
        play.give(frames.error_frame(ErrorCode.OVERLOADED, "later", idempotency_key=key, retry_after_ms=500))
    assert play.send("third") == []
    play.pass_time(0.2)
    play.give(frames.error_frame(ErrorCode.OVERLOADED, "later still", idempotency_key=first, retry_after_ms=500))
    assert keys(play.pass_time(0.4)) == []
    _, elsewhere = play.client.send("conv_other", "hello", now=play.now, wall_ms=0)
    assert len(keys(elsewhere)) == 1
    again = keys(play.pass_time(0.2))
    assert again[:2] == [first, second]
    assert len(again) == 3


def test_a_new_connection_hears_what_was_not_sent_yet_behind_what_was(play: Play) -> None:
    sent = [key for number in range(40) for key in keys(play.send(str(number)))]
    play.client.closed(1006, play.now)
    assert keys(play.go_live()) == sent


def test_a_final_error_settles_the_send(play: Play) -> None:
    (key,) = keys(play.send())
    play.give(frames.error_frame(ErrorCode.FORBIDDEN, "no", idempotency_key=key, conversation_id=CONVERSATION))
    assert play.client.pending == {}
    assert play.pass_time(100.0) == []


def test_rate_limited_slows_down_everything_behind_it(play: Play) -> None:
    (key,) = keys(play.send())
    play.give(frames.error_frame(ErrorCode.RATE_LIMITED, "slow", idempotency_key=key, retry_after_ms=50))
    play.send("second")
    assert play.pass_time(0.04) == []
    assert len(keys(play.pass_time(0.011))) == 1
    assert keys(play.pass_time(0.01)) == []
    assert len(keys(play.pass_time(0.05))) == 1


def test_at_most_a_window_is_on_the_way(play: Play) -> None:
    sent = [key for number in range(40) for key in keys(play.send(str(number)))]
    assert len(sent) == 32
    assert len(keys(play.give(ack(sent[0], 1)))) == 1


def test_a_reconnect_resumes_and_repeats_what_has_no_ack(play: Play) -> None:
    play.give(*others(1, 3))
    (key,) = keys(play.send())
    play.client.closed(1006, play.now)
    assert play.client.state is State.OFFLINE
    written = play.go_live()
    assert isinstance(written[0], frames.Auth)
    assert written[0].payload.resume == {CONVERSATION: 3}
    assert keys(written) == [key]


def test_what_was_seen_is_dropped(play: Play) -> None:
    play.give(*others(1, 2), *others(2, 3))
    assert play.client.logs[CONVERSATION].cursor == 3


def test_deliveries_are_confirmed_together(play: Play) -> None:
    assert play.give(*others(1, 5)) == []
    (confirmation,) = play.pass_time(0.2)
    assert isinstance(confirmation, frames.DeliveryAck)
    assert confirmation.message_id == "msg_5"
    assert play.pass_time(10.0) == []
    (confirmation,) = play.give(*others(6, 25))
    assert isinstance(confirmation, frames.DeliveryAck)
    assert confirmation.message_id == "msg_25"


def test_a_hole_is_asked_for_at_once_and_not_confirmed_over(play: Play) -> None:
    written = play.give(*others(1, 2), *others(5, 5))
    assert written == [frames.Retransmit(conversation_id=CONVERSATION, from_sequence=3, to_sequence=4)]
    (confirmation,) = play.pass_time(0.2)
    assert isinstance(confirmation, frames.DeliveryAck)
    assert confirmation.message_id == "msg_2"
    play.give(pushed(stored(3, OTHER, "m3"), stored(4, OTHER, "m4"), origin="retransmit"))
    assert play.client.logs[CONVERSATION].cursor == 5


def test_an_unanswered_question_is_asked_again(play: Play) -> None:
    play.give(*others(1, 1), *others(3, 3))
    play.pass_time(0.2)
    assert play.pass_time(4.0) == []
    assert [type(frame) for frame in play.pass_time(1.0)] == [frames.Retransmit]


def test_half_an_answer_is_followed_by_the_next_question(play: Play) -> None:
    play.give(*others(1, 1), *others(5, 5))
    written = play.give(pushed(stored(2, OTHER, "m2"), origin="retransmit"))
    assert written == [frames.Retransmit(conversation_id=CONVERSATION, from_sequence=3, to_sequence=4)]


def test_a_hole_that_may_be_ones_own_message_has_patience(play: Play) -> None:
    play.give(*others(1, 1))
    (key,) = keys(play.send())
    assert play.give(*others(3, 3)) == []
    play.give(ack(key, 2))
    assert play.client.logs[CONVERSATION].cursor == 3
    (confirmation,) = play.pass_time(2.0)
    assert isinstance(confirmation, frames.DeliveryAck)
    assert confirmation.message_id == "msg_3"


def test_a_range_the_server_accounts_for_without_messages_is_no_hole(play: Play) -> None:
    play.give(*others(1, 2), *others(9, 9))
    play.give(accounted(3, 8))
    assert play.client.logs[CONVERSATION].cursor == 9


def test_a_later_joiner_begins_where_the_server_begins(play: Play) -> None:
    play.give(*others(7, 8))
    log = play.client.logs[CONVERSATION]
    assert log.cursor == 8
    assert log.digest is None


def test_the_digest_is_proven_over_own_and_foreign_messages(play: Play) -> None:
    log = [stored(1, OTHER, "a"), stored(2, ME, "mine"), stored(3, OTHER, "b")]
    play.give(pushed(log[0]))
    (key,) = keys(play.send("mine"))
    play.give(ack(key, 2), pushed(log[2]), sync_complete(3, digest_of(*log)))
    assert play.client.proven == {CONVERSATION}
    assert play.noted(journal.Contradicted) == []


def test_an_altered_history_contradicts(play: Play) -> None:
    log = [stored(1, OTHER, "a"), stored(2, OTHER, "b")]
    play.give(pushed(*log), sync_complete(2, digest_of(log[0], stored(2, OTHER, "B"))))
    assert len(play.noted(journal.Contradicted)) == 1
    assert play.client.proven == set()


def test_a_later_joiner_folds_from_a_head(play: Play) -> None:
    log = [stored(sequence, OTHER, str(sequence)) for sequence in range(1, 7)]
    play.give(pushed(*log[3:5], origin="backlog"), sync_complete(5, digest_of(*log[:5])))
    play.give(pushed(log[5]), sync_complete(6, digest_of(*log)))
    assert play.client.proven == {CONVERSATION}


def test_a_head_stated_for_a_sequence_already_passed_still_anchors(play: Play) -> None:
    log = [stored(sequence, OTHER, str(sequence)) for sequence in range(1, 8)]
    play.give(sync_complete(0, digest_of()))
    written = play.give(pushed(log[3]))
    assert [type(frame) for frame in written] == [frames.Sync]
    play.give(pushed(log[4]), pushed(log[5]), sync_complete(4, digest_of(*log[:4])))
    play.give(pushed(log[6]), sync_complete(7, digest_of(*log)))
    assert play.client.proven == {CONVERSATION}


def test_a_group_that_came_during_the_first_sync_is_asked_about_once(play: Play) -> None:
    play.give(*others(5, 6))
    assert [type(frame) for frame in play.give(sync_complete(0, digest_of()))] == [frames.Sync]
    assert play.give(sync_complete(0, digest_of())) == []


def test_reading_names_the_last_message_held(play: Play) -> None:
    assert play.client.read(CONVERSATION, play.now, 5) == []
    play.give(*others(1, 4))
    assert play.client.read(CONVERSATION, play.now, 5) == [frames.ReadReceipt(message_ids=["msg_4"], timestamp=5)]


def change(play: Play, kind: str) -> tuple[str, list[frames.ClientFrame]]:
    client = play.client
    match kind:
        case "edit":
            return client.edit(CONVERSATION, "msg_1", "better", play.now)
        case "delete":
            return client.delete(CONVERSATION, "msg_1", DeleteScope.ME, play.now)
        case _:
            return client.react(CONVERSATION, "msg_1", "+1", ReactionOp.ADD, play.now)


@pytest.mark.parametrize("kind", ["edit", "delete", "react"])
def test_a_change_is_pending_like_a_send(play: Play, kind: str) -> None:
    key, first = change(play, kind)
    assert list(play.client.pending) == [key]
    assert play.pass_time(9.9) == []
    assert play.pass_time(0.2) == first
    play.client.closed(1006, play.now)
    assert play.go_live()[1:] == first
    play.give(ack(key, 2))
    assert play.client.pending == {}
    (acked,) = play.noted(journal.Acked)
    (sent, *again) = play.noted(journal.Sent)
    assert isinstance(acked, journal.Acked)
    assert isinstance(sent, journal.Sent)
    assert acked.change is sent.change is not None
    assert sent.target == "msg_1"
    assert len(again) == 2


def test_a_refused_change_is_over(play: Play) -> None:
    key, _ = change(play, "edit")
    play.give(frames.error_frame(ErrorCode.TOO_LATE, "too late", idempotency_key=key, conversation_id=CONVERSATION))
    assert play.client.pending == {}
    (refused,) = play.noted(journal.Refused)
    assert isinstance(refused, journal.Refused)
    assert refused.change is EventKind.EDITED


def test_the_ack_of_a_change_is_not_its_entry(play: Play) -> None:
    play.give(*others(1, 1))
    key, _ = change(play, "react")
    play.give(ack(key, 2))
    assert play.client.logs[CONVERSATION].cursor == 1
    play.give(pushed(changed(2, EventKind.REACTED, ME, "msg_1", emoji="+1")))
    assert play.client.logs[CONVERSATION].cursor == 2


def views(play: Play) -> dict[str, MessageView]:
    return play.client.logs[CONVERSATION].views


def test_changes_fold_in_order(play: Play) -> None:
    play.give(*others(1, 2))
    play.give(pushed(changed(3, EventKind.EDITED, OTHER, "msg_1", content="one")))
    play.give(pushed(changed(4, EventKind.EDITED, OTHER, "msg_1", content="two")))
    for sequence, kind, user in ((5, "reacted", ME), (6, "reacted", OTHER), (7, "unreacted", ME)):
        play.give(pushed(changed(sequence, EventKind(kind), user, "msg_1", emoji="+1")))
    assert views(play) == {"msg_1": MessageView(content="two", edited=True, reactions=frozenset({(OTHER, "+1")}))}
    play.give(pushed(changed(8, EventKind.DELETED, OTHER, "msg_1")))
    assert views(play) == {"msg_1": MessageView(content="", deleted=True)}


def test_what_others_hide_from_themselves_stays(play: Play) -> None:
    play.give(*others(1, 2))
    play.give(pushed(changed(3, EventKind.HIDDEN, OTHER, "msg_1", shown_target=False, commitment="ab")))
    assert views(play) == {}
    play.give(pushed(changed(4, EventKind.HIDDEN, ME, "msg_2", commitment="cd")))
    assert views(play)["msg_2"].deleted


def test_a_page_that_shows_the_end_folds_to_the_same_end(play: Play) -> None:
    """Everything of it comes changed already, and so does the edit, whose content went with the deletion."""
    first = edited(stored(1, OTHER, "a"), "c")
    gone = erased(stored(2, OTHER, "b"))
    log = [
        first,
        gone,
        changed(3, EventKind.EDITED, OTHER, "msg_1", content="x"),
        changed(4, EventKind.EDITED, OTHER, "msg_1", content="c"),
        erased(changed(5, EventKind.EDITED, OTHER, "msg_2", content="secret")),
        changed(6, EventKind.DELETED, OTHER, "msg_2"),
    ]
    play.give(pushed(*log, origin="backlog"))
    assert views(play)["msg_1"] == MessageView(content="c", edited=True)
    assert views(play)["msg_2"].deleted
    assert views(play)["msg_1"].shows_as(first)
    assert views(play)["msg_2"].shows_as(gone)


def test_the_digest_is_proven_over_changed_content(play: Play) -> None:
    log = [stored(1, OTHER, "a"), stored(2, OTHER, "b"), changed(3, EventKind.EDITED, OTHER, "msg_1", content="x")]
    shown = [edited(log[0], "x"), *log[1:]]
    play.give(pushed(*shown, origin="backlog"), sync_complete(3, digest_of(*log)))
    assert play.client.proven == {CONVERSATION}
