"""Phase 2: students from stored teacher outputs. Imports store/, never teacher_dump/.

Read in this order: settings (what can be asked), train (the story), objective (what a loss is) and tasks (each with
its own), trainer, dataset and sampler (how rows are read), students and tokens (what is trained), metrics, card.
Language models: language (the objective), token_targets (what the store holds of each token), token_losses (the
student's head and the loss together).
"""
