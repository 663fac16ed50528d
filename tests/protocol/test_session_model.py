"""C4 and C5 for one connection under any interleaving of losses, repeats, late answers, lag and token refreshes.

The model holds the log of two conversations and one stream down to the session, from which anything may vanish. The
client must see every conversation as 1, 2, 3, … at every moment, and all of it once things have calmed down; where no
record vanished even without the sweep.
"""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol import frames, records
from protocol.backlog import State
from protocol.commands import Ask, Attach, Close, Command, Send, SendEncoded
from tests.protocol.playbook import DIGEST, WALL_MS, auth, new_session

CONVERSATIONS = ("a", "b")
PAGE = 3
Down = records.Delivery | records.PageAnswer | records.OpenAnswer


class OneConnection(RuleBasedStateMachine):
    """Rules are what can happen to a connection; `calm_down` is what the contract promises afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.log = dict.fromkeys(CONVERSATIONS, 0)
        self.seen: dict[str, list[int]] = {name: [] for name in CONVERSATIONS}
        self.visible = dict.fromkeys(CONVERSATIONS, 0)
        """How much of the log a reader finds: a batch that is being written shows its first part."""
        self.unpublished: list[records.Delivery] = []
        self.answers: list[Down] = []
        self.down: list[Down] = []
        self.asked: list[records.Query] = []
        self.completed = 0
        self.has_lost_records = False
        self.may_lose_records = True
        self.session = new_session()
        self.session.receive(auth(), self.now, WALL_MS)
        self.run(self.session.admit("usr_a", "phone", "sess_1", 1e9, None, self.now))

    def run(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Ask(query):
                    self.asked.append(query)
                case SendEncoded(frame):
                    self.see(frame)
                case Send(frames.SyncComplete()):
                    self.completed += 1
                case Send(frames.AuthSuccess()) | Attach():
                    pass
                case _:
                    raise AssertionError(f"unexpected {command}")

    def see(self, frame: bytes) -> None:
        name, first, last = msgspec.json.decode(frame, type=tuple[str, int, int])
        for sequence in range(first, last + 1):
            assert sequence == (self.seen[name][-1] if self.seen[name] else 0) + 1
            self.seen[name].append(sequence)

    @initialize(backlog=st.integers(0, 7), is_open=st.booleans())
    def opens(self, backlog: int, is_open: bool) -> None:
        """Half of the runs start live, so that they get further."""
        self.log["a"] = self.visible["a"] = backlog
        if is_open:
            self.settle()

    # --- the world moves ---------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(CONVERSATIONS), count=st.integers(1, 4), visible=st.integers(0, 4))
    def commit(self, name: str, count: int, visible: int) -> None:
        first, last = self.log[name] + 1, self.log[name] + count
        self.log[name] = last
        self.visible[name] = first - 1 + min(visible, count)
        frame = msgspec.json.encode((name, first, last))
        self.unpublished.append(records.Delivery(name, first, last, ["usr_a"], 0, frame))

    @precondition(lambda self: self.unpublished)
    @rule()
    def owner_publishes(self) -> None:
        """Later than the commit: a page may hold some of it already."""
        item = self.unpublished.pop(0)
        self.visible[item.conversation_id] = max(self.visible[item.conversation_id], item.to_sequence)
        self.down.append(item)

    @precondition(lambda self: self.answers)
    @rule()
    def worker_publishes(self) -> None:
        self.down.append(self.answers.pop(0))

    @precondition(lambda self: self.asked)
    @rule(choice=st.integers(0, 9))
    def worker_answers(self, choice: int) -> None:
        """Any worker may take any query first."""
        self.answer(self.asked.pop(choice % len(self.asked)))

    def answer(self, query: records.Query) -> None:
        if isinstance(query, records.OpenQuery):
            heads = [
                records.OpenHead(name, query.cursors.get(name, 0), head, DIGEST)
                for name, head in self.visible.items()
                if head
            ]
            self.answers.append(records.OpenAnswer(7, 0, heads))
            return
        assert isinstance(query, records.PageQuery)
        name, first = query.conversation_id, query.after_sequence + 1
        last = max(query.after_sequence, min(self.visible[name], query.after_sequence + PAGE))
        frame = msgspec.json.encode((name, first, last)) if last >= first else b""
        self.answers.append(records.PageAnswer(7, name, first, last, last < self.visible[name], DIGEST, frame))

    @precondition(lambda self: self.asked)
    @rule()
    def query_vanishes(self) -> None:
        self.asked.pop(0)

    @precondition(lambda self: self.asked)
    @rule()
    def query_is_read_twice(self) -> None:
        self.asked.append(self.asked[0])

    @precondition(lambda self: self.down)
    @rule()
    def record_vanishes(self) -> None:
        self.down.pop(0)
        self.has_lost_records = True

    @precondition(lambda self: self.down)
    @rule()
    def record_comes_twice(self) -> None:
        self.down.append(self.down[0])

    @precondition(lambda self: self.down)
    @rule(count=st.integers(1, 5))
    def records_arrive(self, count: int) -> None:
        for item in self.down[:count]:
            self.arrive(item)
        del self.down[:count]

    def arrive(self, item: Down) -> None:
        match item:
            case records.Delivery():
                if self.session.deliver(item.conversation_id, item.from_sequence, item.to_sequence):
                    self.see(item.frame)
                else:
                    self.run(self.session.pump(self.now, WALL_MS))
            case records.PageAnswer():
                self.run(self.session.page(item, self.now, WALL_MS))
            case records.OpenAnswer():
                self.run(self.session.opened(item, self.now, WALL_MS))

    @rule()
    def socket_is_full(self) -> None:
        self.session.lagging = True

    @rule()
    def socket_has_room(self) -> None:
        self.session.lagging = False
        self.run(self.session.pump(self.now, WALL_MS))

    @rule(seconds=st.sampled_from([0.5, 3.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        if self.session.state is State.OPENING and self.now + seconds >= 10.0:
            return  # the connection would end, which is another story
        self.now += seconds
        self.session.heard_at = self.now
        self.run(self.session.tick(self.now, WALL_MS))

    @rule()
    def sweep(self) -> None:
        for name, head in self.visible.items():
            if self.session.head_seen(name, head):
                self.session.note_head(name, head)
        self.run(self.session.pump(self.now, WALL_MS))

    @precondition(lambda self: self.session.state is State.LIVE)
    @rule()
    def token_is_refreshed(self) -> None:
        self.session.receive(auth(), self.now, WALL_MS)
        self.run(self.session.admit("usr_a", "phone", "sess_1", 1e9, None, self.now))

    # --- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def the_cursor_is_what_the_client_saw(self) -> None:
        for name, cursor in (self.session.cursors or {}).items():
            assert len(self.seen[name]) == cursor <= self.log[name]

    def teardown(self) -> None:
        """Calm: nothing vanishes any more; a sweep finds what did."""
        if self.session.state is State.OPENING:
            self.answer(records.OpenQuery("gw1", 7, "usr_a", "phone", {}))
        while self.unpublished:
            self.owner_publishes()
        self.session.lagging = False
        for _ in range(4):
            self.settle()
            self.now += 10.0
            self.session.heard_at = self.now
            self.run(self.session.tick(self.now, WALL_MS))
            if self.has_lost_records:
                self.sweep()
        self.settle()
        assert self.seen == {name: list(range(1, head + 1)) for name, head in self.log.items()}
        assert self.session.behind is None
        assert self.completed >= 1

    def settle(self) -> None:
        for _ in range(1_000):
            if self.asked:
                self.answer(self.asked.pop(0))
            elif self.answers:
                self.worker_publishes()
            elif self.down:
                self.arrive(self.down.pop(0))
            else:
                return
        raise AssertionError("the session never stops asking")


OneConnection.TestCase.settings = settings(
    max_examples=300, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestC4C5OneConnection = OneConnection.TestCase


def random_step(model: OneConnection, random: Random) -> None:
    """One rule, the fruitful ones more often than the mishaps."""
    dice = random.random()
    if dice < 0.20:
        model.commit(random.choice(CONVERSATIONS), random.randint(1, 4), random.randint(0, 4))
    elif dice < 0.30 and model.unpublished:
        model.owner_publishes()
    elif dice < 0.40 and model.answers:
        model.worker_publishes()
    elif dice < 0.60 and model.asked:
        model.worker_answers(random.randint(0, 9))
    elif dice < 0.80 and model.down:
        model.records_arrive(random.randint(1, 3))
    elif dice < 0.88:
        model.time_passes(random.choice((0.5, 3.0, 6.0)))
    elif dice < 0.90:
        model.socket_is_full()
    elif dice < 0.92:
        model.socket_has_room()
    elif dice < 0.94 and model.asked:
        random.choice((model.query_vanishes, model.query_is_read_twice))()
    elif dice < 0.95 and model.down:
        model.record_comes_twice()
    elif dice < 0.97 and model.session.state is State.LIVE:
        model.token_is_refreshed()
    elif model.down and model.may_lose_records:
        model.record_vanishes()


@pytest.mark.parametrize("may_lose_records", [False, True])
def test_c4_c5_three_thousand_connections(may_lose_records: bool) -> None:
    """The same model with dice: finds what needs many steps. A failing seed is in the message."""
    for seed in range(1_500):
        random = Random(seed)
        model = OneConnection()
        model.may_lose_records = may_lose_records
        model.opens(random.randint(0, 7), random.random() < 0.7)
        try:
            for _ in range(80):
                random_step(model, random)
                model.the_cursor_is_what_the_client_saw()
            model.teardown()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


def test_c5_a_rewind_sends_everything_after_the_clients_cursor_again() -> None:
    """A `sync` may repeat, for the client asked; it never skips."""
    model = OneConnection()
    model.commit("a", 4, 4)
    model.settle()
    model.session.receive(frames.Sync(payload=frames.SyncPayload(cursors={"a": 1})), 0.0, WALL_MS)
    model.session.opened(records.OpenAnswer(7, 0, [records.OpenHead("a", 1, 4, DIGEST)]), 0.0, WALL_MS)
    model.seen["a"] = [1]
    model.answer(records.PageQuery("gw1", 7, "usr_a", "a", 1, 100))
    model.settle()
    assert model.seen["a"] == [1, 2, 3, 4]
    assert Close not in {type(command) for command in model.session.tick(0.0, WALL_MS)}
