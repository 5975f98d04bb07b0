"""Sizes in units that people read."""

from optimum_order.files import size


def test_sizes_are_in_units_that_people_read():
    for count, text in [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (11_720_000, "11.7 MB"),
        (5_000_000_000_000, "5e+03 GB"),
    ]:
        assert size(count) == text
