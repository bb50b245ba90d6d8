"""What drafters learn from text, by whose text it is, and no more of it than there is room for."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from loramux.request import Adapters, Request


class Store(Protocol):
    @property
    def num_bytes(self) -> int:
        """What it takes at present."""
        ...


S = TypeVar("S", bound=Store)
Owner = tuple[str, Adapters, str]


def owner(request: Request) -> Owner:
    """Whose text ``request`` has. Nothing of it is ever guessed for anyone else: how fast an answer
    comes would tell what others wrote."""
    return (request.tenant, request.adapters, request.cache_salt)


class Stores(Generic[S]):
    """One store for each owner, ``most_bytes`` in all: those not used for the longest go first."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._stores: dict[Owner, tuple[S, int]] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._stores)

    def use(self, whose: Owner) -> S | None:
        """The store of ``whose`` text, if there is one."""
        if (found := self._stores.pop(whose, None)) is None:
            return None
        self._stores[whose] = found
        return found[0]

    def keep(self, whose: Owner, store: S) -> None:
        """``store`` is new, or has perhaps become larger."""
        _, before = self._stores.pop(whose, (None, 0))
        self._stores[whose] = (store, store.num_bytes)
        self.num_bytes += store.num_bytes - before
        while self.num_bytes > self._most_bytes:
            oldest = next(iter(self._stores))
            self.num_bytes -= self._stores.pop(oldest)[1]
