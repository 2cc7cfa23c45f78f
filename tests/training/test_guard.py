"""Which steps the guard against jumps of the loss calls a jump, and that its memory survives a resume."""

import json
from dataclasses import replace

from pipeline.config import GuardConfig
from pipeline.training.watch.guard import Guard

SKIP = GuardConfig(action="skip", window=8)


def fed(config=SKIP, values=(1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.0)):
    guard = Guard(config)
    assert [guard.jump(value, 10 * value) for value in values] == [""] * len(values)
    return guard


def test_a_loss_or_a_gradient_beyond_its_factor_of_the_median_is_a_jump():
    guard = fed()
    assert guard.jump(1.9, 49.0) == ""
    assert guard.jump(2.1, 10.0) == "loss is 2.1, 2.1 times its median of 8 steps"
    assert guard.jump(1.0, 51.0) == "grad_norm is 51, 5.1 times its median of 8 steps"
    assert guard.jump(9.0, 90.0).count("times its median") == 2
    assert (guard.skipped, guard.row) == (3, 3)
    assert guard.jump(1.0, 10.0) == ""
    assert (guard.skipped, guard.row) == (3, 0)


def test_nothing_is_a_jump_until_the_window_is_full():
    guard = fed(values=(1.0,) * 7)
    assert guard.jump(1000.0, 1000.0) == ""


def test_a_jump_is_not_remembered_so_that_a_second_one_is_a_jump_too():
    guard = fed()
    assert [bool(guard.jump(50.0, 10.0)) for _ in range(20)] == [True] * 20


def test_what_has_no_factor_is_not_looked_at():
    assert fed(replace(SKIP, loss=0.0)).jump(50.0, 10.0) == ""
    assert fed(replace(SKIP, grad_norm=0.0)).jump(1.0, 5000.0) == ""


def test_its_state_survives_a_commit_exactly():
    guard = fed(values=(1 / 3, 2 / 7, 0.1, 0.3, 1 / 9, 0.7, 1e-9, 3.3))
    guard.jump(1e9, 1.0)
    other = Guard(SKIP)
    other.load(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state()
    other.load({})
    assert other.state() == Guard(SKIP).state()


def test_it_leaves_no_trace_where_it_is_off():
    assert Guard(GuardConfig()).state() == {}
