"""Hardware and SAR limits of all kinds, for properties that must hold under any."""

from hypothesis import strategies as st

from scansteer.protocols.scan import Limits, Range


def any_range(lower: float, upper: float) -> st.SearchStrategy[Range]:
    return st.tuples(st.floats(lower, upper), st.floats(lower, upper)).map(lambda ends: Range(lower=min(ends), upper=max(ends)))


def any_limits() -> st.SearchStrategy[Limits]:
    """From those that forbid nearly all to those that allow everything."""
    return st.builds(
        Limits,
        b1_max_ut=st.floats(0.1, 10),
        offset_ppm=any_range(-10, 10),
        t_sat_s=any_range(0.1, 12),
        t_rec_s=any_range(0.0, 12),
        duty_cycle_max=st.floats(0.05, 1),
        b1rms_10s_ut=st.floats(0.1, 8),
        b1rms_6min_ut=st.floats(0.1, 8),
    )
