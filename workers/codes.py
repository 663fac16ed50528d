"""Verification codes: made, hashed, compared. Called by the REST role; knows nobody's account.

Six digits are hashed all the same: who reads the database, a backup or a slow-query log within ten minutes must not
read codes. Hashing is slow on purpose, so it happens in threads, few at a time.
"""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

if TYPE_CHECKING:
    from workers.senders import Sender
    from workers.settings import Settings
    from workers.store import Store
    from workers.store.verifications import Target

DIGITS: Final = 6
_AT_ONCE: Final = 2
"""Threads that hash: 30 ms and 19 MiB each, and the loop needs a core."""


class Codes:
    """Begins and proves verifications. Every method raises StoreUnavailable."""

    def __init__(self, settings: Settings, store: Store, sender: Sender) -> None:
        self._tries = settings.verification_tries
        self._life = timedelta(seconds=settings.verification_ttl_seconds)
        self._store = store
        self._sender = sender
        # OWASP Password Storage Cheat Sheet, Argon2id: 19 MiB, 2 passes, 1 lane.
        self._hasher = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
        self._threads = anyio.CapacityLimiter(_AT_ONCE)
        self._nothing = ""

    async def begin(self, target: Target, now: datetime) -> tuple[str, datetime]:
        """Send a fresh code to the target; the verification's id and its end. Raises SendFailed."""
        code = f"{secrets.randbelow(10**DIGITS):0{DIGITS}d}"
        verification_id = "ver_" + secrets.token_hex(16)
        expires_at = now + self._life
        code_hash = await self._hash(code)
        await self._store.verifications.begin(target, verification_id, code_hash, self._tries, expires_at)
        await self._sender.send(target, code, expires_at)
        return verification_id, expires_at

    async def prove(self, verification_id: str, code: str, now: datetime) -> Target | None:
        """Where the code was sent to, if it is the one; None otherwise: never why not, nor sooner than for a wrong one.

        The code is not spent yet.
        """
        attempt = await self._store.verifications.take_try(verification_id, now)
        if attempt is None:
            self._nothing = self._nothing or await self._hash(secrets.token_hex(8))
            await self._matches(self._nothing, code)
            return None
        return attempt.target if await self._matches(attempt.code_hash, code) else None

    async def spend(self, verification_id: str) -> bool:
        """Use the proven code up; False for whoever comes second."""
        return await self._store.verifications.spend(verification_id)

    async def _hash(self, code: str) -> str:
        return await anyio.to_thread.run_sync(self._hasher.hash, code, limiter=self._threads)

    async def _matches(self, code_hash: str, code: str) -> bool:
        def verify() -> bool:
            try:
                return self._hasher.verify(code_hash, code)
            except (VerificationError, InvalidHashError):
                return False

        return await anyio.to_thread.run_sync(verify, limiter=self._threads)
