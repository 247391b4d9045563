"""Activations of a forward pass: their names, and a model that shows them to watchers while it computes.

    points    the names of activations, and TransformerLens's names for them
    watched   the model with a watcher at every point; the watched model shares all weights
    keys      the keys that a forward's queries see, and the attention weights over them
    edits     watchers that change activations: patching and steering
    recorder  a watcher that keeps activations
    tape      what was recorded, by point and layer

`interpret` puts them around a model, and the engine around the rows of one request.
"""
