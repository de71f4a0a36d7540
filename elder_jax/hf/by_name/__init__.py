"""Removes layers from a checkpoint by the names of its tensors, from file to file; the decoder need not support the model.

layer_list.py   which layer each tensor belongs to
keys.py         edits config.json
structure.py    checks with transformers that each remaining layer is unchanged
folder.py       reads and writes the files
"""
