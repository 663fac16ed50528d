"""Streams of the Valkey twin: entries, groups with their pending entries, reading and trimming.

Mixed into `keyspace.Keyspace`. Blocking is the server's affair (`valkey.py`): here a read that finds nothing is None.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from bench.simulation.gaps import NotTwinned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Place = tuple[int, int]
Entry = list[Any]
"""`[id, [field, value]]`; `[id, None]` for one that is pending and gone."""


class Group:
    """How far a consumer group has come, and what its consumers have not acknowledged."""

    __slots__ = ("last", "pending")

    def __init__(self, last: Place) -> None:
        self.last = last
        self.pending: dict[Place, tuple[bytes, int, int]] = {}
        """Entry → the consumer that has it, when it got it last, epoch ms, and how often."""


class Stream:
    """Entries by id, ascending."""

    __slots__ = ("entries", "groups", "last")

    def __init__(self) -> None:
        self.entries: dict[Place, list[bytes]] = {}
        self.last: Place = (0, 0)
        self.groups: dict[bytes, Group] = {}

    def copy(self) -> Stream:
        """Another one that says the same."""
        other = Stream()
        other.entries, other.last = dict(self.entries), self.last
        for name, group in self.groups.items():
            other.groups[name] = Group(group.last)
            other.groups[name].pending = dict(group.pending)
        return other

    def after(self, place: Place, count: int) -> list[Entry]:
        """At most `count` entries behind a place."""
        if place >= self.last:
            return []
        found = []
        for at, fields in self.entries.items():
            if at > place:
                found.append([name_of(at), fields])
                if len(found) == count:
                    break
        return found


class StreamCommands:
    """The X commands. `find`, `make` and `remove` are the keyspace's."""

    values: dict[bytes, Any]
    now_ms: Callable[[], int]
    touched: Callable[[bytes], None]
    trims_roughly: bool

    def find(self, key: bytes, kind: type[Any]) -> Any:
        raise NotTwinned("of the keyspace")

    def make(self, key: bytes, kind: type[Any]) -> Any:
        raise NotTwinned("of the keyspace")

    def do_xadd(self, arguments: list[bytes]) -> bytes | None:
        """XADD key [NOMKSTREAM] [MAXLEN ~ n] * field value. An approximate MAXLEN trims nothing here."""
        key, at = arguments[0], 1
        only_existing = False
        while arguments[at] != b"*":
            if arguments[at] == b"NOMKSTREAM":
                only_existing = True
                at += 1
            elif arguments[at : at + 2] == [b"MAXLEN", b"~"]:
                at += 3
            else:
                raise NotTwinned(f"XADD {arguments[at]!r}")
        stream: Stream | None = self.find(key, Stream)
        if stream is None:
            if only_existing:
                return None
            stream = self.make(key, Stream)
            assert stream is not None
        milliseconds = max(self.now_ms(), stream.last[0])
        stream.last = (milliseconds, stream.last[1] + 1 if milliseconds == stream.last[0] else 0)
        stream.entries[stream.last] = arguments[at + 1 :]
        self.touched(key)
        return name_of(stream.last)

    def do_xlen(self, arguments: list[bytes]) -> int:
        stream = self.find(arguments[0], Stream)
        return 0 if stream is None else len(stream.entries)

    def do_xtrim(self, arguments: list[bytes]) -> int:
        """XTRIM key MINID [~] id."""
        key, how = arguments[0], arguments[1]
        if how != b"MINID":
            raise NotTwinned(f"XTRIM {how!r}")
        stream: Stream | None = self.find(key, Stream)
        if stream is None:
            return 0
        floor = place_of(arguments[-1])
        # Whole nodes only, and the few entries here are one: it goes when nothing of it is to stay.
        if arguments[2] == b"~" and not self.trims_roughly and any(place >= floor for place in stream.entries):
            return 0
        gone = [place for place in stream.entries if place < floor]
        for place in gone:
            del stream.entries[place]
        return len(gone)

    def do_xack(self, arguments: list[bytes]) -> int:
        stream: Stream | None = self.find(arguments[0], Stream)
        group = None if stream is None else stream.groups.get(arguments[1])
        if group is None:
            return 0
        return sum(group.pending.pop(place_of(name), None) is not None for name in arguments[2:])

    def do_xgroup(self, arguments: list[bytes]) -> bytes:
        """XGROUP CREATE key group id MKSTREAM."""
        what, key, group, start, *options = arguments
        if what != b"CREATE" or options != [b"MKSTREAM"]:
            raise NotTwinned(f"XGROUP {what!r} {options!r}")
        stream: Stream = self.make(key, Stream)
        if group in stream.groups:
            raise self.refusal("BUSYGROUP Consumer Group name already exists")
        stream.groups[group] = Group(place_of(start))
        self.touched(key)
        return b"OK"

    def do_xinfo(self, arguments: list[bytes]) -> list[Any]:
        """XINFO GROUPS key."""
        if arguments[0] != b"GROUPS":
            raise NotTwinned(f"XINFO {arguments[0]!r}")
        stream: Stream | None = self.find(arguments[1], Stream)
        if stream is None:
            raise self.refusal("ERR no such key")
        return [
            [b"name", name, b"pending", len(group.pending), b"last-delivered-id", name_of(group.last)]
            for name, group in stream.groups.items()
        ]

    def do_xpending(self, arguments: list[bytes]) -> list[Any]:
        """XPENDING key group [IDLE ms start + count]."""
        key, name, *options = arguments
        stream: Stream | None = self.find(key, Stream)
        group = None if stream is None else stream.groups.get(name)
        if group is None:
            raise self.refusal(f"NOGROUP No such key '{key.decode()}' or consumer group '{name.decode()}'")
        if not options:
            return _summary(group)
        option, idle_ms, start, end, count = options
        if option != b"IDLE" or end != b"+" or start[:1] not in b"-(":
            raise NotTwinned(f"XPENDING {arguments!r}")
        after = (0, -1) if start == b"-" else place_of(start[1:])
        now_ms = self.now_ms()
        idle = [(place, holder, now_ms - at, times) for place, (holder, at, times) in sorted(group.pending.items())]
        found = [
            [name_of(place), holder, age, times]
            for place, holder, age, times in idle
            if age >= int(idle_ms) and place > after
        ]
        return found[: int(count)]

    def do_xrange(self, arguments: list[bytes]) -> list[Entry]:
        """XRANGE key id id: one entry."""
        key, first, last = arguments
        if first != last:
            raise NotTwinned("XRANGE of more than one entry")
        stream: Stream | None = self.find(key, Stream)
        fields = None if stream is None else stream.entries.get(place_of(first))
        return [] if fields is None else [[first, fields]]

    @staticmethod
    def refusal(text: str) -> Exception:
        """An error reply."""
        raise NotTwinned("of the keyspace")

    def read(self, streams: Iterable[tuple[bytes, bytes]], count: int) -> dict[bytes, list[Entry]] | None:
        """XREAD."""
        found = {}
        for key, after in streams:
            stream: Stream | None = self.find(key, Stream)
            if stream is not None and (entries := stream.after(place_of(after), count)):
                found[key] = entries
        return found or None

    def read_group(
        self, group_name: bytes, consumer: bytes, streams: Iterable[tuple[bytes, bytes]], count: int, *, keeps: bool
    ) -> dict[bytes, list[Entry]] | None:
        """XREADGROUP; `keeps`: what is read becomes pending (no NOACK)."""
        found: dict[bytes, list[Entry]] = {}
        wanted = list(streams)
        for key, _ in wanted:  # all of them first: where one is missing, nothing is read
            stream: Stream | None = self.find(key, Stream)
            if stream is None or group_name not in stream.groups:
                raise self.refusal(
                    f"NOGROUP No such key '{key.decode()}' or consumer group '{group_name.decode()}' "
                    "in XREADGROUP with GROUP option"
                )
        for key, after in wanted:
            stream = self.find(key, Stream)
            assert stream is not None
            group = stream.groups[group_name]
            if after != b">":
                found[key] = _pending(stream, group, consumer, place_of(after), count, self.now_ms())
            elif entries := stream.after(group.last, count):
                found[key] = entries
                group.last = place_of(entries[-1][0])
                if keeps:
                    now_ms = self.now_ms()
                    group.pending.update((place_of(entry[0]), (consumer, now_ms, 1)) for entry in entries)
        return found or None


def _summary(group: Group) -> list[Any]:
    """How many are pending, the first and the last of them, and how many each consumer has."""
    if not group.pending:
        return [0, None, None, None]
    held = Counter(holder for holder, _, _ in group.pending.values())
    each = [[holder, b"%d" % count] for holder, count in sorted(held.items())]
    return [len(group.pending), name_of(min(group.pending)), name_of(max(group.pending)), each]


def _pending(stream: Stream, group: Group, consumer: bytes, after: Place, count: int, now_ms: int) -> list[Entry]:
    mine = sorted(place for place, held in group.pending.items() if place > after and held[0] == consumer)
    for place in mine[:count]:
        group.pending[place] = (consumer, now_ms, group.pending[place][2] + 1)
    return [[name_of(place), stream.entries.get(place)] for place in mine[:count]]


def place_of(name: bytes) -> Place:
    """A stream id in its order; `$` is never asked for."""
    milliseconds, _, sequence = name.partition(b"-")
    return int(milliseconds), int(sequence or 0)


def name_of(place: Place) -> bytes:
    """A place as the server writes it."""
    return b"%d-%d" % place
