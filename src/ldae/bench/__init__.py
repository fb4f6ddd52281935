"""What costs what: each stage's step, encoding, embedding, inversion and sampling, beside a straight port of the paper.

measure.py  clocks, memory, FLOPs, the matrix rate     subject.py   one variant: its networks and made-up data
tasks.py    what is measured                           straight.py  the yardstick's plain kernels and files
results.py  speed-ups, the table, comparisons          voxels.py    the same method in voxel space
memory.py   bytes of a training step, on no memory
"""
