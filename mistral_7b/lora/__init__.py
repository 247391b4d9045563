"""LoRA adapters: y = W x + scale B (A x).

files      read and write adapter files: PEFT and mistral-finetune
adapters   many adapters of one model in memory, a different one for each row of a forward
"""
