"""The loss in other people's trainers: a module for any loop, and Hugging Face's, TRL's, axolotl's and verl's.

A host's package is imported where its adapter is, and nowhere else.
"""
