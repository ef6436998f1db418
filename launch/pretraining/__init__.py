"""Parts of ``launch/pretrain_gpt.py``: arguments, model, data, loop, checkpoints."""
