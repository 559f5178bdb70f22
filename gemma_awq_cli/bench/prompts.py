"""Prompts to measure speed with: random tokens, the same in every bench."""

import random


def random_prompts(name: str, count: int, length: int, bos: int, vocabulary: int) -> list[list[int]]:
    """Return prompts [count, length] of token ids below `vocabulary` with BOS first; others for each name."""
    rng = random.Random(name)
    return [[bos, *(rng.randrange(vocabulary) for _ in range(length - 1))] for _ in range(count)]
