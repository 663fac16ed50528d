"""Rows of `bounds.py` about the agents role."""

from __future__ import annotations

from typing import Final

from bench.bound import Bound

_AGENTS: Final = "Agents"
_TEST: Final = "tests/workers/test_agents_bounds.py::"

AGENTS: Final = (
    Bound(
        room=_AGENTS,
        where="workers.events:UNCONFIRMED",
        unit="batches",
        past="the reader waits; the stream keeps the events, and so does the outbox",
        no_gauge="`trireme_events_total` stands still",
        test="tests/workers/test_events.py::test_batches_that_the_outbox_does_not_know_of_are_bounded",
        holds=("workers.events.follow()",),
    ),
    Bound(
        room=_AGENTS,
        where="workers.agents.runner:IN_HAND",
        unit="tasks of a process",
        past="more wait in MongoDB and are swept up",
        gauge="trireme_agent_tasks_in_hand",
        test=_TEST + "test_a_process_takes_no_more_tasks_than_its_bound",
        holds=(
            "workers.agents.runner.Runner._broken",
            "workers.agents.runner.Runner._done",
            "workers.agents.runner.Runner._in_hand",
            "workers.agents.runner.Runner._lanes",
        ),
    ),
    Bound(
        room=_AGENTS,
        where="workers.agents.runner:LANE_TASKS",
        unit="tasks of a conversation",
        past="more wait in MongoDB and are swept up",
        gauge="trireme_agent_tasks_in_hand",
        test=_TEST + "test_a_conversation_takes_no_more_room_than_its_bound",
    ),
    Bound(
        room=_AGENTS,
        where="workers.agents.runner:FINISHED_KEPT",
        unit="ids",
        past="the oldest go; one that comes again is asked again, and its answer is known by its key",
        no_gauge="full in every process that has worked for a while",
        test=_TEST + "test_finished_tasks_are_remembered_up_to_a_bound",
        holds=("workers.agents.runner.Runner._finished",),
    ),
    Bound(
        room=_AGENTS,
        where="workers.agents.runner:AGENTS_KEPT",
        unit="agents",
        past="idle ones are forgotten, with what their breakers knew",
        no_gauge="as many as are asked",
        test=_TEST + "test_agents_are_remembered_up_to_a_bound",
        holds=("workers.agents.runner.Runner._desks",),
    ),
    Bound(
        room=_AGENTS,
        where="workers.agents.tasks:HOMES_LIMIT",
        unit="conversations",
        past="those not heard of longest are looked up again",
        no_gauge="full in every process that has worked for a while",
        test=_TEST + "test_homes_of_conversations_are_remembered_up_to_a_bound",
        holds=("workers.agents.tasks.TaskSink._homes",),
    ),
    Bound(
        room=_AGENTS,
        where="workers.agents.tasks:STREAM_LIMIT",
        unit="entries of a partition",
        past="the oldest go; their tasks are swept up from MongoDB",
        gauge="trireme_agent_tasks_in_hand",
        test=_TEST + "test_the_stream_of_tasks_keeps_its_newest",
    ),
)
