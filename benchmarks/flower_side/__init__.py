"""What runs inside Flower's own environment (``.venv-flower``), and imports nothing of fluffle's.

The one exception are the letters: there, the clients of both systems train the very same task.
"""
