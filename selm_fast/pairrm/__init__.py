"""PairRM (LLM-Blender, arXiv 2306.02561): the ranker that compares candidates pair by pair, as SELM's paper uses it."""
