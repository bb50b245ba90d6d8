"""What is believed after so many observations."""

from __future__ import annotations

import numpy as np
import pytest

from loramux.speculation.beliefs import Beliefs


def test_few_observations_are_believed_less_than_what_everyone_did() -> None:
    beliefs = Beliefs(np.array([0.5]), window=500, trust=50)
    mine, other = beliefs.cells("me", "kind"), beliefs.cells("you", "kind")
    one = np.ones((1, 1))
    for _ in range(450):
        beliefs.see([other], one, 0.9 * one)
    everyone = (450 * 0.9 + 50 * 0.5) / 500
    assert beliefs.means([mine])[0, 0] == pytest.approx(everyone)
    for _ in range(50):
        beliefs.see([mine], one, 0 * one)
    everyone = (450 * 0.9 + 50 * 0.5) / 550
    assert beliefs.means([mine])[0, 0] == pytest.approx(everyone * 50 / 100)


def test_what_is_long_ago_is_forgotten() -> None:
    beliefs = Beliefs(np.array([0.5]), window=100, trust=10)
    cells = beliefs.cells("me", "kind")
    one = np.ones((1, 1))
    for _ in range(1000):
        beliefs.see([cells], one, one)
    assert beliefs.means([cells])[0, 0] > 0.98
    for _ in range(300):
        beliefs.see([cells], one, 0 * one)
    assert beliefs.means([cells])[0, 0] < 0.06


def test_one_step_may_see_a_class_often() -> None:
    together = Beliefs(np.array([0.5, 0.5]), window=100, trust=10)
    apart = Beliefs(np.array([0.5, 0.5]), window=100, trust=10)
    counts = np.array([[1.0, 1], [1, 1], [0, 0]])
    sums = np.array([[1.0, 0], [0, 1], [0, 0]])
    a = [together.cells("a", "x"), together.cells("b", "x"), together.cells("a", "x")]
    b = [apart.cells("a", "x"), apart.cells("b", "x"), apart.cells("a", "x")]
    together.see(a, counts, sums)
    for index in range(3):
        apart.see([b[index]], counts[index : index + 1], sums[index : index + 1])
    assert together.means(a) == pytest.approx(apart.means(b))


def test_those_not_asked_about_for_long_begin_again() -> None:
    beliefs = Beliefs(np.array([0.5]), window=100, trust=1, most_owners=4)
    one = np.ones((1, 1))
    for owner in "abcd":
        beliefs.see([beliefs.cells(owner, owner)], one, 0 * one)
    beliefs.cells("a", "a")
    beliefs.cells("e", "e")  # b was asked about the longest ago
    assert beliefs.means([beliefs.cells("a", "a")])[0, 0] < 0.25
    assert beliefs.means([beliefs.cells("b", "new")])[0, 0] == 0.5
    for number in range(1000):
        beliefs.cells(number, "new")
    assert len(beliefs._counts) == 64
