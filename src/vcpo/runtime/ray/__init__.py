"""Actors of a Ray cluster: ``runtime.kind = "ray"``. Needs the extra ``[ray]``.

The controller stays in the process of the command; the ranks of the learner and the samplers, each with its
environments, are actors. Ray places them, restarts samplers, carries their answers and keeps the weights.
"""
