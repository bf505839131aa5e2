"""Measurements, each against its own yardstick in the same run: `make bench`, or one of them by `make bench ARGS=post`."""
