"""Code that runs in Flower's environment (``.venv-flower``) and does not import fluffle.

The exception is the letters job, where the clients of both systems use fluffle's task.
"""
