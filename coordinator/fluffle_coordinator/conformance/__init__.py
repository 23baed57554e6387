"""Tests a third-party worker against docs/protocol.md by acting as a coordinator.

``examine`` runs the scenarios of ``greeting``, ``work``, ``odd_messages`` and ``ending`` in turn. A
scenario sends messages through a ``Probe`` and judges what the worker sends back, which the
probe's base class, ``Listener``, collects.
"""
