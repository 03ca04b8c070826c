"""kdpipe: run a teacher once, store what it said, train any number of students from the store.

The map, from the ground up (a module imports only from the floors below its own):

    errors                                               what can go wrong
    fingerprint, random_numbers                          digests; draws without state
    views, targets, order, config, distributed, durable  plain values; safe files
    huggingface                                          models and tokenizers of Transformers
    data                                                 prepared rows on disk, and where they come from
    preprocess, losses, encodings                        values <-> tensors
    tasks, teachers, models, store, checkpoint, batches  things with behaviour
    caching, training, evaluation, estimating            verbs

`kdpipe_stages`, on top, holds the commands. Nothing is re-exported here: one name has one address, and
`import kdpipe` costs nothing.
"""

__version__ = "0.1.0"
