"""Schedules of random-LTD for property tests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from ds_efficient.random_ltd.schedule import TokenSchedule


@st.composite
def schedules(draw: st.DrawFn, **fixed: Any) -> TokenSchedule:
    """Small schedules of every kind; `fixed` sets fields."""
    low = draw(st.integers(1, 300))
    total = draw(st.integers(1, 6))
    values: dict[str, Any] = {
        "min_value": low,
        "max_value": low + draw(st.integers(0, 300)),
        "require_steps": draw(st.integers(0, 400) | st.fractions(1, 400, max_denominator=50)),
        "seq_per_step": draw(st.integers(1, 80)),
        "schedule_type": draw(st.sampled_from(("fixed_linear", "fixed_linear", "constant"))),
        "total_layer_num": total,
        "random_ltd_layer_num": draw(st.integers(0, total)),
        "batch_size": draw(st.integers(1, 9)),
    }
    return TokenSchedule(**{**values, **fixed})
