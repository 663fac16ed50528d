"""What people do in a world: two conversations, four devices of three users, bursts of messages, and what an owner does
to a group over REST.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import trio

from bench.simulation.network import EPOCH_MS
from bench.simulation.phones import Phone
from protocol import dev_keys, keys, records
from protocol.errors import ErrorCode
from protocol.models import ConversationType, MessageType
from protocol.watermarks import content_hash
from workers.audit.history import Send, Unread
from workers.tokens import Tokens

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from bench.journal import Journal
    from bench.simulation.network import Network
    from bench.simulation.processes import House

ANN, BOB, CAT = "usr_ann", "usr_bob", "usr_cat"
GROUP: Final = "conv_group"
DIRECT: Final = keys.direct_conversation_id(ANN, BOB)
ASIDE: Final = keys.direct_conversation_id(BOB, CAT)
"""Where Cat speaks. In the group, where she comes and goes, she only listens: whether a message of hers there is
refused would depend on how long a copy of it was under way."""
_SPEAKS: Final = {ANN: (GROUP, DIRECT), BOB: (GROUP, DIRECT, ASIDE), CAT: (ASIDE,)}
DEVICES: Final = ((ANN, "ann1"), (BOB, "bob1"), (CAT, "cat1"), (ANN, "ann2"))
MESSAGES: Final = 12
ANNOUNCEMENTS: Final = 8
START_SECONDS: Final = 12.0


@lru_cache(maxsize=16)
def token(user_id: str, device_id: str) -> str:
    """Good for the whole run of any world."""
    return Tokens(dev_keys.PRIVATE_JWK).sign(user_id, device_id, EPOCH_MS - 1000, 86_400, "jti")[0]


class Workload:
    """People and what they do; all of it from the seed."""

    def __init__(self, network: Network, house: House, record: Journal, rng: random.Random) -> None:
        self._network = network
        self._house = house
        self._rng = rng
        self._said = 0
        self._commands = 0
        self._requests = 0
        self.announced: list[Send] = []
        """What was said once, by no phone."""
        self.done = False
        """Everything that was to be done has been asked for, and REST has its outcomes."""
        self.phones = [
            Phone(network, user_id, device_id, token(user_id, device_id), record, house.doors)
            for user_id, device_id in DEVICES
        ]

    @property
    def counts(self) -> list[Unread]:
        """What the phones were told of unread messages."""
        return [count for phone in self.phones for count in phone.counts]

    async def begin(self, nursery: trio.Nursery) -> None:
        """Make the conversations while everything is well."""
        await trio.sleep(0.3)
        for phone in self.phones:
            self._network.at(0.4 * self._rng.random(), None, phone.dial)
        with trio.fail_after(START_SECONDS):
            await self._create(DIRECT, ConversationType.ONE_TO_ONE, [ANN, BOB])
            await self._create(ASIDE, ConversationType.ONE_TO_ONE, [BOB, CAT])
            await self._create(GROUP, ConversationType.GROUP, [ANN, BOB])

    async def _create(self, conversation_id: str, kind: ConversationType, people: list[str]) -> None:
        name = self._name()
        title = "four" if kind is ConversationType.GROUP else ""
        await self._decide(
            lambda request: records.CreateConversation(
                "rest_1", request, name, conversation_id, kind, people[0], people, "", title
            )
        )

    async def run(self, ends: float) -> None:
        """Talk until then."""
        rng = self._rng
        begins = self._network.now
        times = sorted(begins + rng.random() * (ends - begins) for _ in range(MESSAGES))
        for at in times:
            # Some come in bursts: what is written quickly travels in one batch.
            for _ in range(1 if rng.random() < 0.7 else 3):
                self._network.at_time(at, None, self._say, rng.choice(self.phones))
        for _ in range(rng.randint(1, 4)):
            self._network.at_time(begins + rng.random() * (ends - begins), None, self._read, rng.choice(self.phones))
        async with trio.open_nursery() as nursery:
            for _ in range(ANNOUNCEMENTS):
                nursery.start_soon(self._announce, begins + rng.random() * (ends - begins))
            for at in sorted(begins + rng.random() * (ends - begins) for _ in range(rng.randint(2, 5))):
                await trio.sleep_until(at)
                nursery.start_soon(self._command)
        await trio.sleep_until(ends)
        self.done = True

    def stir(self, seconds: float) -> None:
        """Everybody has something to say within so many seconds."""
        for phone in self.phones:
            self._network.at(self._rng.random() * seconds, None, self._say, phone)

    def speak_last(self) -> None:
        """One more message in each conversation: whoever owns it now looks at it once more."""
        for phone, conversation_id in zip(self.phones, (GROUP, DIRECT, ASIDE), strict=False):
            self._said += 1
            phone.say(conversation_id, f"message {self._said}, the last")

    def _say(self, phone: Phone) -> None:
        self._said += 1
        user_id = phone.client.user_id
        conversation_id = self._rng.choice(_SPEAKS[user_id])
        phone.say(conversation_id, f"message {self._said} of {user_id}")

    async def _announce(self, at: float) -> None:
        """A message that nobody repeats: whoever appended it has only the stream's word for it."""
        await trio.sleep_until(at)
        self._said += 1
        content = f"announcement {self._said}"
        record = records.SendMessage(
            "", 0, BOB, "", DIRECT, "", f"once-{self._said}", "", content, MessageType.TEXT, None, None, EPOCH_MS
        )
        self.announced.append(
            Send(
                t=self._network.now,
                user=BOB,
                dev="rest",
                conv=DIRECT,
                key=record.idempotency_key,
                payload_sha=content_hash(content).hex(),
            )
        )
        await self._house.append(record)

    def _read(self, phone: Phone) -> None:
        phone.read(self._rng.choice((GROUP, *_SPEAKS[phone.client.user_id])))

    async def _command(self) -> None:
        name = self._name()
        match self._rng.randrange(4):
            case 0 | 1:
                await self._decide(lambda request: records.AddParticipants("rest_1", request, name, GROUP, ANN, [CAT]))
            case 2:
                await self._decide(lambda request: records.RemoveParticipant("rest_1", request, name, GROUP, ANN, CAT))
            case _:
                await self._decide(
                    lambda request: records.ChangeConversation(
                        "rest_1", request, name, GROUP, ANN, records.Rename(f"title {name}")
                    )
                )

    def _name(self) -> str:
        self._commands += 1
        return f"cmd_{self._commands}"

    async def _decide(self, build: Callable[[str], records.GroupCommand]) -> None:
        """Ask until there is an answer, each time as another request for the same thing."""
        while True:
            self._requests += 1
            record = build(f"req_{self._requests}")
            outcome = await self._house.command(record)
            if outcome is not None and outcome.code not in (ErrorCode.STORAGE_UNAVAILABLE, ErrorCode.OVERLOADED):
                self._network.note("rest", record.command_id, outcome.code or "done")
                return
            await trio.sleep(0.2)
