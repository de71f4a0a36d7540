"""Removal of layers from a checkpoint that the decoder need not know: by the names of its tensors, from file to file.

layer_list.py   which tensors are of which layer
keys.py         what becomes of config.json
structure.py    whether transformers makes of it what is left of the original
folder.py       the files
"""
