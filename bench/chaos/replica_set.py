"""Three members of a MongoDB replica set on loopback, each reached through a link, each to be killed and brought back.

The set's config names the links' ports, so drivers and members alike come through them. The election timeout is 3 s
instead of 10 s: a failover takes a third of the time, and the faults are as many more.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import pymongo
from pymongo.errors import OperationFailure, PyMongoError

from bench.chaos.server import Server
from bench.services import HOST, ServicesError, mongod_arguments

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NAME: Final = "chaos"
ELECTION_MS: Final = 3000
HEARTBEAT_MS: Final = 1000
ALREADY_INITIALIZED: Final = 23
TTL_SECONDS: Final = 1
"""Between two looks for what has expired, instead of 60 s."""
START_SECONDS: Final = 60.0
PRIMARY_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.05
PROBE_MS: Final = 500


class Member(Server):
    """One mongod. `port` is its own, `link_port` the one the set knows it by."""

    def __init__(self, name: str, directory: Path, port: int, link_port: int) -> None:
        self.data_dir = directory / name
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.link_port = link_port
        arguments = mongod_arguments(self.data_dir, port, NAME)
        arguments += ["--setParameter", f"ttlMonitorSleepSecs={TTL_SECONDS}"]
        super().__init__(name, arguments, port, directory / f"{name}.log")

    def is_primary(self) -> bool:
        """Does it say so, within half a second? False where it does not answer."""
        return bool(self.hello().get("isWritablePrimary"))

    def hello(self) -> dict[str, Any]:
        """Its own view of the set; empty where it does not answer."""
        try:
            with direct_client(self.port) as client:
                answer: dict[str, Any] = client.admin.command("hello")
                return answer
        except PyMongoError:
            return {}

    def rollbacks(self) -> int:
        """How often it has rolled entries of its oplog back since it was first started (its log says each)."""
        with self.log.open("rb") as log:
            return sum(b'"Rollback summary"' in line for line in log)


def direct_client(port: int) -> pymongo.MongoClient[dict[str, Any]]:
    """A client of this one member."""
    return pymongo.MongoClient(
        HOST,
        port,
        directConnection=True,
        serverSelectionTimeoutMS=PROBE_MS,
        connectTimeoutMS=PROBE_MS,
        socketTimeoutMS=4 * PROBE_MS,
    )


class ReplicaSet:
    """All members. `start` brings the set up; afterwards they are handled one by one."""

    def __init__(self, directory: Path, ports: Sequence[int], link_ports: Mapping[str, int]) -> None:
        self.members = [
            Member(f"mongod-{place}", directory, port, link_ports[f"mongod-{place}"])
            for place, port in enumerate(ports, 1)
        ]

    @property
    def url(self) -> str:
        """For drivers."""
        hosts = ",".join(f"{HOST}:{member.link_port}" for member in self.members)
        return f"mongodb://{hosts}/trireme?replicaSet={NAME}"

    def start(self) -> None:
        """Start all, make them a set, wait for its primary. Raises ServicesError."""
        for member in self.members:
            member.start()
        deadline = time.monotonic() + START_SECONDS
        for member in self.members:
            member.wait_until(lambda member=member: _answers(member.port), deadline)  # type: ignore[misc]
        self._initiate()
        self.wait_primary()

    def _initiate(self) -> None:
        config = {
            "_id": NAME,
            "members": [
                {"_id": place, "host": f"{HOST}:{member.link_port}"} for place, member in enumerate(self.members)
            ],
            "settings": {"electionTimeoutMillis": ELECTION_MS, "heartbeatIntervalMillis": HEARTBEAT_MS},
        }
        with pymongo.MongoClient[dict[str, Any]](HOST, self.members[0].port, directConnection=True) as client:
            try:
                client.admin.command("replSetInitiate", config)
            except OperationFailure as error:
                if error.code != ALREADY_INITIALIZED:
                    raise ServicesError(f"the replica set cannot be made: {error}") from error

    def primary(self) -> Member | None:
        """The member that says it is, of those that run; None where none does."""
        return next((member for member in self.members if member.is_running and member.is_primary()), None)

    def wait_primary(self) -> Member:
        """Poll until there is one. Raises ServicesError after a minute."""
        deadline = time.monotonic() + PRIMARY_SECONDS
        while (primary := self.primary()) is None:
            if time.monotonic() >= deadline:
                raise ServicesError(f"the replica set has had no primary for {PRIMARY_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)
        return primary

    def secondaries(self, primary: Member) -> list[Member]:
        """All others."""
        return [member for member in self.members if member is not primary]

    def wait_whole(self, seconds: float = PRIMARY_SECONDS) -> None:
        """Until every member is primary or secondary. Raises ServicesError."""
        deadline = time.monotonic() + seconds
        while not all(hello.get("isWritablePrimary") or hello.get("secondary") for hello in self._hellos()):
            if time.monotonic() >= deadline:
                raise ServicesError(f"the replica set is not whole after {seconds:.0f} s")
            time.sleep(POLL_SECONDS)

    def _hellos(self) -> list[dict[str, Any]]:
        return [member.hello() for member in self.members]

    def rollbacks(self) -> int:
        """Of all members together."""
        return sum(member.rollbacks() for member in self.members)


def _answers(port: int) -> bool:
    try:
        with direct_client(port) as client:
            client.admin.command("ping")
            return True
    except PyMongoError:
        return False
