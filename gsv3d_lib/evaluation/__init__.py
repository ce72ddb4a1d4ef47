"""How good a result is: the protocol, its metrics, and the experiments on the paper's
claims.
"""
