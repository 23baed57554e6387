"""Simulated federations: any number of clients, one process, simulated time.

``simulate`` runs the real coordinator over an in-memory broker. A ``Fleet`` plays all clients, with
``devices`` that say how fast each is and an ``availability`` that says when it is present, and a
``SimulatedLoop`` lets time pass only when nothing is left to compute. ``partition`` divides the
data. ``cli`` and ``local`` are ``fluffle simulate`` from a shell and from Python.
"""
