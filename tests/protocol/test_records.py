"""Stream records: what goes in comes out, unions are told apart by their tag, what cannot be read says so."""

from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import codec, records
from protocol.errors import AuthErrorCode, ErrorCode
from protocol.models import ConversationType, MessageType, Presence, Role, UserStatus

INGEST: list[records.IngestRecord] = [
    records.SendMessage("gw", 1, "u", "d", "c", "m1", "k", "", "text", MessageType.TEXT, None, None, 5),
    records.SendMessage("gw", 1, "u", "d", "c", "", "k", "r", "", MessageType.IMAGE, "/media/1", "msg_1", 5),
    records.Receipts([records.DeliveredMark("u", "d", "m")], [records.ReadMark("u", "d", ["m", "n"])]),
    records.CreateConversation("rest", "q", "cmd", "c", ConversationType.GROUP, "u", ["u", "v"], ""),
    records.AddParticipants("rest", "q", "cmd", "c", "u", ["w"]),
    records.RemoveParticipant("rest", "q", "cmd", "c", "u", "w"),
    *(
        records.ChangeMessage("gw", 1, "", "u", "d", "c", "m1", "k", "msg_1", change)
        for change in (records.Edit("text"), records.Delete(True), records.React("+1", False))
    ),
    records.Typing("u", "c", True),
    *(
        records.ChangeConversation("rest", "q", "cmd", "c", "u", change)
        for change in (
            records.SetRole("w", Role.ADMIN),
            records.Rename("title"),
            records.Silence("w", 5),
            records.Ban("w"),
            records.Unban("w"),
            records.SetDisappearing(60),
        )
    ),
    records.LookAtAccount("i", "r", "c", "u"),
]
QUERIES: list[records.Query] = [
    records.OpenQuery("gw", 1, "u", "d", {"c": 4}),
    records.PageQuery("gw", 1, "u", "c", 4, 100),
    records.RangeQuery("gw", 1, "u", "c", 4, 9),
    records.HistoryQuery("gw", 1, "u", "c", 9, 50),
    records.HeadsQuery("gw", ["u", "v"]),
    records.PresenceQuery("gw", 1, "u", ["v", "w"]),
]
DOWN: list[records.DownItem] = [
    records.Outcome(1, "k", b"{}"),
    records.Replaced(1),
    records.Delivery("c", 4, 6, ["u"], 0, b"{}"),
    records.Notice(["u"], b"{}"),
    records.OpenAnswer(1, 3, [records.OpenHead("c", 4, 6, bytes(16))]),
    records.OpenAnswer(1, 0, [], AuthErrorCode.REVOKED),
    records.TokenGood(1),
    records.PresenceAnswer(1, [records.Watched("v", UserStatus.OFFLINE, 5)], ["w"]),
    records.PageAnswer(1, "c", 5, 6, False, bytes(16), b"{}"),
    records.Reply(1, b"{}"),
    records.HeadsAnswer([records.UserHead("u", "c", 6)]),
    records.CommandOutcome("q", None, "", b"{}"),
    records.CommandOutcome("q", ErrorCode.GROUP_FULL, "full", b""),
]


@pytest.mark.parametrize("record", INGEST, ids=lambda record: type(record).__name__)
def test_an_ingest_record_comes_back_as_it_went(record: records.IngestRecord) -> None:
    assert codec.decode_ingest(codec.encode_record(record)) == record


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: type(query).__name__)
def test_a_query_comes_back_as_it_went(query: records.Query) -> None:
    assert codec.decode_query(codec.encode_record(query)) == query


def test_a_down_record_holds_many_items_in_order() -> None:
    assert codec.decode_down(codec.encode_down(DOWN)) == DOWN
    assert codec.decode_down(codec.encode_down([])) == []


def test_every_member_of_each_union_is_tried_here() -> None:
    assert {type(record) for record in INGEST} == set(records.IngestRecord.__args__)
    assert {type(query) for query in QUERIES} == set(records.Query.__args__)
    assert {type(item) for item in DOWN} == set(records.DownItem.__args__)


@given(st.binary(max_size=200))
def test_what_is_no_record_says_so(data: bytes) -> None:
    for decode in (codec.decode_ingest, codec.decode_query, codec.decode_down):
        try:
            decode(data)
        except msgspec.DecodeError:
            pass
        else:
            assert data == b"\x90"
            assert decode is codec.decode_down


@given(st.integers(0, 10_000), st.integers(1, 255), st.sampled_from(INGEST))
def test_a_flipped_byte_is_read_or_refused(position: int, mask: int, record: records.IngestRecord) -> None:
    data = bytearray(codec.encode_record(record))
    data[position % len(data)] ^= mask
    with suppress(msgspec.DecodeError):
        codec.decode_ingest(bytes(data))


def test_an_instance_says_what_it_is_in_json() -> None:
    info = records.InstanceInfo("gateway", "ws://127.0.0.1:8765", 3, False)
    assert codec.encode_value(info) == (
        b'{"kind":"gateway","endpoint":"ws://127.0.0.1:8765","load":3,"draining":false}'
    )
    assert codec.decode_instance(codec.encode_value(info)) == info


@pytest.mark.parametrize(
    "signal",
    [records.Revoked("d", 5), records.Tell(msgspec.Raw(b'{"type":"keys_low"}')), records.Tell(msgspec.Raw(b"{}"), "d")],
)
def test_a_signal_comes_back_as_it_went(signal: records.UserSignal) -> None:
    assert codec.decode_signal(codec.encode_value(signal)) == signal


def test_the_presence_that_redis_holds_is_a_change_too() -> None:
    shown = codec.encode_value(Presence(status=UserStatus.ONLINE, last_seen=5))
    assert codec.decode_presence_change(shown) == records.PresenceChange(UserStatus.ONLINE, 5)
