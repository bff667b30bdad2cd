"""Who is named when ranks stop, hang, lag behind or go astray; the real thing is in tests/chaos."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf.distributed import World
from rlhf.ranks import Pace, _difference, check_agreement, config_items
from rlhf.watchdog import EXIT_STALLED, Place, Process, Sight, Verdict, Watchdog, judge
from tests.helpers import rl_config, single_world

NOW, DEAD = 1000.0, 60.0


def sight(entered: int, collectives: int, *, silent: float = 0, still: float = 0, waits: bool = False, left: bool = False) -> Sight:
    return Sight(Place(1, "gen", entered, collectives, waits, left=left), NOW - silent, NOW - still)


@pytest.mark.parametrize(
    ("sights", "found"),
    [
        pytest.param([sight(3, 7, still=700), sight(3, 6, still=650)], Verdict([1], False, 650), id="the other is in a collective"),
        pytest.param([sight(3, 7, waits=True, still=700), sight(3, 7, still=650)], Verdict([1], False, 650), id="the other waits on the store"),
        pytest.param([sight(4, 7, still=700), sight(3, 7, still=650)], Verdict([1], False, 650), id="the other is a phase further"),
        pytest.param([sight(3, 7, still=700), sight(3, 6, still=5)], None, id="slow, but it moves"),
        pytest.param([sight(3, 7, still=700), sight(3, 7, still=650)], Verdict([0, 1], False, 650), id="nobody is behind"),
        pytest.param([sight(3, 7, still=700), sight(3, 6, still=700, left=True)], Verdict([0], False, 700), id="the other is done"),
        pytest.param([sight(3, 7), sight(3, 6, silent=61)], Verdict([1], True, 61), id="silent"),
        pytest.param([sight(3, 7), sight(3, 6, silent=61, left=True)], None, id="silent because it is done"),
    ],
)
def test_who_is_behind(sights: list[Sight], found: Verdict | None) -> None:
    assert judge(dict(enumerate(sights)), 0, NOW, NOW, DEAD, lambda phase: 600.0) == found


def test_without_the_store_only_rank_0_is_silent() -> None:
    """The others were last heard of when the store last answered, which says nothing of them."""
    sights = {r: sight(3, 7, silent=61.5, still=61.5) for r in range(3)}
    assert judge(sights, 1, NOW - 61, NOW, DEAD) == Verdict([0], True, 61)
    assert judge(sights, 1, NOW - 59, NOW, DEAD) is None


def started(stall: float | None = 600.0, ranks: int = 2) -> Watchdog:
    """A watchdog whose threads do nothing."""
    dog = Watchdog()
    dog._closed.set()
    dog.start(None, lambda own: [own] * ranks, lambda: 0, None, stall)
    dog._stop()
    return dog


def test_patience_is_learnt_from_those_that_others_wait_for() -> None:
    dog = started(stall=1.0)
    start = dog._awake - 100
    dog._sights = {0: Sight(Place(phase="gen", waits=True), dog._awake, start - 900), 1: Sight(Place(phase="gen"), dog._awake, start)}
    dog._look([Place(phase="gen", waits=True, beats=1), Place(phase="gen", beats=1)])
    assert 200 < dog._budget("gen") < 210  # of rank 1: rank 0 only waited
    assert dog._budget("testing") == 1.0


def test_who_was_stopped_himself_judges_nobody() -> None:
    """A whole job that was suspended and goes on."""
    dog = started()
    long_ago = time.monotonic() - 5000
    dog._sights = {r: Sight(Place(), long_ago, long_ago) for r in range(2)}
    dog._answered = dog._awake = long_ago
    now = dog._wake()
    assert judge(dog._sights, 0, dog._answered, now, dog._dead, dog._budget) is None
    dog._sights = {r: Sight(Place(), long_ago, long_ago) for r in range(2)}
    assert judge(dog._sights, 0, dog._answered, dog._wake(), dog._dead, dog._budget) is not None


def test_process_of_the_same_number() -> None:
    own = Process.own(0, 0)
    assert own.alive and not own._replace(started="1").alive and not own._replace(pid=2**22 + 1).alive
    assert own.beside(own._replace(pid=1)) and not own.beside(own._replace(namespace="other"))
    assert f"process {os.getpid()}" in str(own) and "State" in own.describe()


def world_of(ranks: int) -> World:
    world = single_world()
    world.processes = [Process(f"node{r}", "", 100 + r, "", 0, 0) for r in range(ranks)]
    return world


def test_slow_rank_is_named_after_three_steps() -> None:
    pace = Pace(world_of(4))
    normal, slow = {"gen": (1.0, 10), "ref": (1.0, 1)}, {"gen": (1.0, 5), "ref": (9.0, 1)}  # as long for half of the blocks
    said = [pace.compare([normal, slow, normal, normal], 2.0)[1] for _ in range(5)]
    assert [len(s) for s in said] == [0, 0, 1, 0, 0]
    assert "rank 1 (host node1, process 101) is slow: in phase gen 2.0 times" in said[2][0]
    metrics, _ = pace.compare([normal, slow, normal, normal], 2.0)
    assert metrics == {"perf/straggler/gen/rank": 1.0, "perf/straggler/gen/ratio": pytest.approx(2.0)}
    assert pace.compare([normal] * 4, 2.0)[1] == []
    assert [len(pace.compare([normal, slow, normal, normal], 2.0)[1]) for _ in range(3)] == [0, 0, 1]  # anew, in a row
    pace = Pace(world_of(4))
    assert not any(pace.compare([normal, slow, normal, normal], 100.0)[1] for _ in range(6))  # nobody would notice
    assert not any(pace.compare([{"gen": (1.0, 10)}, {"gen": (1.0, 3)}], 2.0)[1] for _ in range(6))  # a short rollout


def test_waits_are_no_work() -> None:
    world = world_of(2)
    pace = Pace(world)
    for waited in (0.0, 100.0):
        pace.begin("update_actor")
        world.waited += waited
        world.beat()
        pace.end("update_actor")
    ((seconds, beats),) = pace.take().values()
    assert seconds < -99 and beats == 2  # time stood still
    assert pace.take() == {}


def test_config_items_leave_paths_out(tmp_path: Path) -> None:
    a, b = (config_items(rl_config(tmp_path / name, train={"steps": steps})) for name, steps in (("a", 1), ("b", 2)))
    assert {name for name in a if a[name] != b[name]} == {"config.train.steps"} and "config.algorithm.kl.coef" in a


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1, 1, 2, 1], "rate is 2 on rank 2 (host node2, process 102), 1 on the other 3"),
        ([1, 2], "rate is 1 on rank 0 (host node0, process 100), 2 on rank 1 (host node1, process 101)"),
        ([None, 3, 3], "rate is None on rank 0 (host node0, process 100), 3 on the other 2"),
    ],
)
def test_majority_decides_who_is_odd(values: list[Any], found: str) -> None:
    assert _difference("rate", values, world_of(len(values))) == found


def test_one_rank_agrees_with_itself() -> None:
    check_agreement({"step": 1}, "after step 1", single_world())


@pytest.mark.parametrize(("seconds", "code"), [(0.2, EXIT_STALLED), (60, 0), (None, 0)])
def test_ranks_that_never_join(seconds: float | None, code: int) -> None:
    program = f"import time; from rlhf.watchdog import in_time\nwith in_time({seconds}, 3, 'not all 8 ranks have joined'): time.sleep(1)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert ("error (rank 3): not all 8 ranks have joined after 0 s" in done.stderr and "line 2" in done.stderr) == bool(code), done.stderr


def test_silence_is_noticed_before_a_stall() -> None:
    """A stopped process can neither leave nor write its stacks by itself, so it must not be taken for one that hangs."""
    for stall in (6.0, 60.0, 600.0):
        dog = started(stall)
        now = NOW + dog._dead + 2 * dog._interval
        sights = {0: Sight(Place(collectives=1), now, NOW), 1: Sight(Place(), NOW, NOW - dog._interval)}
        verdict = judge(sights, 0, now, now, dog._dead, dog._budget)
        assert verdict is not None and verdict.silent and verdict.ranks == [1]
        assert judge(sights, 0, NOW + dog._dead, NOW + dog._dead, dog._dead, dog._budget) is None
