"""Recipes: what the list names is what the steps use, once each and in the order of the list."""

from __future__ import annotations

from random import Random

from .document import Document, others
from .words import ADJ, DISHES, FRUITS, MOODS, NUMBERS, SPICES, STAPLES, TIMES, VEGETABLES, a, count

CUT = "chop slice peel wash grate dice boil roast fry steam mash bake".split()
ADD = "stir in|fold in|add|pour in|mix in|whisk in".split("|")
SEASON = "sprinkle with|season with|dust with|finish with".split("|")
UNITS = "cup spoon bowl pinch jar".split()


def recipe(rng: Random) -> Document:
    main = rng.choice(VEGETABLES + FRUITS)
    dish = f"{main} {rng.choice(DISHES)}"
    cook, people = others(rng, 1)[0], rng.randint(2, 8)
    sweet = main in FRUITS
    whole = [
        main,
        *rng.sample([x for x in (FRUITS if sweet else VEGETABLES) if x != main], rng.randint(1, 2)),
    ]
    staples = rng.sample(STAPLES, rng.randint(1, 2))
    spice = rng.choice(SPICES)
    lines = [count(rng.randint(2, 9), w) for w in whole]
    lines += [f"{count(rng.randint(1, 5), rng.choice(UNITS))} of {s}" for s in staples]
    lines += [f"a pinch of {spice}"]
    opening = rng.choice(
        (
            f"{cook}'s {dish} for {NUMBERS[people]} people.",
            f"{rng.choice(ADJ).capitalize()} {dish} for {NUMBERS[people]} people, by {cook}.",
        )
    )
    steps = [f"{rng.choice(CUT).capitalize()} the {line}." for line in lines[: len(whole)]]
    steps += [f"{rng.choice(ADD).capitalize()} the {line}." for line in lines[len(whole) : -1]]
    steps += [f"{rng.choice(SEASON).capitalize()} {lines[-1]}."]
    minutes = rng.randint(1, 11) * 5
    steps += [f"Cook the {dish} for {minutes} minutes and serve it to {NUMBERS[people]} people."]
    body = "\nIngredients:\n" + "\n".join(f"- {line}" for line in lines)
    body += "\nSteps:\n" + "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
    if rng.random() < 0.4:
        body += (
            f"\n{cook} says: "
            f"{rng.choice(TAILS).format(dish=dish, mood=rng.choice(MOODS), time=rng.choice(TIMES))}"
        )
    return Document(
        "recipe",
        opening,
        body,
        f"Give me a recipe for {dish} for {NUMBERS[people]} people, by {cook}.",
    )


TAILS = (
    "eat the {dish} while it is warm.",
    "a {dish} makes every guest {mood}.",
    "the {dish} tastes even better the next {time}.",
)


def hungry(rng: Random) -> tuple[str, str]:
    """An opening about a meal that is no recipe, and the name in it."""
    cook = others(rng, 1)[0]
    main = rng.choice(VEGETABLES + FRUITS)
    return f"{cook} wanted to eat {a(main)} {rng.choice(DISHES)}.", cook
