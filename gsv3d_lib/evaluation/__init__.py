"""How good a result is: protocol, metrics, experiments on the paper's claims."""
