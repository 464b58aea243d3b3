"""Launches: a thread keeps so many and no more, and shares none of them."""

import threading

from marlin_tools.ops.runtime import driver


def test_a_thread_keeps_a_bounded_number_of_launches(monkeypatch):
    """Prompts come in many lengths, and each has a plan of its own."""
    monkeypatch.setattr(driver, "_MOST_KEPT", 3)
    monkeypatch.setattr(driver.kept, "launches", {})
    for rows in range(5):
        driver.keep((rows,), rows)

    assert driver.kept.launches == {(2,): 2, (3,): 3, (4,): 4}


def test_another_thread_has_launches_of_its_own(monkeypatch):
    monkeypatch.setattr(driver.kept, "launches", {"here": 1})
    seen = []
    thread = threading.Thread(target=lambda: seen.append(dict(driver.kept.launches)))
    thread.start()
    thread.join()

    assert seen == [{}]
