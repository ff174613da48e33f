"""A method of your own at equal bytes: `amtl paper --quick --add examples/my_method.py`.

Hashing, the simplest of all: a value takes the row of its number modulo as many rows as fit.
"""

import torch
from amtl.peers import Facts, Part, Peer


class Modulo(Peer):
    """Rows shared by numbers that are equal modulo their count."""

    space = {"width": (16, 8, 4)}

    def __init__(self, facts: Facts, width: int = 16) -> None:
        super().__init__(facts)
        self.weight = self.row_table(facts.budget // (4 * width), width)

    def embed(self, rows: torch.Tensor) -> torch.Tensor:
        return self.padded(self.look_up(self.weight, rows % len(self.weight)))

    def parts(self) -> list[Part]:
        return [Part(self.weight.numel(), 32)]  # numbers, and the bits of each
