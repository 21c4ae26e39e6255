"""Which method trains better: each at its own rate of the matrices, all else equal.

    python -m benchmarks.comparison --minutes 60
    python -m benchmarks.comparison --quick

The protocol is in `protocol.py`. Every finished trial is a line of a file in
``records/comparison``, one file a method. A run makes the trials that are missing and
writes the record of those that are there, with what is still missing.
"""
