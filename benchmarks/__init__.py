"""Benchmarks of fluffle; see ``python -m benchmarks.NAME --help`` for each.

The main one is ``rounds``: whole rounds of real processes, relative to a floor of bare AMQP. What
is compared is measured in the same run, because machine, disk and neighbours vary between runs.
"""
