"""One model over several processes, started by torchrun.

ranks             the processes of a run: what they sum and agree on, and how the loss of one ends the others
tensor_parallel   every layer divided among the ranks, beside the model
"""
