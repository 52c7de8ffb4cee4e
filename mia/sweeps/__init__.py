"""Sweeps: one run changed along axes. `mia.methods.sweep` is the experiment.

| file | what is in it |
|---|---|
| `experiments.py` | what is swept: patching, ablation, steering, blocking; its runs |
| `axes.py`, `choice.py` | the grid of cells, and the place that each stands for |
| `changes.py`, `paths.py` | from a place to edits |
| `cells.py` | cells as one planned run, their rows in order |
| `work.py`, `memory.py` | all cells in chunks, as large as the memory allows |
| `numbers.py` | rows as arrays, means, intervals |
| `rows.py`, `manifest.py` | rows in a file, resumed and joined; what the file is of |
| `workers.py` | chunks on dask workers |
"""
