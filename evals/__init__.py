"""How good a model is: bits per byte, multiple choice, prompts, lm-eval's tasks.

scoring.py asks a model for log probabilities, the others make numbers of them.
"""
