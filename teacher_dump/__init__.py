"""Phase 1: run the teacher once and keep what it says.

    config  what is asked for          data     rows in, memory-mapped     survey    every row checked and hashed
    tasks/  rows to inputs, outputs to columns  teacher  who the teacher is   capture  a batch through it
    planning  shards, size, time       shards   a shard from rows to disk  dump      the story, start here
"""
