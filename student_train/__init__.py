"""Phase 2: students from stored teacher outputs. Imports store/, never teacher_dump/.

Read in this order: settings (what can be asked), train (the story), objective (the loss), trainer, dataset
and sampler (how rows are read), students and tokens (what is trained), metrics, card.
"""
