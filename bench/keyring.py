"""The keys of one simulated device: Olm sessions with other devices, Megolm sessions of groups. No network, no clock.

Called by `sealed.SealedPhone`. The cryptography is vodozemac's; here is only what is kept where. `pickle` and
`from_pickle` are what an app does between two starts.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Any, Final

import msgspec
import vodozemac
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from protocol.prekeys import Purpose, SignedKey, signed_bytes

REACTION_BYTES: Final = 32
"""Every emoji is padded to this: with the 16 bytes of its tag it fills the 64 characters of a reaction."""


class Unreadable(Exception):
    """This device has no key for it."""


class Envelope(msgspec.Struct, frozen=True):
    """One Olm message for one device. `kind` 0 opens a session, 1 goes on in it."""

    kind: int
    body: str


class Sealed(msgspec.Struct, frozen=True, omit_defaults=True):
    """`content` of an encrypted message: per device (`user:device`) an Olm envelope, or one Megolm body for a group."""

    sender: str
    sender_key: str
    envelopes: dict[str, Envelope] = {}
    session: str = ""
    body: str = ""


_seal = msgspec.json.Encoder().encode
_unseal = msgspec.json.Decoder(Sealed).decode


class Claimed(msgspec.Struct, frozen=True):
    """What the server says of another device (`POST /v1/keys/claim`)."""

    user_id: str
    device_id: str
    identity_key: str
    signing_key: str
    key: SignedKey
    fallback: bool

    @property
    def name(self) -> str:
        """How envelopes name the device."""
        return f"{self.user_id}:{self.device_id}"


class Keyring:
    """One device. `seal` and `unseal` make and read the `content` of messages."""

    def __init__(self, user_id: str, device_id: str) -> None:
        self.user_id = user_id
        self.device_id = device_id
        self.name = f"{user_id}:{device_id}"
        self._account = vodozemac.Account()
        self._sessions: dict[str, list[vodozemac.Session]] = {}
        """By device; the one that worked last comes first."""
        self._identities: dict[str, str] = {}
        self._outbound: dict[str, vodozemac.GroupSession] = {}
        self._inbound: dict[str, vodozemac.InboundGroupSession] = {}
        self._opened: dict[str, bytes] = {}
        """Content → plaintext: a ratchet reads a message once, and an edited message is seen in two places."""

    # --- for the server ----------------------------------------------------------------------------------------------

    @property
    def identity_key(self) -> str:
        return self._account.curve25519_key.to_base64()

    def identity(self) -> dict[str, Any]:
        """Body of `PUT /v1/keys/{device_id}`."""
        self._account.generate_fallback_key()  # type: ignore[attr-defined]  # not in the library's stubs
        fallback = self._account.fallback_key  # type: ignore[attr-defined]  # as above
        [(key_id, key)] = fallback.items()
        return {
            "identity_key": self.identity_key,
            "signing_key": self._account.ed25519_key.to_base64(),
            "fallback_key": self._signed(Purpose.FALLBACK, key_id, key),
        }

    def one_time_keys(self, count: int) -> dict[str, Any]:
        """Body of `POST /v1/keys/{device_id}/one-time`."""
        self._account.generate_one_time_keys(count)
        keys = self._account.one_time_keys
        return {"keys": [self._signed(Purpose.ONE_TIME, key_id, key) for key_id, key in keys.items()]}

    def published(self) -> None:
        """The server has them: they are not uploaded again."""
        self._account.mark_keys_as_published()

    def _signed(self, purpose: Purpose, key_id: str, key: vodozemac.Curve25519PublicKey) -> dict[str, str]:
        text = signed_bytes(self.user_id, self.device_id, self.identity_key, purpose, key_id, key.to_base64())
        signature = self._account.sign(text).to_base64()
        return {"key_id": key_id, "key": key.to_base64(), "signature": signature}

    # --- device to device --------------------------------------------------------------------------------------------

    def meet(self, claimed: Claimed) -> None:
        """Begin a session with a claimed device. Raises ValueError where its signature is not right."""
        purpose = Purpose.FALLBACK if claimed.fallback else Purpose.ONE_TIME
        key = claimed.key
        text = signed_bytes(claimed.user_id, claimed.device_id, claimed.identity_key, purpose, key.key_id, key.key)
        signer = vodozemac.Ed25519PublicKey.from_base64(claimed.signing_key)
        signer.verify_signature(text, vodozemac.Ed25519Signature.from_base64(key.signature))
        session = self._account.create_outbound_session(
            vodozemac.Curve25519PublicKey.from_base64(claimed.identity_key),
            vodozemac.Curve25519PublicKey.from_base64(key.key),
        )
        self._identities[claimed.name] = claimed.identity_key
        self._sessions.setdefault(claimed.name, []).insert(0, session)

    def knows(self, name: str) -> bool:
        """Is there a session with this device?"""
        return bool(self._sessions.get(name))

    def seal(self, plaintext: bytes, *names: str) -> str:
        """Content that these devices can read. Raises KeyError for one never met."""
        envelopes = {}
        for name in names:
            kind, body = self._sessions[name][0].encrypt(plaintext).to_parts()
            envelopes[name] = Envelope(kind, b64encode(body).decode())
        return _seal(Sealed(self.name, self.identity_key, envelopes)).decode()

    def unseal(self, sender_id: str, content: str) -> bytes:
        """The plaintext of a content from this user, whichever way it was sealed. Raises Unreadable."""
        plaintext = self._opened.get(content)
        if plaintext is None:
            try:
                sealed = _unseal(content)
            except msgspec.DecodeError as error:
                raise Unreadable("not sealed at all") from error
            if sealed.sender.partition(":")[0] != sender_id:
                raise Unreadable("the sender is somebody else")
            plaintext = self._open_group(sealed) if sealed.session else self._open(sealed)
            self._opened[content] = plaintext
        return plaintext

    def kind(self, content: str) -> int:
        """Of the envelope for this device: 0 opens a session, 1 goes on in it. Raises KeyError where there is none."""
        return _unseal(content).envelopes[self.name].kind

    def _open(self, sealed: Sealed) -> bytes:
        envelope = sealed.envelopes.get(self.name)
        if envelope is None:
            raise Unreadable("not for this device")
        if self._identities.setdefault(sealed.sender, sealed.sender_key) != sealed.sender_key:
            raise Unreadable("the sender's identity is another one by now")
        message = vodozemac.AnyOlmMessage.from_parts(envelope.kind, b64decode(envelope.body))
        sessions = self._sessions.setdefault(sealed.sender, [])
        opening = message.to_pre_key()
        for session in sessions:
            if opening is not None and not session.session_matches(opening):
                continue
            try:
                plaintext = session.decrypt(message)
            except vodozemac.OlmDecryptionException:
                continue
            sessions.remove(session)
            sessions.insert(0, session)
            return plaintext
        if opening is None:
            raise Unreadable("no session reads it")
        try:
            sender_key = vodozemac.Curve25519PublicKey.from_base64(sealed.sender_key)
            session, plaintext = self._account.create_inbound_session(sender_key, opening)
        except vodozemac.SessionCreationException as error:
            raise Unreadable("its one-time key is not there") from error
        sessions.insert(0, session)
        return plaintext

    # --- groups ------------------------------------------------------------------------------------------------------

    def rotate(self, conversation_id: str) -> str:
        """A new outbound session for a group; its key, for those who are to read what follows."""
        session = self._outbound[conversation_id] = vodozemac.GroupSession()
        return session.session_key.to_base64()

    def learn(self, session_key: str) -> None:
        """Somebody's session key: their messages from here on can be read."""
        session = vodozemac.InboundGroupSession(vodozemac.SessionKey(session_key))
        self._inbound[session.session_id] = session

    def seal_group(self, conversation_id: str, plaintext: bytes) -> str:
        """Content for a group. Raises KeyError before the first `rotate`."""
        session = self._outbound[conversation_id]
        body = session.encrypt(plaintext).to_base64()
        return _seal(Sealed(self.name, self.identity_key, session=session.session_id, body=body)).decode()

    def _open_group(self, sealed: Sealed) -> bytes:
        session = self._inbound.get(sealed.session)
        if session is None:
            raise Unreadable("the session key was not shared with this device")
        try:
            return session.decrypt(vodozemac.MegolmMessage.from_base64(sealed.body)).plaintext
        except vodozemac.MegolmDecryptionException as error:
            raise Unreadable(str(error)) from error

    # --- at rest -----------------------------------------------------------------------------------------------------

    def pickle(self, key: bytes) -> bytes:
        """Everything, encrypted with 32 bytes that the device keeps elsewhere."""
        return msgspec.json.encode(
            {
                "names": [self.user_id, self.device_id],
                "account": self._account.pickle(key),
                "sessions": {name: [each.pickle(key) for each in all_] for name, all_ in self._sessions.items()},
                "identities": self._identities,
                "outbound": {name: session.pickle(key) for name, session in self._outbound.items()},
                "inbound": {name: session.pickle(key) for name, session in self._inbound.items()},
            }
        )

    @classmethod
    def from_pickle(cls, data: bytes, key: bytes) -> Keyring:
        """The keyring as it was."""
        stored = msgspec.json.decode(data)
        ring = cls(*stored["names"])
        ring._account = vodozemac.Account.from_pickle(stored["account"], key)
        ring._sessions = {
            name: [vodozemac.Session.from_pickle(each, key) for each in all_]
            for name, all_ in stored["sessions"].items()
        }
        ring._identities = stored["identities"]
        group, inbound = vodozemac.GroupSession, vodozemac.InboundGroupSession
        ring._outbound = {name: group.from_pickle(each, key) for name, each in stored["outbound"].items()}
        ring._inbound = {name: inbound.from_pickle(each, key) for name, each in stored["inbound"].items()}
        return ring


# --- reactions -------------------------------------------------------------------------------------------------------


def new_reaction_key() -> str:
    """Sealed into a message, so that whoever reads it can react to it and read the reactions to it."""
    return b64encode(AESSIV.generate_key(256)).decode()


def seal_reaction(reaction_key: str, emoji: str) -> str:
    """64 characters, the same for the same emoji on the same message (RFC 5297): so it can be taken back."""
    padded = emoji.encode().ljust(REACTION_BYTES, b"\0")
    return b64encode(AESSIV(b64decode(reaction_key)).encrypt(padded, None)).decode()


def unseal_reaction(reaction_key: str, sealed: str) -> str:
    """The emoji. Raises cryptography's InvalidTag for what was sealed with another key."""
    return AESSIV(b64decode(reaction_key)).decrypt(b64decode(sealed), None).rstrip(b"\0").decode()
