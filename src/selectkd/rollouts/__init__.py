"""Text written before or during training: by the student, the teacher, both in turn, or a server.

``generate`` turns prompts into completions under a rule that says how a token is chosen; ``writer`` decides who writes
the text of a step, and ``streams`` into which streams it falls and what each costs.
"""
