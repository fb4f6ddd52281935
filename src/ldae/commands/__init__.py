"""The commands of the console script `ldae`, one a file. Slow imports stay inside them, so that --help is quick."""
