"""The commands of the console script `ldae`, one per file. Slow imports are inside the functions: --help is quick."""
