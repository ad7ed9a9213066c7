"""A reward that every token of a response has a part in, and that about half of random responses get."""


def score(prompt: str, response: str, answer: str) -> float:
    """The share of characters with an odd code, less one half."""
    return sum(ord(character) % 2 for character in response) / max(len(response), 1) - 0.5


def one_in_four(prompt: str, response: str, answer: str) -> float:
    """1 for about a quarter of random responses, else 0."""
    return float(sum(map(ord, response)) % 4 == 0)
