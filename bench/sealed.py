"""A simulated phone whose user's words leave it encrypted only: `phone.Phone` with a `keyring.Keyring`.

Called by `e2ee`. What the others said is read as it comes in, also where the key for it comes later.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import msgspec

from bench import folds, journal
from bench.http_api import Refusal
from bench.keyring import Claimed, Keyring, Unreadable, new_reaction_key, seal_reaction, unseal_reaction
from bench.phone import FrameCache, Phone
from protocol import frames
from protocol.models import EventKind, MessageType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.http_api import HttpApi
    from protocol.models import StoredMessage

ONE_TIME_KEYS: Final = 30


class SealedError(Exception):
    """The server refused something it should not."""


class Words(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is encrypted. `reaction_key`: for reactions to it. `session_key`: of the sender's messages to a group."""

    body: str = ""
    reaction_key: str = ""
    session_key: str = ""


_read_words = msgspec.json.Decoder(Words).decode


class _Ear(FrameCache):
    """Hears the frames that are for the device itself on their way to the client."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[frames.KeysLow | frames.IdentityChanged] = []

    def decode(self, text: str) -> frames.ServerFrame:
        frame = super().decode(text)
        if isinstance(frame, frames.KeysLow | frames.IdentityChanged):
            self.heard.append(frame)
        return frame


class SealedPhone:
    """One device of one user. `words` holds what it has read and said, by message id, edits applied."""

    def __init__(
        self, urls: Sequence[str], user_id: str, device_id: str, token: str, record: journal.Journal, seed: int
    ) -> None:
        self.user_id = user_id
        self.device_id = device_id
        self.token = token
        self.keyring = Keyring(user_id, device_id)
        self.words: dict[str, Words] = {}
        self.contents: dict[str, str] = {}
        """Message id → what the server delivered, for a look by somebody who should not be able to read it."""
        self.unread: dict[str, tuple[str, str]] = {}
        """Message id → sender and content that this device cannot read (yet)."""
        self._reactions: dict[str, set[tuple[str, str]]] = {}
        self._record = record
        self._ear = _Ear()
        self.phone = Phone(urls, user_id, device_id, token, self._note, cache=self._ear, seed=seed)

    @property
    def heard(self) -> list[frames.KeysLow | frames.IdentityChanged]:
        """Frames about keys, as they came."""
        return self._ear.heard

    # --- keys --------------------------------------------------------------------------------------------------------

    async def publish(self, api: HttpApi, one_time_keys: int = ONE_TIME_KEYS) -> None:
        """Upload the identity, a fallback key and so many one-time keys."""
        path = f"/v1/keys/{self.device_id}"
        for method, end, body in (
            ("PUT", path, self.keyring.identity()),
            ("POST", f"{path}/one-time", self.keyring.one_time_keys(one_time_keys)),
        ):
            answer = await api.call(method, end, self.token, body)
            if isinstance(answer, Refusal):
                raise SealedError(f"{end}: {answer.code.value} {answer.message}")
        self.keyring.published()

    async def meet(self, api: HttpApi, *others: SealedPhone) -> list[Claimed]:
        """Claim a key of each of these devices and begin a session with it."""
        body = {"devices": [{"user_id": other.user_id, "device_id": other.device_id} for other in others]}
        answer = await api.call("POST", "/v1/keys/claim", self.token, body)
        if isinstance(answer, Refusal):
            raise SealedError(f"claim: {answer.code.value} {answer.message}")
        claimed = msgspec.convert(answer["items"], list[Claimed])
        for each in claimed:
            self.keyring.meet(each)
        return claimed

    def restart(self) -> None:
        """The app ends and starts again: what it knows is what it had pickled."""
        key = os.urandom(32)
        self.keyring = Keyring.from_pickle(self.keyring.pickle(key), key)

    # --- what is said ------------------------------------------------------------------------------------------------

    async def say(self, conversation_id: str, body: str, *others: SealedPhone) -> str:
        """A message for these devices, by Olm. Returns its id."""
        words = Words(body=body, reaction_key=new_reaction_key())
        return await self._send(conversation_id, words, self._seal(words, others))

    async def say_group(self, conversation_id: str, body: str) -> str:
        """A message for whoever has this device's session key, by Megolm. Returns its id."""
        words = Words(body=body, reaction_key=new_reaction_key())
        return await self._send(conversation_id, words, self._seal_group(conversation_id, words))

    async def share(self, group_id: str, others: dict[str, SealedPhone]) -> None:
        """Begin a new session for a group and give its key to these: 1:1 conversation → device."""
        session_key = self.keyring.rotate(group_id)
        for conversation_id, other in others.items():
            words = Words(session_key=session_key)
            await self._send(conversation_id, words, self._seal(words, [other]))

    async def edit(self, conversation_id: str, message_id: str, body: str, *others: SealedPhone) -> None:
        """Say it otherwise: by Olm to these devices, or by Megolm where none are named."""
        words = msgspec.structs.replace(self.words[message_id], body=body)
        content = self._seal(words, others) if others else self._seal_group(conversation_id, words)
        await self._settle(await self.phone.edit_nowait(conversation_id, message_id, content))
        self.words[message_id] = words

    async def react(self, conversation_id: str, message_id: str, emoji: str) -> str:
        """React so that only readers of the message see how. Returns what the server saw."""
        sealed = seal_reaction(self.words[message_id].reaction_key, emoji)
        key = await self.phone.react_nowait(conversation_id, message_id, sealed, frames.ReactionOp.ADD)
        await self._settle(key)
        self._reactions.setdefault(message_id, set()).add((self.user_id, sealed))
        return sealed

    def reactions(self, message_id: str) -> set[tuple[str, str]]:
        """(user, emoji) of every reaction to a message that this device reads."""
        key = self.words[message_id].reaction_key
        return {(user_id, unseal_reaction(key, sealed)) for user_id, sealed in self._reactions.get(message_id, ())}

    def _seal(self, words: Words, others: Sequence[SealedPhone]) -> str:
        return self.keyring.seal(msgspec.json.encode(words), *(other.keyring.name for other in others))

    def _seal_group(self, conversation_id: str, words: Words) -> str:
        return self.keyring.seal_group(conversation_id, msgspec.json.encode(words))

    async def _send(self, conversation_id: str, words: Words, content: str) -> str:
        message_id = await self._settle(await self.phone.send_nowait(conversation_id, content))
        self.words[message_id] = words
        return message_id

    async def _settle(self, key: str) -> str:
        settled = await self.phone.settled(key)
        if settled.code:
            raise SealedError(f"{self.user_id}: {settled.code}")
        return settled.message_id

    # --- what is known ------------------------------------------------------------------------------------------------

    def body(self, message_id: str) -> str:
        """What a message says by now; "" while it cannot be read."""
        words = self.words.get(message_id)
        return "" if words is None else words.body

    def kind(self, message_id: str) -> int:
        """Of the Olm message that came for this device: 0 opens a session, 1 goes on in it."""
        return self.keyring.kind(self.contents[message_id])

    # --- what is read ------------------------------------------------------------------------------------------------

    def _note(self, event: journal.Event) -> None:
        self._record(event)
        if isinstance(event, journal.Pushed):
            for message in event.payload.messages:
                self._take(message)

    def _take(self, message: StoredMessage) -> None:
        message_id = message.message_id if isinstance(message.message_id, str) else ""
        change = folds.system_event(message)
        if change is None:
            self._reactions.setdefault(message_id, set()).update(folds.reactions_of(message))
            if message.message_type is not MessageType.SYSTEM:
                self._take_content(message_id, message.sender_id, message.content)
            return
        target = folds.target_of(message, change)
        if change.event is EventKind.EDITED and isinstance(change.content, str):
            self._take_content(target, change.actor, change.content)
        elif change.event is EventKind.REACTED and isinstance(change.emoji, str):
            self._reactions.setdefault(target, set()).add((change.actor, change.emoji))

    def _take_content(self, message_id: str, sender_id: str, content: str) -> None:
        known = message_id in self.words and self.contents.get(message_id) == content
        if not content or sender_id == self.user_id or known:
            return
        self.contents[message_id] = content
        try:
            words = _read_words(self.keyring.unseal(sender_id, content))
        except Unreadable:
            self.unread[message_id] = (sender_id, content)
            return
        self.unread.pop(message_id, None)
        self.words[message_id] = words
        if words.session_key:
            self.keyring.learn(words.session_key)
            for waiting, (sender, sealed) in list(self.unread.items()):
                self._take_content(waiting, sender, sealed)
