"""Speed and memory of each stage and each use, compared with a straight port of the paper: `python -m ldae.bench`.

measure.py  time, memory, operations, matrix rate     variant.py   one variant: its networks and made-up data
tasks.py    what is measured                          straight.py  plain kernels and files of the straight port
results.py  speed-ups, table, comparison              voxels.py    latent space against voxel space
memory.py   memory of a training step, computed       gpu_check/   the first minutes on a GPU
"""
