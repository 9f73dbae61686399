"""A method in the tower and one behind it: ``luvc+mosaic``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..budget import tokens_to_keep
from ..errors import UsageError
from ..variant import TowerVariant
from .base import Method
from .options import spell
from .tower_method import TowerMethod


@dataclass(frozen=True)
class Joined(TowerMethod):
    """``tower`` has the tower leave at most a part of the tokens, ``leave``, and ``then`` chooses among these.

    Choosing at the end cannot save the tower any time, and what merges on the way cannot know what will count. Where
    more is to be kept than ``leave``, the tower leaves that. Ours.
    """

    tower: TowerMethod
    then: Method
    leave: float = 0.75

    source: ClassVar[str] = "ours"

    def __post_init__(self) -> None:
        if (
            not isinstance(self.tower, TowerMethod) or isinstance(self.then, TowerMethod) or self.tower.behind
            or not self.then.compresses
        ):  # fmt: skip
            raise UsageError(
                f"method {self}: join one that acts in the tower or before it with one that chooses among its tokens, "
                "in this order: luvc+mosaic"
            )
        super().__post_init__()
        if not 0 < self.leave < 1:
            raise UsageError(f"method {self}: leave must lie between 0 and 1")

    def __str__(self) -> str:
        """The text that ``get_method`` reads back."""
        first = str(self.tower)
        if self.leave != Joined.leave:
            first += f"{',' if ':' in first else ':'}leave={spell(self.leave)}"
        return f"{first}+{self.then}"

    @property
    def name(self) -> str:  # type: ignore[override]
        """Of both."""
        return f"{self.tower.name}+{self.then.name}"

    @property
    def needs(self) -> frozenset[str]:
        """What the second needs."""
        return self.then.needs

    @property
    def wants(self) -> frozenset[str]:  # type: ignore[override]
        """What the second wants."""
        return self.then.wants

    @property
    def behind(self) -> Method:
        """The second."""
        return self.then

    def leaves(self, keep: int | float, before: int) -> int:
        """The larger of ``leave`` and ``keep``."""
        return max(math.ceil(self.leave * before), tokens_to_keep(keep, before))

    def variant(
        self, wanted: int, grid: tuple[int, int], blocks: int, side: int = 1, window: int | None = None
    ) -> TowerVariant:
        """The first's."""
        return self.tower.variant(wanted, grid, blocks, side, window)
