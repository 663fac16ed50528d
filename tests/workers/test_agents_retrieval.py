"""The retrieval agent quotes what the logs say, and the answer that was given there."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from protocol.events import MessageReceivedEvent
from protocol.models import MessageType
from workers.agents.classes import Context
from workers.agents.retrieval import Index, Retrieval, answer_of

if TYPE_CHECKING:
    from workers.settings import Settings

LOG = """\
[12:18] <ann> how do I install java on hoary?
[12:18] === nothing [x] has joined #ubuntu
[12:19] <bob> the weather is fine
[12:20] <cat> ann: apt-get install sun-java5-jre, after you enabled multiverse
[12:21] <dan> my "printer" does not print
"""
UBUNTU = Path(__file__).resolve().parents[3] / "shared" / "data" / "ubuntu-irc"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "2005-01-01.raw.txt").write_text(LOG)
    (tmp_path / "2005-01-01.annotation.txt").write_text("0 3 -\n3 99 -\nnonsense\n")
    return tmp_path


def answered(directory: Path, question: str) -> str:
    index = Index()
    assert index.fill(directory) == 4
    return answer_of(index.search(question))


def test_a_question_finds_the_line_and_its_answer(directory: Path) -> None:
    said = answered(directory, "How can I install Java?")
    assert said.splitlines()[:2] == [
        "2005-01-01 [12:18] <ann> how do I install java on hoary?",
        "    <cat> ann: apt-get install sun-java5-jre, after you enabled multiverse",
    ]


def test_words_are_found_in_their_other_forms(directory: Path) -> None:
    assert "<dan>" in answered(directory, "printing").splitlines()[0]


@pytest.mark.parametrize("question", ["", "?", "how is it", "x" * 50_000, "zebra"])
def test_nobody_said_that(directory: Path, question: str) -> None:
    assert answered(directory, question).startswith("Nobody has said anything")


@pytest.mark.parametrize(
    "question",
    ['install" OR "', "java NEAR(a b)", "text:java", "java*", "' ; DROP TABLE lines --java", "NOT java AND ("],
)
def test_the_query_language_is_not_the_askers(directory: Path, question: str) -> None:
    assert "java" in answered(directory, question)


@pytest.mark.anyio
async def test_the_agent_reads_its_directory_once_and_says_when_it_has_none(
    settings: Settings, directory: Path
) -> None:
    told: list[str] = []

    async def progress(stage: str, _: str) -> None:
        told.append(stage)

    event = MessageReceivedEvent(
        message_id="msg_1",
        idempotency_key="k",
        conversation_id="conv_1",
        sender_id="ann",
        receiver_id="agt_1",
        sequence_number=1,
        message_type=MessageType.TEXT,
        content="install java?",
        timestamp=datetime.now(UTC),
    )
    agent = Retrieval()
    lacking = await agent.reply(event, Context(settings, "agt_1", "ann", "", progress))
    assert lacking is not None
    assert "TRIREME_RETRIEVAL_DIRECTORY" in lacking
    here = msgspec.structs.replace(settings, retrieval_directory=str(directory))
    for _ in range(2):
        said = await agent.reply(event, Context(here, "agt_1", "ann", "", progress))
        assert said is not None
        assert "sun-java5-jre" in said
    assert told == ["reading"]


@pytest.mark.skipif(not UBUNTU.is_dir(), reason="the #ubuntu logs are not beside this checkout")
def test_the_real_logs_answer_a_real_question() -> None:
    index = Index()
    assert index.fill(UBUNTU) > 5000
    hits = index.search("how many partitions should I make?")
    assert any("partition" in hit.text for hit in hits)
