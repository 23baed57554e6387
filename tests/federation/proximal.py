"""A user's own local rule, in a file outside the product: FedProx."""


class Proximal:
    """Adds ``mu * (w - w0)`` to each gradient (Li et al., MLSys 2020)."""

    def __init__(self, mu):
        self.mu = mu

    def begin(self, received, broadcast, kept):
        return received

    def gradient(self, gradient, weights, state):
        pulled = {
            name: gradient[name] + self.mu * (weights[name] - state[name]) for name in gradient
        }
        return pulled, state

    def end(self, trained, state):
        return {}


proximal = Proximal(0.5)
