"""Records become samples under a chat template, then tokens, then batches with the places that are trained.

``files`` and ``formats`` read records, ``render`` and ``template`` make tokens of them, ``sources`` and ``collate``
batches; ``durable`` writes files that are there whole or not at all.
"""
