"""The drafter of speculative decoding: the EAGLE head, how it learns, how it is judged, and its files.

Read `packed.py` (terms and data), `head.py` (the model), `loss.py` (training), `acceptance.py` (judging) and
`checkpoint.py` (vLLM's format); then `store.py` and `trainer.py` (training in slices), `publication.py` (which head the
engines get), and `slices.py`, `fill.py` and `bubbles.py` (where slices run).
"""
