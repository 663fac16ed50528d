"""`python -m bench e2ee`: people talk through Olm and Megolm on a real system with two gateways, and the server never
sees what they say.

Keys go up and are claimed over HTTP, messages, edits and reactions go over the WebSocket. At the end everything in
MongoDB, Redis and the logs is searched for the plaintexts; a message that was sent unencrypted shows that the search
finds one. Exit status 1 where anything was not as it should be.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
from contextlib import ExitStack, asynccontextmanager
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from bench import figures
from bench.canary import Search, search, tap
from bench.http_api import ApiError, HttpApi, Refusal
from bench.keyring import Keyring, Unreadable
from bench.ledger import Ledger
from bench.phone import PhoneError
from bench.sealed import SealedError, SealedPhone
from bench.services import ServicesError
from bench.stack import Stack, StackError, run_stack
from protocol import frames

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Callable

WAIT_SECONDS: Final = 20.0
RUN_SECONDS: Final = 180.0
GROUP_SIZE: Final = 4
_FAILURES: Final = (ApiError, PhoneError, SealedError)


class NotProvenError(Exception):
    """Something was not as it should be, or not in time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `e2ee`."""
    parser.add_argument("--transport", choices=("epoll", "trio-websocket"), default="epoll")
    parser.add_argument("--data-dir", type=Path, help="keep data and logs of the system there")


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when all was proven, 1 otherwise, 2 when the run could not even start."""
    settings = {"TRIREME_LOG_LEVEL": "debug"}
    try:
        with ExitStack() as exits:
            stack = exits.enter_context(
                run_stack(gateways=2, transport=args.transport, data_dir=args.data_dir, settings=settings)
            )
            directory = args.data_dir or Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="trireme-e2ee-")))
            proven, violations = run(stack, directory / "valkey-commands.log")
    except (StackError, ServicesError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for line in proven:
        print(f"proven: {line}")
    print(f"verdict: {figures.verdict(violations)}")
    return 1 if violations else 0


def run(stack: Stack, commands: Path) -> tuple[list[str], list[str]]:
    """What was proven on this stack, and what not. What goes through Redis meanwhile is written to `commands`."""
    proven: list[str] = []
    violations: list[str] = []
    mark, control = secrets.token_hex(8), secrets.token_hex(8)
    try:
        with tap(stack.redis_url, commands):
            trio.run(_talk, stack, mark, control, proven)
        proven += judge(search(stack, mark, [commands]), search(stack, control, [commands]))
    except NotProvenError as error:
        violations.append(str(error))
    except BaseExceptionGroup as group:
        expected, rest = group.split((NotProvenError, *_FAILURES))
        if rest is not None:
            raise
        violations += [f"{type(error).__name__}: {error}" for error in _leaves(expected)]
    return proven, violations


def _leaves(group: BaseExceptionGroup[Any] | None) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions if group is not None else ():
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def judge(sealed: Search, plain: Search) -> list[str]:
    """What the two searches prove. Raises NotProvenError."""
    places = ", ".join(dict.fromkeys(plain.found))
    # Streams are trimmed: in Redis it may be gone by now, but not from what went through it.
    for kind in ("mongodb", "log valkey-commands"):
        if not any(place.startswith(kind) for place in plain.found):
            raise NotProvenError(f"the search did not find the unencrypted message in {kind}: {places}")
    if sealed.found:
        raise NotProvenError(f"plaintext in {', '.join(dict.fromkeys(sealed.found))}")
    size = f"{sealed.documents} documents, {sealed.keys} keys, {sealed.log_bytes >> 10} KiB of logs and Redis commands"
    return [f"no plaintext in {size}", f"an unencrypted message was found by the same search: {places}"]


async def _talk(stack: Stack, mark: str, control: str, proven: list[str]) -> None:
    with trio.move_on_after(RUN_SECONDS) as scope:
        async with demo(stack, mark) as running:
            proven.append(await running.pair())
            proven.append(await running.reconnect())
            proven.append(await running.group())
            proven.append(await running.removal())
            proven.append(await running.told())
            await running.say_plainly(control)
            proven.append(await running.settle())
    if scope.cancelled_caught:
        raise NotProvenError(f"not done within {RUN_SECONDS:.0f} s")


@asynccontextmanager
async def demo(stack: Stack, mark: str) -> AsyncIterator[Demo]:
    """The phones end with the block."""
    async with HttpApi(stack.rest_url, stack.admin_token) as api, trio.open_nursery() as nursery:
        yield Demo(stack, api, nursery, mark)
        nursery.cancel_scope.cancel()


class Demo:
    """The steps, in the order in which `_talk` takes them; each returns what it has proven or raises NotProvenError."""

    def __init__(self, stack: Stack, api: HttpApi, nursery: trio.Nursery, mark: str) -> None:
        self.ledger = Ledger()
        self._stack = stack
        self._api = api
        self._nursery = nursery
        self._mark = mark
        self._phones: list[SealedPhone] = []
        self._directs: dict[frozenset[str], str] = {}
        self._pair: tuple[SealedPhone, SealedPhone] | None = None
        self._members: list[SealedPhone] = []
        self._group = ""

    # --- two people --------------------------------------------------------------------------------------------------

    async def pair(self) -> str:
        """Two phones at different gateways, both directions, an edit and a reaction."""
        ann, bob = await self._device("Ann"), await self._device("Bob")
        self._pair = ann, bob
        for phone in (ann, bob):
            await phone.publish(self._api)
        [claimed] = await ann.meet(self._api, bob)
        check(not claimed.fallback, "the first claim got the fallback key")
        talk = await self._direct(ann, bob)
        first = [await ann.say(talk, self._text(f"hello {number}"), bob) for number in range(3)]
        await self._all_read(first, ann, bob)
        answer = await bob.say(talk, self._text("hello yourself"), ann)
        await self._all_read([answer], bob, ann)
        later = await ann.say(talk, self._text("how are you"), bob)
        await self._all_read([later], ann, bob)
        kinds = [bob.kind(message_id) for message_id in (first[0], later)] + [ann.kind(answer)]
        check(kinds == [0, 1, 1], f"Olm message kinds {kinds}")
        await ann.edit(talk, first[0], self._text("good morning"), bob)
        await self._all_read(first[:1], ann, bob)
        emoji = f"+1 {self._mark}"
        seen_by_the_server = await bob.react(talk, first[0], emoji)
        check(len(seen_by_the_server) == 64, "the reaction shows how long it is")
        await until(lambda: ann.reactions(first[0]) == {(bob.user_id, emoji)}, "an encrypted reaction")
        return "Olm: two phones at two gateways, both directions, message kinds 0 and 1, an edit and a reaction"

    async def reconnect(self) -> str:
        """Both apps end in between; what was said meanwhile is read afterwards with the sessions from the pickle."""
        assert self._pair is not None
        ann, bob = self._pair
        talk = await self._direct(ann, bob)
        await bob.phone.go_offline()
        missed = [await ann.say(talk, self._text(f"are you there {number}"), bob) for number in range(3)]
        await ann.phone.go_offline()
        for phone in (ann, bob):
            phone.restart()
            phone.phone.go_online()
        for phone in (ann, bob):
            await until(lambda phone=phone: phone.phone.online and phone.phone.client.synced, "online again")  # type: ignore[misc]
        await self._all_read(missed, ann, bob)
        answer = await bob.say(talk, self._text("I am back"), ann)
        await self._all_read([answer], bob, ann)
        answer = await ann.say(talk, self._text("so am I"), bob)
        await self._all_read([answer], ann, bob)
        left = await self._keys_left(bob)
        check(left == 29, f"{left} one-time keys are left, not 29")
        return "Olm: sessions pickled across a reconnect read what was said meanwhile; one one-time key was used"

    # --- a group -----------------------------------------------------------------------------------------------------

    async def group(self) -> str:
        """Everybody shares a Megolm session with everybody, by Olm; then all talk."""
        members = self._members = [await self._device(f"member {number}") for number in range(GROUP_SIZE)]
        for member in members:
            await member.publish(self._api)
        for one, other in combinations(members, 2):
            await self._direct(one, other)
        owner = members[0]
        self._group = await self._api.create_conversation("group", [member.user_id for member in members], owner.token)
        for member in members:
            await member.meet(self._api, *(other for other in members if other is not member))
        await self._share(members)
        for member in members:
            said = await member.say_group(self._group, self._text(f"{member.user_id} is here"))
            await self._all_read([said], member, *members)
        await owner.edit(
            self._group, said := await owner.say_group(self._group, self._text("at noon")), self._text("at one")
        )
        await self._all_read([said], owner, *members)
        emoji = f"ok {self._mark}"
        await members[1].react(self._group, said, emoji)
        for member in members:
            await until(lambda m=member: m.reactions(said) == {(members[1].user_id, emoji)}, "a reaction in the group")  # type: ignore[misc]
        return f"Megolm: {GROUP_SIZE} phones, session keys by Olm, an edit and a reaction"

    async def removal(self) -> str:
        """Who is removed gets neither the next session's key nor the messages, and could not read them.

        The control is a message of the old session: it does not reach them, but they could read it.
        """
        owner, *others, removed = self._members
        refused = await self._api.remove_participant(self._group, removed.user_id, owner.token)
        check(refused is None, f"not removed: {refused}")
        early = await owner.say_group(self._group, self._text("too early"))
        await self._all_read([early], owner, *others)
        removed.keyring.unseal(owner.user_id, others[0].contents[early])
        await self._share([owner, *others])
        secret = await owner.say_group(self._group, self._text("between us"))
        await self._all_read([secret], owner, *others)
        check(not {early, secret} & removed.contents.keys(), "the removed member was sent what followed")
        try:
            removed.keyring.unseal(owner.user_id, others[0].contents[secret])
        except Unreadable:
            pass
        else:
            raise NotProvenError("the removed member can read what followed")
        await removed.phone.go_offline()
        check(not any(phone.unread for phone in self._members), "something was left unread")
        return "Megolm: rotated when a member was removed, who is not sent what follows and cannot read it"

    async def _share(self, members: list[SealedPhone]) -> None:
        """New sessions for all of them, known to all of them."""
        for member in members:
            others = {await self._direct(member, other): other for other in members if other is not member}
            await member.share(self._group, others)

    # --- what the server tells of keys -------------------------------------------------------------------------------

    async def told(self) -> str:
        """`keys_low` to a device that runs out, `identity_changed` to whom its user talks to."""
        assert self._pair is not None
        ann, bob = self._pair
        low = await self._device("Low")
        await low.publish(self._api, 20)
        await ann.meet(self._api, low)
        await until(lambda: _low(low.device_id, 19) in low.heard, "keys_low")
        before = len(ann.heard)
        bob.keyring = Keyring(bob.user_id, bob.device_id)
        await bob.publish(self._api)
        changed = frames.IdentityChangedPayload(user_id=bob.user_id, device_id=bob.device_id, version=2)
        await until(lambda: frames.IdentityChanged(payload=changed) in ann.heard[before:], "identity_changed")
        return "keys_low reached the device that ran out, identity_changed the other side of a reinstalled one"

    # --- the end -----------------------------------------------------------------------------------------------------

    async def say_plainly(self, control: str) -> None:
        """The control of the search: the same way, without encryption."""
        assert self._pair is not None
        ann, bob = self._pair
        settled = await ann.phone.send(await self._direct(ann, bob), f"not encrypted {control}")
        check(not settled.code, f"refused: {settled.code}")

    async def settle(self) -> str:
        """Until every phone that is on has everything; then the ledger judges."""
        await until(self._is_settled, "everything delivered")
        violations = self.ledger.verdict()
        check(not violations, "; ".join(str(violation) for violation in violations[:5]))
        counts = self.ledger.counts
        return f"the ledger is clean: {counts['acked']} acked, {counts['pushed']} delivered"

    def _is_settled(self) -> bool:
        for sealed in self._phones:
            client = sealed.phone.client
            if client.pending or (sealed.phone.wanted and not (sealed.phone.online and client.synced)):
                return False
            if sealed.phone.wanted and any(
                log.cursor != self.ledger.head(name) or log.ahead for name, log in client.logs.items()
            ):
                return False
        return True

    # --- parts -------------------------------------------------------------------------------------------------------

    def _text(self, words: str) -> str:
        return f"{words} {self._mark}"

    async def _device(self, name: str) -> SealedPhone:
        """A new user's phone, online, at the gateways in turn."""
        number = len(self._phones)
        user_id = await self._api.create_user(name)
        token = await self._api.create_token(user_id, "phone-1")
        url = self._stack.ws_urls[number % len(self._stack.ws_urls)]
        sealed = SealedPhone([url], user_id, "phone-1", token, self.ledger.record, number)
        self._phones.append(sealed)
        self._nursery.start_soon(sealed.phone.run)
        await until(lambda: sealed.phone.online and sealed.phone.client.synced, "online")
        return sealed

    async def _direct(self, one: SealedPhone, other: SealedPhone) -> str:
        pair = frozenset((one.user_id, other.user_id))
        if pair not in self._directs:
            names = [one.user_id, other.user_id]
            self._directs[pair] = await self._api.create_conversation("1:1", names, one.token)
            self.ledger.declare_direct(self._directs[pair], (one.user_id, other.user_id))
        return self._directs[pair]

    async def _all_read(self, message_ids: list[str], sender: SealedPhone, *readers: SealedPhone) -> None:
        for message_id in message_ids:
            body = sender.words[message_id].body
            for reader in readers:
                await until(
                    lambda reader=reader, name=message_id, body=body: reader.body(name) == body,  # type: ignore[misc]
                    f"{reader.user_id} reads {message_id}",
                )

    async def _keys_left(self, phone: SealedPhone) -> int:
        answer: Any = await self._api.call("GET", "/v1/keys", phone.token)
        check(not isinstance(answer, Refusal), f"keys: {answer}")
        left: int = answer["items"][0]["one_time_keys"]
        return left


def _low(device_id: str, remaining: int) -> frames.KeysLow:
    return frames.KeysLow(payload=frames.KeysLowPayload(device_id=device_id, remaining=remaining))


def check(condition: bool, what: str) -> None:
    """Raises NotProvenError where it does not hold."""
    if not condition:
        raise NotProvenError(what)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Poll, while the phones go on. Raises NotProvenError."""
    with trio.move_on_after(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110 - it depends on many phones
            await trio.sleep(0.01)
        return
    raise NotProvenError(f"{what}: not within {WAIT_SECONDS:.0f} s")
