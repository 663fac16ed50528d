"""Is an access token still good? And the other side of it: a device or an account is revoked.

Called by the REST guard for every request, by the query role for every opening, and by the routes that revoke. The
truth is in MongoDB; `session:{user_id}` in Redis is a copy of it, an hour at most. Who changes the truth holds the copy
before and drops it after, so nobody can keep an older one, wherever the writer dies. A Redis outage costs speed only.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import anyio
import msgspec
import structlog

from protocol import records
from workers.broker import BrokerUnavailable

if TYPE_CHECKING:
    from workers.broker import Broker
    from workers.store import Store

log = structlog.get_logger(__name__)

_CACHE_SECONDS: Final = 1.0
"""A copy that takes longer is no help: the truth is two reads away."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)


class Validity(msgspec.Struct, frozen=True):
    """Value of `session:{user_id}` (JSON): which access tokens are good, epoch ms. See `store.devices.Validity`."""

    deleted: bool
    valid_from: int
    devices: dict[str, int]

    def admits(self, device_id: str | None, issued_ms: int) -> bool:
        """Is a token of this device (None: of no device in particular) that was made then still good?"""
        if self.deleted:
            return False
        since = self.valid_from if device_id is None else self.devices.get(device_id, self.valid_from)
        return issued_ms >= since


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Validity).decode


async def is_good(store: Store, broker: Broker, user_id: str, device_id: str | None, issued_ms: int) -> bool:
    """Is this token still good? Raises StoreUnavailable."""
    return (await _validity(store, broker, user_id)).admits(device_id, issued_ms)


async def _validity(store: Store, broker: Broker, user_id: str) -> Validity:
    claim = "claim " + secrets.token_hex(8)
    claimed = False
    try:
        with anyio.fail_after(_CACHE_SECONDS):
            cached = await broker.look_session(user_id, claim)
        if cached is not None and cached.startswith(b"{"):
            return _decode(cached)
        claimed = cached is None
    except (BrokerUnavailable, TimeoutError) as error:
        log.debug("session_cache_away", error=str(error))
    except msgspec.DecodeError as error:
        log.warning("session_cache_unreadable", user_id=user_id, error=str(error))
    found = await store.devices.validity(user_id)
    devices = {device_id: _ms(valid_from) for device_id, valid_from in found.devices.items()}
    validity = Validity(found.deleted, 0 if found.valid_from is None else _ms(found.valid_from), devices)
    if claimed:
        try:
            await broker.fill_session(user_id, claim, _encode(validity))
        except BrokerUnavailable as error:
            log.debug("session_cache_away", error=str(error))
    return validity


async def revoke_device(
    store: Store, broker: Broker, user_id: str, device_id: str, now_ms: int, *, has_token: bool = False
) -> bool:
    """End a device's session on REST and on every gateway, at once; False for a device that is not there.

    `has_token`: it is there, whether anybody has seen it or not.

    Raises StoreUnavailable, BrokerUnavailable: it may have happened; repeat it.
    """
    await hold(broker, user_id)
    valid_from = await store.devices.revoke(user_id, device_id, moment(now_ms), has_token=has_token)
    if valid_from is None:
        await broker.drop_session(user_id)
        return False
    await tell(store, broker, user_id, device_id, valid_from)
    return True


async def tell(store: Store, broker: Broker, user_id: str, device_id: str, valid_from: datetime) -> None:
    """Have the copy dropped and the device's connections ended; it is written down when that is done, so that whoever
    finds Redis away, and is not asked again, leaves it to upkeep. Raises as `revoke_device`."""
    await broker.drop_session(user_id)
    await broker.signal_user(user_id, records.Revoked(device_id, _ms(valid_from)))
    await store.devices.told(user_id, device_id, valid_from)
    log.info("device_revoked", user_id=user_id, device_id=device_id)


async def revoke_others(store: Store, broker: Broker, user_id: str, keep: str | None, now_ms: int) -> None:
    """End every session of an account but that of `keep` (None: all). Raises as `revoke_device`."""
    await hold(broker, user_id)
    await store.devices.revoke_all(user_id, keep, moment(now_ms))
    await broker.drop_session(user_id)
    found = await store.devices.validity(user_id)
    at_least = moment(now_ms + 1)
    if keep is None:
        latest = max([at_least, *found.devices.values()])
        await broker.signal_user(user_id, records.Revoked("", _ms(latest)))
        await store.devices.told(user_id, None, latest)
    else:
        # A connection is ended by the device it is of; one that nobody wrote down yet is in the registry.
        for device_id in {*found.devices, *await broker.connected_devices(user_id)} - {keep}:
            valid_from = max(at_least, found.devices.get(device_id, at_least))
            await broker.signal_user(user_id, records.Revoked(device_id, _ms(valid_from)))
            await store.devices.told(user_id, device_id, valid_from)
    log.info("devices_revoked", user_id=user_id, kept=keep)


async def hold(broker: Broker, user_id: str) -> None:
    """Before the truth changes. It does without Redis too: dropping the copy fails then, and is repeated."""
    try:
        await broker.hold_session(user_id)
    except BrokerUnavailable as error:
        log.warning("session_cache_not_held", user_id=user_id, error=str(error))


def moment(now_ms: int) -> datetime:
    """Epoch milliseconds as a date."""
    return _EPOCH + now_ms * _MILLISECOND


def _ms(at: datetime) -> int:
    return (at - _EPOCH) // _MILLISECOND
