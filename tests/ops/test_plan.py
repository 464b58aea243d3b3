"""Plans: a thread keeps so many and no more."""

from marlin_tools.ops.linear import plan


def test_a_thread_keeps_a_bounded_number_of_plans(monkeypatch):
    """Prompts come in many lengths, and each has a plan of its own."""
    monkeypatch.setattr(plan, "_MOST_PLANS", 3)
    kept = plan.ThreadPlans()
    for rows in range(5):
        kept.keep((rows,), rows)

    assert kept.plans == {(2,): 2, (3,): 3, (4,): 4}
