"""The nouns that everything else speaks of: requests, parameters, sequences, plans, facts, errors.

Pure data: no torch, no IO, no clock. Start reading at request.py (what enters and leaves), sequence.py (one
generation), plan.py (one step).
"""
