"""Makes Penstock's bundled demo model: corpus, conversations, tokenizer, training, evaluation.

Run as ``python -m tools.demo_model``; the README beside this file has the figures.
"""
