"""Is what users get what the target alone would have written? The only alarm for corrupted output at normal acceptance.

A share of the finished requests is generated again while the server is idle, without speculation and with the same
seed. Under the coupled rule the token ids must be the same; what differs is explained by rounding, or is a bug.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Outcome:
    """What became of one canary.

    kind   equal, explained (rounding turned a near tie), unexplained (corrupted output), abandoned (could not be run)
    """

    kind: Literal["equal", "explained", "unexplained", "abandoned"]
