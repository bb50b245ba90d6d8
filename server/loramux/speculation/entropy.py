"""Which of two models a request goes on with, by how unsure the last tokens were (entropy-adaptive
decoding, arXiv 2502.06833).

    H_t = -sum p log2 p    of the raw distribution that token t was drawn from, by whichever model
    next = the large model   if mean(H of the last ``window``) > threshold
           the small model   otherwise

Nobody moves within ``min_dwell`` tokens of the last move, nor before there are ``window``
entropies. A move empties the window: how unsure one model was says nothing about the other. On both
the paper is silent.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import msgspec

from loramux.errors import InvalidRequest
from loramux.request import BASE_MODEL_ID, SMALL_MODEL_ID, EntropyAdaptive

VERSION = 1


class _State(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A router as bytes. ``drawn`` and ``computed`` are by the large model, then by the small."""

    version: int
    model_id: int
    dwell: int
    entropies: list[float]
    drawn: tuple[int, int]
    computed: tuple[int, int]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_State).decode


class Router:
    """The model a request is on, ``model_id``, and what it takes to know when to leave it."""

    def __init__(self, how: EntropyAdaptive) -> None:
        if math.isnan(how.threshold) or how.window < 1 or how.min_dwell < 0:
            raise InvalidRequest(
                "entropy_adaptive: threshold must be a number, window at least 1 and min_dwell at "
                f"least 0, not {how.threshold}, {how.window} and {how.min_dwell}",
                param="entropy_adaptive",
            )
        self.model_id = BASE_MODEL_ID if how.start == "large" else SMALL_MODEL_ID
        self._how = how
        self._entropies: deque[float] = deque(maxlen=how.window)
        self._dwell = 0
        self._drawn = {BASE_MODEL_ID: 0, SMALL_MODEL_ID: 0}
        self._computed = {BASE_MODEL_ID: 0, SMALL_MODEL_ID: 0}

    @classmethod
    def resumed(cls, how: EntropyAdaptive, state: bytes | None, num_outputs: int) -> Router:
        """As it was after ``num_outputs`` tokens. Raises InvalidRequest for a ``state`` that is not
        of such a request: another beginning would give other tokens."""
        router = cls(how)
        if state is None and num_outputs == 0:
            return router
        try:
            router._take(_decode(state or b""), num_outputs)
        except (msgspec.MsgspecError, ValueError) as error:
            raise InvalidRequest(
                f"resume: not the state of this entropy-adaptive request: {error}", param="resume"
            ) from error
        return router

    def _take(self, state: _State, num_outputs: int) -> None:
        if state.version != VERSION:
            raise ValueError(f"version {state.version}, not {VERSION}")
        if state.model_id not in self._drawn:
            raise ValueError(f"no model {state.model_id}")
        if sum(state.drawn) != num_outputs:
            raise ValueError(f"{sum(state.drawn)} tokens were drawn, {num_outputs} delivered")
        counts = (*state.drawn, *state.computed, state.dwell)
        many = len(state.entropies) > self._how.window
        if many or min(counts) < 0 or not all(map(math.isfinite, state.entropies)):
            raise ValueError("its numbers cannot be")
        self.model_id = state.model_id
        self._dwell = state.dwell
        self._entropies.extend(state.entropies)
        self._drawn = dict(zip(self._drawn, state.drawn, strict=True))
        self._computed = dict(zip(self._computed, state.computed, strict=True))

    @property
    def state(self) -> bytes:
        """All that the next moves depend on, for an engine that has the request's ids."""
        return _encode(
            _State(
                VERSION,
                self.model_id,
                self._dwell,
                list(self._entropies),
                (self._drawn[BASE_MODEL_ID], self._drawn[SMALL_MODEL_ID]),
                (self._computed[BASE_MODEL_ID], self._computed[SMALL_MODEL_ID]),
            )
        )

    @property
    def ledger(self) -> tuple[int, int, int, int]:
        """See wire.Output."""
        drawn, computed = self._drawn, self._computed
        return (
            drawn[BASE_MODEL_ID],
            drawn[SMALL_MODEL_ID],
            computed[BASE_MODEL_ID],
            computed[SMALL_MODEL_ID],
        )

    def computed(self, num_tokens: int) -> None:
        """So many tokens went through the model."""
        self._computed[self.model_id] += num_tokens

    def observe(self, entropy: float) -> int:
        """One more token was drawn, from a distribution of so many bits; the model for the next."""
        self._drawn[self.model_id] += 1
        self._entropies.append(entropy)
        self._dwell += 1
        wanted = self._wanted()
        if wanted != self.model_id:
            self.model_id = wanted
            self._entropies.clear()
            self._dwell = 0
        return wanted

    def _wanted(self) -> int:
        how = self._how
        if self._dwell < how.min_dwell or len(self._entropies) < how.window:
            return self.model_id
        mean = math.fsum(self._entropies) / how.window
        return BASE_MODEL_ID if mean > how.threshold else SMALL_MODEL_ID

    def follow(self, nodes: Sequence[int], entropies: Sequence[float]) -> list[int]:
        """Of ``nodes``, whose draws count one after the other, those up to the one that calls for
        the other model: what stands behind it is not this model's to say. ``entropies`` are by
        node."""
        drawn_by = self.model_id
        for count, node in enumerate(nodes, 1):
            if self.observe(entropies[node]) != drawn_by:
                return list(nodes[:count])
        return list(nodes)
