"""`ldae tables NAME`: the paper's tables of a finished run, beside the paper's own figures."""
