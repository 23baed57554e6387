"""What fluffle costs, measured; ``python -m benchmarks.NAME --help`` of each program tells more.

``rounds`` is the one that all others serve: whole rounds of real processes against the floor of
bare AMQP, in the same run. No number is worth more than the run it comes from: the machine, the
disk and the neighbours differ, so whatever is compared is measured side by side.
"""
