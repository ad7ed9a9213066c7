"""The drafter of speculative decoding: the EAGLE head, its training and evaluation, and its files.

A reading order: in `eagle/`, `packed_rows.py` (terms and data), `head.py` (the model), `draft_loss.py` (its loss),
`expected_acceptance.py` (its evaluation) and `head_files.py` (vLLM's format). Then, in `training/`, `feature_store.py`
and `head_trainer.py` (training in slices) and `publication.py` (which head the engines get). Then, in `idle_time/`,
`slices.py`, `wait_filler.py` and `pipeline_bubbles.py` (when slices run).
"""
