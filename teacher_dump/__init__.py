"""Phase 1: run the teacher once and keep what it says. The story is `dump.py`.

config      what is asked for
data        rows in, memory-mapped
survey      every row looked at, and hashed
labels      label columns of every form; label_names: do both mean the same by class 0?
tasks/      how a row becomes inputs, and outputs become columns
teacher     who the teacher is
capture     a batch through it
token_logits  what is kept of a language model's logits; fidelity: what that loses; budget: which way is chosen
layers      which layers of the inside
inner       its columns; inner_task: a batch of them; inner_pilot: a few rows first; inner_fidelity: what that loses
planning    shards, size and time, from a few rows
shards      one shard, from rows to a committed file
background  threads beside the teacher
dump        all of it, in order
"""
