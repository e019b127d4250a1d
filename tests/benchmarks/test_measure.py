import statistics

import pytest
import torch

from mkf.benchmarks import measure, quiet


@pytest.fixture
def disturbances(monkeypatch):
    """What the yardstick is to say, one after the other, and 1.0 from then on; nobody waits."""
    said = []

    def disturbance():
        return said.pop(0) if said else 1.0

    monkeypatch.setattr(quiet, "disturbance", disturbance)
    monkeypatch.setattr(quiet, "wait", lambda seconds: disturbance())
    return said


def counted(log, name):
    def run():
        log.append(name)

    return run


def test_a_turn_lasts_as_long_as_it_should(monkeypatch):
    clock, calls = [0.0], []

    def run():
        calls.append(clock[0])
        clock[0] += 5.0 if len(calls) == 1 else 2.0 if len(calls) < 6 else 1.0

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    assert measure._turn(run, 10.0) == (10 / 9, 5.0)  # counted are 2 and eight times 1, after 5 and three times 2
    calls.clear()
    assert measure._turn(run, 5.0) == (2.0, 5.0)  # the first was long enough; counted are three times 2
    assert len(calls) == 4
    calls.clear()
    assert measure._turn(run, 0.0) == (5.0, 5.0)
    assert len(calls) == 1


def test_every_candidate_has_one_turn_a_round_in_an_order_of_its_own(disturbances):
    log = []
    result = measure.take_turns({name: counted(log, name) for name in "abcde"}, "a", {}, rounds=6)
    warm_up, turns = log[:10], log[10:]
    assert warm_up == list("aabbccddee")
    rounds = [turns[i : i + 5] for i in range(0, 30, 5)]
    assert all(sorted(of_round) == list("abcde") for of_round in rounds)
    assert len({tuple(of_round) for of_round in rounds}) > 1
    assert result.quiet == 1.0
    assert [len(row.turns) for row in result.rows] == [6] * 5


def test_a_disturbed_turn_is_taken_again_after_the_others(disturbances):
    log = []
    disturbances += [1.0, 1.2]  # before and after the first turn
    result = measure.take_turns({name: counted(log, name) for name in "abc"}, "a", {}, rounds=1)
    turns = log[6:]
    assert len(turns) == 4
    assert turns[-1] == turns[0]
    assert result.quiet == 1.0


def test_of_disturbed_turns_the_quietest_counts(disturbances, monkeypatch):
    seconds = iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(measure, "_turn", lambda run, at_least: (next(seconds), 0.0))
    disturbances += [1.5, 1.5, 1.1, 1.2, 1.4, 1.3]
    result = measure.take_turns({"a": lambda: None}, "a", {}, rounds=1)
    assert result.row("a").turns == [3.0]
    assert result.quiet == 0.0
    assert next(seconds, None) is None


@pytest.mark.parametrize(("patience", "waits"), [(None, [1, 3, 4]), (0.0, [0, 0, 0]), (10.0, [10, 8, 6])])
def test_patience_is_what_there_is_to_wait_in_all(disturbances, monkeypatch, patience, waits):
    clock, asked = [0.0], []

    def wait(seconds):
        asked.append(seconds)
        clock[0] += min(2, seconds)
        return 1.0

    def turn(run, at_least):
        clock[0] += 3
        return 3.0, 3.0

    monkeypatch.setattr(quiet, "wait", wait)
    monkeypatch.setattr(measure, "_turn", turn)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    measure.take_turns({"a": lambda: None}, "a", {}, rounds=3, patience=patience)
    assert asked == waits


def test_ratios_are_taken_turn_by_turn(disturbances, monkeypatch):
    seconds = {"a": iter([1.0, 2.0, 4.0]), "b": iter([2.0, 8.0, 4.0])}
    monkeypatch.setattr(measure, "_turn", lambda run, at_least: (next(seconds[run()]), 7.0 if run() == "a" else 21.0))
    result = measure.take_turns({"a": lambda: "a", "b": lambda: "b"}, "a", {}, rounds=3)
    assert result.row("b").ratio == 2.0
    assert result.row("b").seconds == statistics.median([2.0, 8.0, 4.0])
    assert result.times_faster("a", "b") == 2.0
    assert result.times_faster("a", "b", first_call=True) == 3.0


def test_waiting_ends_when_it_is_quiet_or_when_patience_does(monkeypatch):
    said = iter([1.3, 1.2, 1.01])
    monkeypatch.setattr(quiet, "disturbance", lambda: next(said))
    assert quiet.wait(10.0) == 1.01
    monkeypatch.setattr(quiet, "disturbance", lambda: 1.5)
    assert quiet.wait(0.0) == 1.5


def test_the_least_time_is_that_of_the_process_and_of_as_many_threads(monkeypatch):
    monkeypatch.setattr(quiet, "_least", {})
    times = iter([4.0] * 20 + [2.0] * 20 + [3.0, 1.0, 2.0])
    monkeypatch.setattr(quiet, "_yardstick", lambda: next(times))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert quiet.disturbance() == 1.5
        assert quiet.disturbance() == 1.0
        assert quiet.disturbance() == 2.0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_first_time_of_threads_that_share_a_core_is_not_taken_for_quiet(monkeypatch):
    monkeypatch.setattr(quiet, "_least", {})
    monkeypatch.setattr(quiet, "_PATIENCE", 100.0)
    times = iter([4.0] * 20 + [4.0] * 25 + [2.1, 4.2])
    monkeypatch.setattr(quiet, "_yardstick", lambda: next(times))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert quiet.disturbance() == 2.0
    finally:
        torch.set_num_threads(threads)


def test_the_yardstick_takes_time():
    assert 0 < quiet._yardstick() < 1
    assert quiet.disturbance() >= 1
