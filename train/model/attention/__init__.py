"""Attention, by kind: its sizes and what follows from them (`kinds`), and the module that computes it (`build`).

A kind is a class of `AttentionSizes` and a module. A further one is a class in `kinds.py` with its name in
`ATTENTIONS`, a module in a file of its own with its line in `build.py`, and a `Cache` where it keeps something new.
"""
