"""The first minutes on a GPU: correctness, speed, and where the time goes. `make gpu-check BUDGET=480`.

check.py    budget, device and size                        items.py      one measurement within the budget
parts.py    the list of measurements                       results.py    JSON files and the table
chain.py    the same training on GPU and CPU               training.py   training steps, waits, profiles
norms.py    the split group norm and PyTorch's             speedups.py   times compared with the straight port
machine.py  card, versions, matrix rates, packages         run.py        one measurement after the other
"""
