"""Everything a step needs follows from its number."""

import pytest

from marlin_tools.training.loop import TrainingSettings, schedule, sequences_of


def test_every_sequence_is_read_once_a_round() -> None:
    read = [index for step in range(5) for index in sequences_of(step, 10, 4, 3)]
    assert sorted(read[:10]) == sorted(read[10:]) == list(range(10))
    assert read[:10] != read[10:]


def test_a_batch_may_be_larger_than_the_text() -> None:
    batch = sequences_of(0, 3, 8, 0)
    assert len(batch) == 8
    assert sorted(batch[:3]) == [0, 1, 2]


def test_the_order_depends_on_the_seed_alone() -> None:
    assert sequences_of(7, 50, 8, 1) == sequences_of(7, 50, 8, 1) != sequences_of(7, 50, 8, 2)


def test_the_rate_rises_and_falls_to_a_tenth() -> None:
    settings = TrainingSettings(rate=1.0, warmup=0.1)
    rates = [schedule(step, 100, settings) for step in range(100)]
    assert rates[:11] == pytest.approx([*(0.1 * (i + 1) for i in range(10)), 1.0])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
