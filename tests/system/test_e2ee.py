"""End-to-end encryption on real processes with two gateways: phones understand each other, the server holds nothing
they said, and the search that says so finds what is there."""

from __future__ import annotations

import base64
import secrets
from typing import TYPE_CHECKING

import msgspec
import pytest

from bench import e2ee
from bench.canary import Search, disguises, search

if TYPE_CHECKING:
    from pathlib import Path

    from tests.system.house import House


def test_phones_talk_through_olm_and_megolm_and_the_server_holds_no_word_of_it(house: House, tmp_path: Path) -> None:
    stack = msgspec.structs.replace(house.stack, ws_urls=tuple(house.gateways))
    proven, violations = e2ee.run(stack, tmp_path / "valkey-commands.log")
    assert violations == []
    assert len(proven) == 8


def test_the_search_finds_a_word_wherever_it_lies(house: House, tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    name = f"canary:{mark[:4]}:"
    hidden = base64.b64encode(f"some words before {mark} and after".encode()).decode()
    places = {"string": mark, "hash": mark, "list": mark, "set": mark, "zset": mark, "stream": hidden}
    log = tmp_path / "some.log"
    log.write_text("x" * (1 << 20) + "\n")
    with log.open("r+") as file:
        file.seek((1 << 20) - 5)
        file.write(mark)
    with house.redis() as client, house.database() as database:
        try:
            client.set(f"{name}string", f"before{places['string']}after")
            client.hset(f"{name}hash", mark, "value")
            client.rpush(f"{name}list", "other", mark)
            client.sadd(f"{name}set", mark)
            client.zadd(f"{name}zset", {mark: 1.0})
            client.xadd(f"{name}stream", {"r": hidden})
            database["canary"].insert_one({"deep": [{"bytes": mark.encode()}]})
            found = search(house.stack, mark, [log]).found
        finally:
            client.delete(*(f"{name}{kind}" for kind in places))
            database.drop_collection("canary")
    # The oplog has it too.
    assert set(found) >= {f"redis {name}{kind}" for kind in places} | {
        "mongodb trireme.canary",
        "mongodb local.oplog.rs",
    }
    assert "log some.log" in found
    assert search(house.stack, secrets.token_hex(8), [log]).found == []


@pytest.mark.parametrize("before", range(4))
def test_a_word_is_recognised_within_base64_and_hexadecimal(before: int) -> None:
    text = "x" * before + "a1b2c3d4e5f60718" + "yz"
    for disguised in (base64.b64encode(text.encode()), text.encode().hex().encode(), text.encode("utf-16-le")):
        assert any(needle in disguised for needle in disguises("a1b2c3d4e5f60718"))
    other = base64.b64encode(b"x" * before + b"a1b2c3d4f5f60718")
    assert not any(needle in other for needle in disguises("a1b2c3d4e5f60718"))


def test_the_verdict_needs_both_searches() -> None:
    everywhere = Search(found=["mongodb trireme.messages", "log valkey-commands.log"])
    assert len(e2ee.judge(Search(), everywhere)) == 2
    with pytest.raises(e2ee.NotProvenError, match="plaintext in log rest"):
        e2ee.judge(Search(found=["log rest.log"]), everywhere)
    with pytest.raises(e2ee.NotProvenError, match="did not find the unencrypted message in log"):
        e2ee.judge(Search(), Search(found=["mongodb trireme.messages"]))
