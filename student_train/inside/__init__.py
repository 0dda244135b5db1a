"""Losses of what is inside both models: what the store has, what the student shows, and how they are compared.

objective <- comparisons <- comparison <- sides <- teacher, stored, pieces
"""
