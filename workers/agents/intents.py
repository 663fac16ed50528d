"""What a message is about, as one of the capabilities of the agents that are there; behind a cache of one hour.

Only asked about conversations that their members have flagged plaintext: the content of all others is ciphertext, and
none of the server's business. A classifier of one's own is a class named by `TRIREME_INTENT_CLASSIFIER`.
"""

from __future__ import annotations

import importlib
import re
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Protocol

import anyio
import structlog

from protocol import keys
from workers.broker import Broker, BrokerUnavailable
from workers.settings import PREFIX, SettingError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from protocol.models import Agent

CLASSIFY_SECONDS: Final = 2.0
"""A classifier that takes longer has no opinion: a message is not kept from its agent for it."""
_WORD: Final = re.compile(r"[a-z0-9]+")

log = structlog.get_logger(__name__)


class Classifier(Protocol):
    """Tells what a text is about. Constructed without arguments."""

    async def classify(self, text: str, intents: Sequence[str]) -> str:
        """One of the intents, or "" where none fits."""


class WordClassifier:
    """The intent whose words the text says most often; of several the first."""

    async def classify(self, text: str, intents: Sequence[str]) -> str:
        """See `Classifier.classify`."""
        said = _WORD.findall(text.lower())
        best, most = "", 0
        for intent in intents:
            words = set(_WORD.findall(intent))
            times = sum(word in words for word in said)
            if times > most:
                best, most = intent, times
        return best


class Intents:
    """A classifier behind its cache."""

    def __init__(self, broker: Broker, classifier: Classifier) -> None:
        self._broker = broker
        self._classifier = classifier

    async def of(self, text: str, agents: Sequence[Agent]) -> str:
        """What the text is about, among what these agents can do. Never raises what a classifier does wrong."""
        intents = sorted({capability for agent in agents for capability in agent.capabilities})
        if not intents:
            return ""
        key = keys.intent(_hash(text, intents))
        try:
            known = await self._broker.command("GET", key)
            if known is not None:
                return known.decode() if known.decode() in intents else ""
        except BrokerUnavailable:
            known = None
        found = await self._classify(text, intents)
        if found is None:
            return ""
        try:
            await self._broker.command("SET", key, found, "EX", keys.INTENT_TTL_SECONDS)
        except BrokerUnavailable as error:
            log.warning("intent_not_cached", error=str(error)[:200])
        return found

    async def _classify(self, text: str, intents: Sequence[str]) -> str | None:
        """None: no answer, which is not remembered."""
        try:
            with anyio.move_on_after(CLASSIFY_SECONDS):
                found = await self._classifier.classify(text, intents)
                return found if found in intents else ""
        except Exception as error:  # noqa: BLE001 - the boundary of one message: somebody else's class fails it alone
            log.warning("intent_not_found", error=type(error).__name__)
            return None
        log.warning("intent_too_late", seconds=CLASSIFY_SECONDS)
        return None


def _hash(text: str, intents: Sequence[str]) -> str:
    """Of the message, and of what it could be about: the same words may be for others elsewhere."""
    return blake2b(f"{text}\0{' '.join(intents)}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def open_classifier(path: str) -> Classifier:
    """The class of the setting, `module:Class`; the one of this module for "". Raises SettingError."""
    if not path:
        return WordClassifier()
    module, _, name = path.partition(":")
    try:
        kind: Callable[[], Classifier] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"{PREFIX}INTENT_CLASSIFIER: {path} cannot be imported: {error}") from error
    return kind()
