"""Short stories with promises to keep: names, counts, orders, colours told early bind the rest."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .document import Document, Person, others, para, person
from .words import (
    ADJ,
    ADVERBS,
    ANIMALS,
    COLORS,
    DID,
    JOBS,
    LEARNED,
    MATERIALS,
    MOODS,
    NUMBERS,
    ORDINALS,
    PLACES,
    SCENERY,
    SEASONS,
    SMALL,
    THINGS,
    TIMES,
    TOWNS,
    WEATHER,
    a,
    both,
    count,
    plural,
)

# A plot: the opening, the sentences after it, the request for it, and what it was about.
Plot = tuple[str, list[str], str, list[str]]


def when(rng: Random) -> str:
    return rng.choice(
        (
            f"one {rng.choice(WEATHER)} {rng.choice(TIMES)}",
            f"on a {rng.choice(WEATHER)} day in {rng.choice(SEASONS)}",
            f"early one {rng.choice(WEATHER)} {rng.choice(TIMES)}",
            f"one {rng.choice(SEASONS)} {rng.choice(TIMES)}",
        )
    )


def scenery(rng: Random, hero: Person) -> str:
    thing, did = rng.choice(SCENERY), rng.choice(DID)
    return rng.choice(
        (
            f"the {thing} {did} over {hero.town}.",
            f"all around {hero.town} the {thing} {did}.",
            f"{hero.name} watched how the {thing} {did}.",
            f"the {thing} {did} and {hero.name} felt {rng.choice(MOODS)}.",
        )
    )


def ending(rng: Random, hero: Person) -> str:
    return rng.choice(
        (
            f"that night {hero.name} slept well in {hero.town}.",
            f"so {hero.name} the {hero.job} went home to {hero.town}, {rng.choice(MOODS)} "
            f"and {rng.choice(MOODS)}.",
            f"and that is how {hero.name} learned about {rng.choice(LEARNED)}.",
            f"and {hero.name} told {hero.her} {hero.kin} all about it.",
        )
    )


def memory(rng: Random, hero: Person, about: list[str]) -> str:
    """A last sentence that names again, in the story's order, what the story was about."""
    start = rng.choice(("years later", "when winter came", "many years after that", "to this day"))
    verb = rng.choice(("still remembered", "often spoke of", "never forgot"))
    return f"{start} {hero.name} {verb} {both(about)}."


def gifts(rng: Random, hero: Person) -> Plot:
    n, item = rng.randint(4, 12), rng.choice(SMALL)
    opening = f"{when(rng)} {hero.name} the {hero.job} left {hero.town} with {count(n, item)}."
    out: list[str] = []
    friends = others(rng, rng.randint(2, 3), hero.name)
    left = n
    for i, friend in enumerate(friends):
        k = rng.randint(1, max(1, left - (len(friends) - i)))
        k = min(k, 4)
        place = rng.choice(PLACES)
        out.append(
            f"at the {place} {hero.she} met {friend} the {rng.choice(JOBS)}, who was "
            f"{rng.choice(MOODS)}."
        )
        left -= k
        out.append(
            rng.choice(
                (
                    f"{hero.name} gave {friend} {count(k, item)} and had {NUMBERS[left]} left.",
                    f'"Take {count(k, item)}," said {hero.name}. Now {hero.she} had '
                    f"{NUMBERS[left]} left.",
                    f"{friend} asked for {count(k, item)}, and {hero.name} had "
                    f"{NUMBERS[left]} left.",
                )
            )
        )
    out.append(
        f"when {hero.she} came home to {hero.town}, {hero.she} counted {hero.her} {plural(item)}: "
        f"{NUMBERS[left]} left, because {both(friends)} had the others."
    )
    ask = f"Tell me a story about {hero.name} and {count(n, item)}."
    return opening, out, ask, [*friends, f"the {plural(item)}", f"the way home to {hero.town}"]


def errand(rng: Random, hero: Person) -> Plot:
    places, goods = rng.sample(PLACES, 3), rng.sample(THINGS, 3)
    opening = (
        f"{when(rng)} {hero.name}'s {hero.kin} sent {hero.him} first to the {places[0]}, "
        f"then to the {places[1]} "
        f"and last to the {places[2]}."
    )
    out = [scenery(rng, hero)] if rng.random() < 0.4 else []
    for i, (place, good) in enumerate(zip(places, goods, strict=True)):
        verb = rng.choice(("bought", "found", "was given", "borrowed"))
        start = (
            "at the",
            f"then {hero.name} walked {rng.choice(ADVERBS)} to the",
            "last of all, at the",
        )[i]
        link = " and" if i == 1 else f" {hero.she}"
        out.append(f"{start} {place}{link} {verb} {a(good)}.")
    out.append(f'"What did you bring from the {both(places)}?" asked {hero.her} {hero.kin}.')
    out.append(f'"{a(goods[0]).capitalize()}, {a(goods[1])} and {a(goods[2])}," said {hero.name}.')
    ask = f"Tell me a story about {hero.name}, who must go to the {both(places)}."
    return opening, out, ask, [f"the {noun}" for noun in (*places, *goods)]


def lost(rng: Random, hero: Person) -> Plot:
    color, thing = rng.choice(COLORS), rng.choice(THINGS)
    seen, end = rng.sample(PLACES, 2)
    friend = others(rng, 1, hero.name)[0]
    opening = (
        f"{hero.name} the {hero.job} had {a(f'{color} {thing}')} made of {rng.choice(MATERIALS)}."
    )
    out = [
        f"{when(rng)} the {color} {thing} was gone.",
        f"{hero.name} looked {rng.choice(ADVERBS)} behind the {seen}, but the only thing "
        f"behind the {seen} was "
        f"{a(f'{rng.choice(ADJ)} {rng.choice(ANIMALS)}')}.",
        f'then {hero.she} asked {friend}: "Have you seen my {color} {thing}?"',
        rng.choice(
            (
                f'"Yes, {hero.name}," said {friend}. "Your {thing} is by the {end}."',
                f'"Look by the {end}, {hero.name}," said {friend}.',
            )
        ),
        f"{hero.name} ran to the {end}, and there by the {end} lay the {color} {thing}.",
        f'"Thank you, {friend}!" said {hero.name}, and {hero.she} was {rng.choice(MOODS)} again.',
    ]
    ask = f"Tell me a story about {hero.name} and {a(f'{color} {thing}')}."
    return opening, out, ask, [f"the {color} {thing}", f"the {seen}", friend, f"the {end}"]


def race(rng: Random, hero: Person) -> Plot:
    runners = [hero.name, *others(rng, 2, hero.name)]
    order = rng.sample(runners, 3)
    place, prize, color = rng.choice(PLACES), rng.choice(THINGS), rng.choice(COLORS)
    opening = f"{when(rng)} {both(runners)} ran a race from {hero.town} to the {place}."
    ways = [rng.choice(ADVERBS) for _ in runners]
    out = [scenery(rng, hero)] if rng.random() < 0.4 else []
    out.append(f"{order[0]} was first, {order[1]} was second and {order[2]} was third.")
    out.append(f"so the prize, {a(f'{color} {prize}')}, went to {order[0]}.")
    out.append(f'"Well done, {order[0]}," said {order[1]} {ways[0]}.')
    out.append(f"{order[2]}, who was third, smiled {ways[1]} and asked to see the {color} {prize}.")
    out.append(f"then {both(runners)} walked back from the {place} to {hero.town} together.")
    ask = f"Tell me about the race of {both(runners)}."
    return (
        opening,
        out,
        ask,
        [*(name for name in order if name != hero.name), f"the {color} {prize}", f"the {place}"],
    )


def trade(rng: Random, hero: Person) -> Plot:
    goods = rng.sample(THINGS, rng.randint(3, 4))
    partners = others(rng, len(goods) - 1, hero.name)
    opening = (
        f"{when(rng)} {hero.name} the {hero.job} went to the market of {hero.town} "
        f"with {a(goods[0])}."
    )
    out: list[str] = []
    for have, want, partner in zip(goods, goods[1:], partners, strict=False):
        out.append(
            rng.choice(
                (
                    f"{partner} the {rng.choice(JOBS)} took the {have} and gave "
                    f"{hero.him} {a(want)} for it.",
                    f"{hero.she} traded the {have} with {partner} for "
                    f"{a(f'{rng.choice(ADJ)} {want}')}.",
                    f'"I need {a(have)}," said {partner}, and gave {hero.name} {a(want)} for it.',
                )
            )
        )
    out.append(f"so in the evening {hero.name} had {a(goods[-1])} and no {goods[0]}.")
    out.append(
        f'"This {goods[-1]} is better than the {goods[0]}," {hero.she} told {hero.her} {hero.kin}.'
    )
    ask = f"Tell me a story about {hero.name}, who trades {a(goods[0])}."
    return opening, out, ask, [*partners, *(f"the {good}" for good in goods)]


def rescue(rng: Random, hero: Person) -> Plot:
    animal, adj, place = rng.choice(ANIMALS), rng.choice(ADJ), rng.choice(PLACES)
    pet = others(rng, 1, hero.name)[0]
    gift = rng.choice(THINGS)
    opening = (
        f"{when(rng)} {hero.name} the {hero.job} found {a(f'{adj} {animal}')} near the {place}."
    )
    out = [
        rng.choice(
            (
                f"the {animal} was {rng.choice(MOODS)} and could not leave the {place}.",
                f'"Please help me," said the {animal} {rng.choice(ADVERBS)}.',
            )
        ),
        f'"I will call you {pet}," said {hero.name}, and took {pet} home to {hero.town}.',
        scenery(rng, hero),
        f"from that day {pet} the {animal} lived with {hero.name}, and the {hero.job} was "
        f"never {rng.choice(MOODS)} again.",
        f"after {count(rng.randint(2, 9), 'year')} {pet} brought {hero.name} {a(gift)} "
        f"from the {place}.",
        f'"What a fine {gift}, {pet}!" said the {hero.job}.',
    ]
    ask = f"Tell me a story about {hero.name} and {a(f'{adj} {animal}')}."
    return opening, out, ask, [f"{pet} the {adj} {animal}", f"the {place}", f"the {gift}"]


def letter(rng: Random, hero: Person) -> Plot:
    friend = others(rng, 1, hero.name)[0]
    far = rng.choice([t for t in TOWNS if t != hero.town])
    n, animal, thing = rng.randint(2, 9), rng.choice(ANIMALS), rng.choice(THINGS)
    opening = f"{when(rng)} {hero.name} in {hero.town} wrote a letter to {friend} in {far}."
    out = [
        f'"Dear {friend}, in {count(n, "day")} I will come to {far} with '
        f"{a(f'{rng.choice(ADJ)} {animal}')}.",
        f"the weather in {hero.town} is {rng.choice(WEATHER)}.",
        rng.choice((f"please keep my {thing} for me.", f"do you still have my {thing}?")),
        f'your friend, {hero.name}."',
        f"{friend} read the letter {rng.choice(ADVERBS)} and looked for the {thing}.",
        f"after {count(n, 'day')} {hero.name} and the {animal} came to {far}, and "
        f"{friend} gave {hero.him} the {thing}.",
    ]
    ask = f"Tell me a story about a letter from {hero.name} to {friend}."
    return opening, out, ask, [friend, f"the {animal}", f"the {thing}", f"the road to {far}"]


def steps(rng: Random, hero: Person) -> Plot:
    k = rng.randint(3, 4)
    things = rng.sample(THINGS, k)
    place = rng.choice(PLACES)
    opening = f"{hero.name} the {hero.job} found {count(k, 'door')} near the {place}."
    out = [
        f"behind the {ORDINALS[i]} door was {a(f'{rng.choice(COLORS)} {thing}')}."
        for i, thing in enumerate(things)
    ]
    pick = rng.randrange(k)
    out.append(f"{hero.name} thought {rng.choice(ADVERBS)} and chose the {ORDINALS[pick]} door.")
    out.append(f"so {hero.she} went home to {hero.town} with the {things[pick]}.")
    ask = f"Tell me a story about {hero.name} and {count(k, 'door')}."
    return opening, out, ask, [f"the {place}", *(f"the {thing}" for thing in things)]


PLOTS: tuple[Callable[[Random, Person], Plot], ...] = (
    gifts, errand, lost, race, trade, rescue, letter, steps,
)  # fmt: skip


def story(rng: Random) -> Document:
    hero = person(rng)
    opening, sentences, ask, about = rng.choice(PLOTS)(rng, hero)
    if rng.random() < 0.4:
        sentences.append(ending(rng, hero))
    if rng.random() < 0.8:
        sentences.append(memory(rng, hero, about))
    return Document("story", para([opening]), " " + para(sentences), ask)
