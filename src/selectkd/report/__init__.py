"""What runs left behind, to be seen: one page about one or more runs, their state, and a terminal view of one at work.

Everything is read from the files of run folders; no model is loaded, and nothing is measured again.
"""
