"""What a Valkey holds and how commands change it: strings, hashes, lists, sets, sorted sets, expiry.

Called by `valkey.Valkey`, which owns connections, blocking and faults; streams are in `streams.py`. Only what this
project uses is there: anything else raises NotTwinned. Every method is atomic, arguments are bytes, replies
are what RESP3 carries (RESP2 differs in maps only).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from bench.simulation.gaps import NotTwinned
from bench.simulation.streams import Stream, StreamCommands

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OK: Final = b"OK"
WRONG_TYPE: Final = "WRONGTYPE Operation against a key holding the wrong kind of value"

Arguments = list[bytes]


class Refusal(Exception):
    """An error reply; its text is the server's."""


class SortedSet(dict[bytes, float]):
    """Member → score. A type of its own, so that it is no hash."""


class Hash(dict[bytes, bytes]):
    """Field → value, in order of insertion."""


class Members(dict[bytes, None]):
    """A set that keeps its order, so that a run is repeatable."""


class Keyspace(StreamCommands):
    """All keys of one server. `now_ms` is the server's wall clock; `touched` hears of every key that was changed."""

    def __init__(self, now_ms: Callable[[], int], touched: Callable[[bytes], None]) -> None:
        self.now_ms = now_ms
        self.touched = touched
        self.values: dict[bytes, Any] = {}
        self.expires: dict[bytes, int] = {}
        self.trims_roughly = False
        """Whether an approximate trim removes anything: the server may, or may not."""
        self._commands: dict[bytes, Callable[[Arguments], Any]] = {
            name.removeprefix("do_").replace("_", " ").upper().encode(): getattr(self, name)
            for name in dir(self)
            if name.startswith("do_")
        }

    def execute(self, name: bytes, arguments: Arguments) -> Any:
        """One command that neither blocks nor concerns a connection. Raises Refusal."""
        command = self._commands.get(name)
        if command is None:
            raise NotTwinned(f"the twin of Valkey knows no {name.decode()}")
        return command(arguments)

    def flush(self) -> None:
        """FLUSHALL."""
        self.values.clear()
        self.expires.clear()

    # --- keys --------------------------------------------------------------------------------------------------------

    def find(self, key: bytes, kind: type[Any]) -> Any:
        """The live value of a key, None where there is none. Raises Refusal for one of another kind."""
        value = self.values.get(key)
        if value is None:
            return None
        if key in self.expires and self.expires[key] <= self.now_ms():
            self.remove(key)
            return None
        if type(value) is not kind:
            raise Refusal(WRONG_TYPE)
        return value

    def make(self, key: bytes, kind: type[Any]) -> Any:
        """The live value of a key, made empty where there is none."""
        value = self.find(key, kind)
        if value is None:
            value = self.values[key] = kind()
        return value

    def alive(self, key: bytes) -> bool:
        """Is there anything under this key?"""
        value = self.values.get(key)
        return value is not None and self.find(key, type(value)) is not None

    def remove(self, key: bytes) -> bool:
        """Take a key away; False where there was none."""
        self.expires.pop(key, None)
        if self.values.pop(key, None) is None:
            return False
        self.touched(key)
        return True

    def _tidy(self, key: bytes, value: Any) -> None:
        """A collection that is empty is no key any more."""
        if not value:
            self.expires.pop(key, None)
            self.values.pop(key, None)

    def do_del(self, keys: Arguments) -> int:
        return sum(self.alive(key) and self.remove(key) for key in keys)

    def do_exists(self, keys: Arguments) -> int:
        return sum(self.alive(key) for key in keys)

    def do_expire(self, arguments: Arguments) -> int:
        key, seconds = arguments
        if not self.alive(key):
            return 0
        self.expires[key] = self.now_ms() + int(seconds) * 1000
        self.touched(key)
        return 1

    def do_pttl(self, arguments: Arguments) -> int:
        (key,) = arguments
        if not self.alive(key):
            return -2
        return self.expires[key] - self.now_ms() if key in self.expires else -1

    # --- strings -----------------------------------------------------------------------------------------------------

    def do_get(self, arguments: Arguments) -> bytes | None:
        found: bytes | None = self.find(arguments[0], bytes)
        return found

    def do_mget(self, keys: Arguments) -> list[bytes | None]:
        return [self.find(key, bytes) if type(self.values.get(key)) is bytes else None for key in keys]

    def do_getdel(self, arguments: Arguments) -> bytes | None:
        found = self.do_get(arguments)
        if found is not None:
            self.remove(arguments[0])
        return found

    def do_set(self, arguments: Arguments) -> bytes | None:
        key, value = arguments[0], arguments[1]
        lifetime_ms, only_new, wants_old = 0, False, False
        options = iter(arguments[2:])
        for option in options:
            match option.upper():
                case b"NX":
                    only_new = True
                case b"GET":
                    wants_old = True
                case b"PX":
                    lifetime_ms = int(next(options))
                case b"EX":
                    lifetime_ms = int(next(options)) * 1000
                case _:
                    raise NotTwinned(f"SET {option!r}")
        old = self.find(key, bytes) if wants_old else None
        if only_new and self.alive(key):
            return old if wants_old else None
        self.values[key] = value
        self.expires.pop(key, None)
        if lifetime_ms:
            self.expires[key] = self.now_ms() + lifetime_ms
        self.touched(key)
        return old if wants_old else OK

    def do_incr(self, arguments: Arguments) -> int:
        (key,) = arguments
        number = int(self.find(key, bytes) or b"0") + 1
        self.values[key] = b"%d" % number
        self.touched(key)
        return number

    # --- hashes ------------------------------------------------------------------------------------------------------

    def do_hget(self, arguments: Arguments) -> bytes | None:
        return (self.find(arguments[0], Hash) or {}).get(arguments[1])

    def do_hset(self, arguments: Arguments) -> int:
        fields = self.make(arguments[0], Hash)
        before = len(fields)
        for at in range(1, len(arguments), 2):
            fields[arguments[at]] = arguments[at + 1]
        self.touched(arguments[0])
        return len(fields) - before

    def do_hsetnx(self, arguments: Arguments) -> int:
        key, field, value = arguments
        fields = self.make(key, Hash)
        if field in fields:
            return 0
        fields[field] = value
        self.touched(key)
        return 1

    def do_hdel(self, arguments: Arguments) -> int:
        fields = self.find(arguments[0], Hash)
        if fields is None:
            return 0
        gone = sum(fields.pop(field, None) is not None for field in arguments[1:])
        if gone:
            self.touched(arguments[0])
        self._tidy(arguments[0], fields)
        return gone

    def do_hincrby(self, arguments: Arguments) -> int:
        fields = self.make(arguments[0], Hash)
        number = int(fields.get(arguments[1], b"0")) + int(arguments[2])
        fields[arguments[1]] = b"%d" % number
        self.touched(arguments[0])
        return number

    def do_hlen(self, arguments: Arguments) -> int:
        return len(self.find(arguments[0], Hash) or ())

    def do_hvals(self, arguments: Arguments) -> list[bytes]:
        return list((self.find(arguments[0], Hash) or {}).values())

    def do_hkeys(self, arguments: Arguments) -> list[bytes]:
        return list(self.find(arguments[0], Hash) or ())

    def do_hgetall(self, arguments: Arguments) -> dict[bytes, bytes]:
        return dict(self.find(arguments[0], Hash) or {})

    # --- sets --------------------------------------------------------------------------------------------------------

    def do_sadd(self, arguments: Arguments) -> int:
        members = self.make(arguments[0], Members)
        before = len(members)
        members.update(dict.fromkeys(arguments[1:]))
        if len(members) > before:
            self.touched(arguments[0])
        return len(members) - before

    def do_srem(self, arguments: Arguments) -> int:
        members = self.find(arguments[0], Members)
        if members is None:
            return 0
        gone = 0
        for member in arguments[1:]:
            if member in members:
                del members[member]
                gone += 1
        if gone:
            self.touched(arguments[0])
        self._tidy(arguments[0], members)
        return gone

    def do_smembers(self, arguments: Arguments) -> list[bytes]:
        return list(self.find(arguments[0], Members) or ())

    def do_scard(self, arguments: Arguments) -> int:
        return len(self.find(arguments[0], Members) or ())

    def do_srandmember(self, arguments: Arguments) -> list[bytes]:
        """Any of them: the first, so that a run is repeatable."""
        return list(self.find(arguments[0], Members) or ())[: int(arguments[1])]

    # --- sorted sets -------------------------------------------------------------------------------------------------

    def do_zadd(self, arguments: Arguments) -> int:
        scores = self.make(arguments[0], SortedSet)
        before = len(scores)
        only_new = arguments[1] == b"NX"
        for at in range(1 + only_new, len(arguments), 2):
            if not only_new or arguments[at + 1] not in scores:
                scores[arguments[at + 1]] = float(arguments[at])
        self.touched(arguments[0])
        return len(scores) - before

    def do_zrem(self, arguments: Arguments) -> int:
        scores = self.find(arguments[0], SortedSet)
        gone = [member for member in arguments[1:] if scores and scores.pop(member, None) is not None]
        if gone:
            self.touched(arguments[0])
            self._tidy(arguments[0], scores)
        return len(gone)

    def do_zscore(self, arguments: Arguments) -> float | None:
        score: float | None = (self.find(arguments[0], SortedSet) or {}).get(arguments[1])
        return score

    def do_zrangebyscore(self, arguments: Arguments) -> list[bytes]:
        """From the lowest to a score, so many."""
        key, lowest, highest, limit, start, count = arguments
        assert (lowest, limit, start) == (b"-inf", b"LIMIT", b"0"), "no more is twinned"
        inside = [pair for pair in (self.find(key, SortedSet) or {}).items() if pair[1] <= float(highest)]
        inside.sort(key=lambda item: (item[1], item[0]))
        return [member for member, _ in inside[: int(count)]]

    def do_zremrangebyrank(self, arguments: Arguments) -> int:
        """From the lowest to a rank counted from the highest."""
        key, start, stop = arguments
        assert start == b"0", "no more is twinned"
        scores = self.find(key, SortedSet) or {}
        ranked = sorted(scores, key=lambda member: (scores[member], member))
        gone = ranked[: len(ranked) + int(stop) + 1] if int(stop) < 0 else ranked[: int(stop) + 1]
        return self.do_zrem([key, *gone]) if gone else 0

    def do_zcard(self, arguments: Arguments) -> int:
        return len(self.find(arguments[0], SortedSet) or ())

    def do_zpopmin(self, arguments: Arguments) -> list[tuple[bytes, float]]:
        scores = self.find(arguments[0], SortedSet)
        if scores is None:
            return []
        taken = sorted(scores.items(), key=lambda item: (item[1], item[0]))[: int(arguments[1])]
        for member, _ in taken:
            del scores[member]
        self.touched(arguments[0])
        self._tidy(arguments[0], scores)
        return taken

    # --- lists -------------------------------------------------------------------------------------------------------

    def do_rpush(self, arguments: Arguments) -> int:
        items = self.make(arguments[0], list)
        items += arguments[1:]
        self.touched(arguments[0])
        return len(items)

    def do_ltrim(self, arguments: Arguments) -> bytes:
        items = self.find(arguments[0], list)
        if items is not None:
            items[:] = _between(items, arguments[1], arguments[2])
            self.touched(arguments[0])
            self._tidy(arguments[0], items)
        return OK

    def do_lrange(self, arguments: Arguments) -> list[bytes]:
        return list(_between(self.find(arguments[0], list) or [], arguments[1], arguments[2]))

    def do_lrem(self, arguments: Arguments) -> int:
        key, count, value = arguments
        items = self.find(key, list)
        if items is None or value not in items:
            return 0
        if int(count) != 1:
            raise NotTwinned("LREM of any number but one from the head")
        items.remove(value)
        self.touched(key)
        self._tidy(key, items)
        return 1

    # --- the server --------------------------------------------------------------------------------------------------

    def do_ping(self, _arguments: Arguments) -> bytes:
        return b"PONG"

    def do_config(self, arguments: Arguments) -> dict[bytes, bytes]:
        if [word.lower() for word in arguments] != [b"get", b"maxmemory-policy"]:
            raise NotTwinned("CONFIG of anything but maxmemory-policy")
        return {b"maxmemory-policy": b"noeviction"}

    def copy(self) -> tuple[dict[bytes, Any], dict[bytes, int]]:
        """All there is, for a server that comes back with what it had then."""
        return {key: _copied(value) for key, value in self.values.items()}, dict(self.expires)

    def restore(self, copy: tuple[dict[bytes, Any], dict[bytes, int]]) -> None:
        """Back to what `copy` said."""
        self.values = {key: _copied(value) for key, value in copy[0].items()}
        self.expires = dict(copy[1])


def _copied(value: Any) -> Any:
    if isinstance(value, Stream):
        return value.copy()
    return value if isinstance(value, bytes) else type(value)(value)


def _between(items: Sequence[bytes], first: bytes, last: bytes) -> Sequence[bytes]:
    """LRANGE's view: both ends included, negative ones counted from the end."""
    start, end = int(first), int(last)
    start = max(0, start + len(items)) if start < 0 else start
    end = end + len(items) if end < 0 else end
    return items[start : end + 1]
