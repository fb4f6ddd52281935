"""The first minutes on a GPU: is it right, how fast is it, and where does the time go. `make gpu-check BUDGET=480`.

check.py    what the parts share: budget, device, size    items.py    one measurement each, in its time
results.py  JSON and the table, rewritten as they come    parts.py    which measurements there are, by worth
chain.py    the same training on GPU and CPU              training.py  steps, synchronisations, profiles
"""
