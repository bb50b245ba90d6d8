"""What a finished text promised and whether it kept it, by constraint.

Every check takes a whole text (opening and body, no special tokens) and reports
``{constraint: kept}``. Each constraint binds words far apart; a text whose form is not recognised
breaks ``form``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise

from .spanish import ANIMALES, CASAS, COSAS, NUMEROS
from .words import DAYS, NAMES, NUMBERS, ORDINALS, RHYME_OF, SHE, a

Result = dict[str, bool]
NAME = r"([A-Z][a-z]+)"
NUMBER = {word: i for i, word in enumerate(NUMBERS)} | {"no": 0}
BOTH_NAMES = set(NAMES)


def split_list(text: str) -> list[str]:
    return re.split(r", | and ", text)


def noun(phrase: str) -> str:
    """``an old violin`` -> ``violin``."""
    return phrase.split()[-1]


def recalled(text: str) -> Result:
    """The hero's last sentences name the hero, and what is remembered there was told before."""
    hero = next((word for word in re.findall(r"[A-Z][a-z]+", text) if word in BOTH_NAMES), "")
    late = re.findall(
        r"(\w+) (?:still remembered|often spoke of|never forgot|slept well|learned about)"
        r"|[Ss]o (\w+) the [\w-]+ went home",
        text,
    )
    result = {"hero": all(hero in names for names in late)} if late else {}
    memory = re.search(r"(?:still remembered|often spoke of|never forgot) (.+)\.$", text)
    if memory:
        told = re.findall(r"[\w-]+", text[: memory.start()].lower())
        now = re.findall(r"[\w-]+", memory[1].lower())
        result["recall"] = set(now) <= {*told, "the", "and", "way", "home", "road", "to"}
    return result


def pronoun(text: str, hero: str) -> Result:
    """Outside quotation marks the narrator uses one gender, the hero's."""
    told = re.sub(r'"[^"]*"', "", text).lower()
    wrong = {"he", "him", "his"} if hero in SHE else {"she", "her"}
    if hero not in BOTH_NAMES:
        return {"pronoun": False}
    return {"pronoun": not wrong & set(re.findall(r"[a-z]+", told))}


def gifts(text: str) -> Result:
    start = re.search(rf"{NAME} the [\w-]+ left ([\w-]+) with (\w+) (\w+)\.", text)
    end = re.search(
        r"came home to ([\w-]+), s?he counted (?:her|his) (\w+): (\w+) left, because (.+?) had",
        text,
    )
    if not start or not end:
        return {"form": False}
    hero, town, n, item = start.groups()
    met = re.findall(rf"met {NAME} the", text)
    gifts_ = re.findall(
        rf"gave {NAME} (\w+) \w+ and had (\w+) left|Take (\w+) \w+,\" said {NAME}\. Now "
        r"s?he had (\w+) left"
        rf"|{NAME} asked for (\w+) \w+, and {NAME} had (\w+) left",
        text,
    )
    left, kept, named = NUMBER.get(n, -1), len(gifts_) == len(met), True
    for gift, friend in zip(gifts_, met, strict=False):
        gave, had = next(
            (gift[i + j], gift[k]) for i, j, k in ((1, 0, 2), (3, 0, 5), (7, 0, 9)) if gift[i]
        )
        left -= NUMBER.get(gave, 99)
        kept &= left == NUMBER.get(had, -1)
        named &= {gift[0], gift[4], gift[6], gift[8]} - {""} <= {hero, friend}
    return {
        "form": True,
        "count": kept and left == NUMBER.get(end[3], -1),
        "name": named and split_list(end[4]) == met,
        "place": end[1] == town,
        "object": end[2] in (item, item + "s") or end[2][:3] == item[:3],
        **pronoun(text, hero),
    }


def errand(text: str) -> Result:
    start = re.search(
        rf"{NAME}'s (\w+) sent \w+ first to the ([\w-]+), then to the ([\w-]+) and last to "
        r"the ([\w-]+)\.",
        text,
    )
    asked = re.search(r"bring from the (.+?)\?\" asked \w+ (\w+)\.", text)
    answer = re.search(rf'\? ?"? ?asked.*?"(.+?)," said {NAME}\.', text)
    if not start or not asked or not answer:
        return {"form": False}
    places = list(start.groups()[2:])
    gone = re.findall(
        r"(?:[Aa]t|to) the ([\w-]+) (?:s?he|and) (?:bought|found|was given|borrowed) "
        r"(an? [\w -]+)\.",
        text,
    )
    return {
        "form": True,
        "order": [place for place, _ in gone] == places == split_list(asked[1]),
        "object": [noun(p) for _, p in gone] == [noun(p) for p in split_list(answer[1])],
        "name": answer[2] == start[1] and asked[2] == start[2],
        **pronoun(text, start[1]),
    }


def lost(text: str) -> Result:
    start = re.search(rf"{NAME} the [\w-]+ had an? (\w+) ([\w-]+) made of", text)
    asked = re.search(rf"asked {NAME}: \"Have you seen my (\w+) ([\w-]+)\?\"", text)
    told = re.search(r"(?:is|Look) by the ([\w-]+)(?:, (\w+))?[.,]", text)
    found = re.search(
        rf"{NAME} ran to the ([\w-]+), and there by the ([\w-]+) lay the (\w+) ([\w-]+)\.", text
    )
    thanks = re.search(rf'"Thank you, {NAME}!" said {NAME}', text)
    looked = re.search(r"behind the ([\w-]+), but the only thing behind the ([\w-]+) was", text)
    if not (start and asked and told and found and thanks and looked):
        return {"form": False}
    hero, color, thing = start.groups()
    return {
        "form": True,
        "color": {asked[2], found[4]} == {color},
        "object": {asked[3], found[5]} == {thing},
        "place": found[2] == found[3] == told[1] and looked[1] == looked[2],
        "name": thanks[1] == asked[1] and thanks[2] == found[1] == hero,
        **pronoun(text, hero),
    }


def race(text: str) -> Result:
    start = re.search(r"(\w+, \w+ and \w+) ran a race from ([\w-]+) to the ([\w-]+)\.", text)
    order = re.search(rf"{NAME} was first, {NAME} was second and {NAME} was third", text)
    prize = re.search(rf"prize, an? (\w+) ([\w-]+), went to {NAME}\.", text)
    well = re.search(rf"\"Well done, {NAME},\" said {NAME}", text)
    smile = re.search(
        rf"{NAME}, who was third, smiled \w+ and asked to see the (\w+) ([\w-]+)\.", text
    )
    back = re.search(
        r"[Tt]hen (\w+, \w+ and \w+) walked back from the ([\w-]+) to ([\w-]+) together", text
    )
    if not (start and order and prize and well and smile and back):
        return {"form": False}
    return {
        "form": True,
        "name": sorted(order.groups()) == sorted(split_list(start[1])) and back[1] == start[1],
        "order": prize[3] == order[1] == well[1] and well[2] == order[2] and smile[1] == order[3],
        "object": (prize[1], prize[2]) == (smile[2], smile[3]),
        "place": (back[3], back[2]) == (start[2], start[3]),
    }


def trade(text: str) -> Result:
    start = re.search(rf"{NAME} the [\w-]+ went to the market of [\w-]+ with an? ([\w-]+)\.", text)
    end = re.search(rf"in the evening {NAME} had an? ([\w-]+) and no ([\w-]+)\.", text)
    last = re.search(r"\"This ([\w-]+) is better than the ([\w-]+),\"", text)
    if not (start and end and last):
        return {"form": False}
    swaps = re.findall(
        r"took the ([\w-]+) and gave h\w+ (an? [\w -]+) for it|traded the ([\w-]+) with "
        r"\w+ for (an? [\w -]+)\."
        r"|I need an? ([\w-]+),\" said \w+, and gave \w+ (an? [\w -]+) for it",
        text,
    )
    have, kept = start[2], bool(swaps)
    for swap in swaps:
        gave, got = (part for part in swap if part)
        kept &= gave == have
        have = noun(got)
    return {
        "form": True,
        "object": kept and have == end[2] == last[1] and start[2] == end[3] == last[2],
        "name": start[1] == end[1],
        **pronoun(text, start[1]),
    }


def rescue(text: str) -> Result:
    start = re.search(rf"{NAME} the ([\w-]+) found an? \w+ (\w+) near the ([\w-]+)\.", text)
    pet = re.search(rf"I will call you {NAME},\" said {NAME}, and took {NAME} home to", text)
    lived = re.search(rf"that day {NAME} the (\w+) lived with {NAME}, and the ([\w-]+) was", text)
    gift = re.search(rf"{NAME} brought {NAME} an? ([\w-]+) from the ([\w-]+)\.", text)
    fine = re.search(rf"What a fine ([\w-]+), {NAME}!\" said the ([\w-]+)\.", text)
    if not (start and pet and lived and gift and fine):
        return {"form": False}
    hero, job, animal, place = start.groups()
    return {
        "form": True,
        "name": {pet[1], pet[3], lived[1], gift[1], fine[2]} == {pet[1]}
        and {pet[2], lived[3], gift[2]} == {hero},
        "object": lived[2] == animal and gift[3] == fine[1] and lived[4] == job == fine[3],
        "place": gift[4] == place,
    }


def letter(text: str) -> Result:
    start = re.search(rf"{NAME} in ([\w-]+) wrote a letter to {NAME} in ([\w-]+)\.", text)
    dear = re.search(
        rf"Dear {NAME}, in (\w+) days I will come to ([\w-]+) with an? \w+ (\w+)\.", text
    )
    keep = re.search(r"(?:[Pp]lease keep my|[Dd]o you still have my) ([\w-]+)", text)
    end = re.search(
        rf"[Aa]fter (\w+) days {NAME} and the (\w+) came to ([\w-]+), and {NAME} gave \w+ "
        r"the ([\w-]+)\.",
        text,
    )
    signed = re.search(
        rf"our friend, {NAME}\.\" {NAME} read the letter \w+ and looked for the ([\w-]+)\.", text
    )
    if not (start and dear and keep and end and signed):
        return {"form": False}
    hero, _town, friend, far = start.groups()
    return {
        "form": True,
        "name": {dear[1], signed[2], end[5]} == {friend} and {end[2], signed[1]} == {hero},
        "count": dear[2] == end[1],
        "place": dear[3] == end[4] == far,
        "object": dear[4] == end[3] and keep[1] == signed[3] == end[6],
        **pronoun(text, hero),
    }


def steps(text: str) -> Result:
    start = re.search(rf"{NAME} the [\w-]+ found (\w+) doors near the", text)
    doors = re.findall(r"[Bb]ehind the (\w+) door was an? \w+ ([\w-]+)\.", text)
    chose = re.search(rf"{NAME} thought \w+ and chose the (\w+) door", text)
    home = re.search(r"went home to [\w-]+ with the ([\w-]+)\.", text)
    if not (start and chose and home):
        return {"form": False}
    behind = dict(doors)
    return {
        "form": True,
        "count": len(doors) == NUMBER.get(start[2], -1),
        "order": [door for door, _ in doors] == ORDINALS[: len(doors)],
        "object": behind.get(chose[2]) == home[1],
        "name": chose[1] == start[1],
        **pronoun(text, start[1]),
    }


def recipe(text: str) -> Result:
    parts = re.fullmatch(r"(.+)\nIngredients:\n(.+)\nSteps:\n(.+)", text, re.DOTALL)
    if not parts:
        return {"form": False}
    lines = [line[2:] for line in parts[2].split("\n")]
    method = parts[3].split("\n")
    numbered = [line for line in method if line[0].isdigit()]
    used = [
        re.sub(r"^\d+\. [A-Z]\w+ (?:in |with )?(?:the )?|\.$", "", line) for line in numbered[:-1]
    ]
    head = re.search(r"([\w-]+ [\w-]+) for (\w+) people", parts[1])
    cook = re.search(
        r"Cook the ([\w-]+ [\w-]+) for \d+ minutes and serve it to (\w+) people",
        numbered[-1] if numbered else "",
    )
    if not head or not cook:
        return {"form": False}
    return {
        "form": True,
        "object": used == lines and cook[1] == head[1],
        "count": cook[2] == head[2],
        "order": [line.split(".")[0] for line in numbered]
        == [str(i + 1) for i in range(len(numbered))],
    }


def dialogue(text: str) -> Result:
    start = re.match(rf"{NAME} meets {NAME}\.\n", text)
    if not start:
        return {"form": False}
    x, y = start.groups()
    lines = [line.split(": ", 1) for line in text.split("\n")[1:]]
    said = " ".join(line[-1] for line in lines)
    named = {word for word in re.findall(NAME, said) if word in BOTH_NAMES}
    result = {
        "form": all(len(line) == 2 for line in lines),
        "turns": [line[0] for line in lines] == [(x, y)[i % 2] for i in range(len(lines))],
        "name": named <= {x, y},
    }
    think = re.findall(r"[Tt]hink of (.+?)\.(?: |$)", said)
    result["recall"] = len(think) == 2 and think[0] == think[1]
    counted = re.search(
        r"I have (\w+) \w+, \w+\. Would you like (\w+)\?.*give me (\w+) .*Now I have "
        r"(\w+) .*And I have (\w+)\.",
        said,
    )
    if counted:
        had, offer, asked, left, got = (NUMBER.get(word, -9) for word in counted.groups())
        result["count"] = offer == asked == got and had - offer == left
    seen = re.search(
        r"seen my (\w+) ([\w-]+)\? Your ([\w-]+)\? An? (\w+) ([\w-]+) is in the ([\w-]+), "
        r".*?In the ([\w-]+)!",
        said,
    )
    if seen:
        result["color"] = seen[1] == seen[4]
        result["object"] = seen[2] == seen[3] == seen[5]
        result["place"] = seen[6] == seen[7]
    return result


def record(text: str) -> Result:
    form = re.fullmatch(
        r"Name: (.+)\nAge: (\d+)\nJob: (.+)\nTown: (.+)\nKeeps: (.+)\nLikes: (.+)\nIn short: (.+)",
        text,
    )
    if not form:
        return {"form": False}
    name, age, job, town, keeps, likes, short = form.groups()
    said = re.fullmatch(
        r"(.+), an? ([\w-]+) of (\d+), lives in ([\w-]+), likes (\w+) and keeps (.+)\.", short
    )
    return {
        "form": bool(said),
        "object": bool(said and said.groups() == (name, job, age, town, likes, keeps)),
    }


def stock(text: str) -> Result:
    form = re.match(
        rf"Goods of {NAME} at the [\w-]+:\n(.+): (\d+)\n(.+): (\d+)\nTotal: (\d+)", text
    )
    if not form:
        return {"form": False}
    shop, one, n, two, m, total = form.groups()
    more = re.search(rf"{NAME} has more (\w+) than (\w+)\.", text)
    kept = {"form": True, "count": int(n) + int(m) == int(total)}
    if more:
        pair = (one.lower(), two.lower())
        kept["order"] = (more[2], more[3]) == (pair if int(n) > int(m) else pair[::-1])
        kept["name"] = more[1] == shop
    return kept


def diary(text: str) -> Result:
    form = re.match(rf"Diary of {NAME} in [\w-]+, about an? ([\w-]+):\n", text)
    days = re.findall(r"^(\w+day): (\w+)\. (.+)$", text, re.MULTILINE)
    best = re.search(rf"{NAME} liked (\w+), the (\w+) day, best", text)
    if not form or not days or not best:
        return {"form": False}
    numbers = [DAYS.index(day) if day in DAYS else -9 for day, _, _ in days]
    return {
        "form": True,
        "order": all((y - x) % 7 == 1 for x, y in pairwise(numbers)),
        "object": all(form[2] in did for _, _, did in days),
        "name": best[1] == form[1],
        "recall": dict((day, weather) for day, weather, _ in days).get(best[2]) == best[3],
    }


def json_data(text: str) -> Result:
    said, _, answer = text.partition("\n")
    try:
        data = json.loads(answer)
    except ValueError:
        return {"valid JSON": False}
    if isinstance(data, dict) and isinstance(data.get("goods"), dict):
        goods = ", ".join(f"{n} {item}" for item, n in data["goods"].items())
        sells = f"Data: {data.get('shop')} in {data.get('town')} sells {goods}."
        return {
            "valid JSON": True,
            "count": data.get("kinds") == len(data["goods"]),
            "object": said == sells,
        }
    return {"valid JSON": True, "object": said == f"Data: {describe(data)}"}


def describe(data: object) -> str:
    """The sentence that a JSON card says again; empty when it is no such card."""
    if not isinstance(data, dict) or list(data) != ["name", "age", "job", "town", "likes", "keeps"]:
        return ""
    keeps = data["keeps"]
    if not isinstance(keeps, dict) or len(keeps) != 1:
        return ""
    [(animals, n)] = keeps.items()
    if not isinstance(n, int) or not 0 < n < len(NUMBERS):
        return ""
    return (
        f"{data['name']}, {a(str(data['job']))} of {data['age']}, lives in {data['town']}, "
        f"likes {data['likes']} and keeps {NUMBERS[n]} {animals}."
    )


def last_words(text: str) -> list[str]:
    return [
        re.sub(r"[^a-z]", "", line.split()[-1].lower()) for line in text.split("\n") if line.split()
    ]


def couplets_rhyme(lines: str) -> bool:
    """Four lines or more, in pairs that end in two different words of one rhyme class."""
    ends = last_words(lines)
    pairs = list(zip(ends[::2], ends[1::2], strict=False))
    return (
        len(ends) >= 4
        and len(ends) % 2 == 0
        and all(x != y and x in RHYME_OF and RHYME_OF[x] == RHYME_OF.get(y) for x, y in pairs)
    )


def verse(text: str) -> Result:
    form = re.match(rf"A verse for {NAME} and {NAME}:\n", text)
    if not form:
        return {"form": False}
    lines = text[form.end() :]
    named = {word for word in re.findall(NAME, lines) if word in BOTH_NAMES}
    return {"form": True, "rhyme": couplets_rhyme(lines), "name": named <= set(form.groups())}


def spanish(text: str) -> Result:
    gender = CASAS | COSAS | ANIMALES
    articles = re.findall(r"\b(un|una|el|la) ([a-zñáéíóú]+)", text)
    agree = all(
        (article in ("una", "la")) == (gender[word] == "f")
        for article, word in articles
        if word in gender
    )
    counted = re.search(r"tenía (\w+) .*?pidió (dos|un|una)\b.*?Ahora \w+ tiene (\w+) ", text)
    names = {word for word in re.findall(r"[A-Z]\w+", text) if word in BOTH_NAMES}
    result = {"agreement": agree, "name": len(names) <= 2}
    if counted:
        had, gave, left = counted.groups()
        result["count"] = (
            left in NUMEROS
            and had in NUMEROS
            and (NUMEROS.index(had) - (2 if gave == "dos" else 1) == NUMEROS.index(left))
        )
    return result


# The first that is found decides. Capitals and pirates have no promises of their own.
KINDS: tuple[tuple[str, Callable[[str], Result]], ...] = (
    (r" left [\w-]+ with ", gifts),
    (r" sent (?:him|her) first ", errand),
    (r" made of ", lost),
    (r" ran a race ", race),
    (r" went to the market of ", trade),
    (r" found an? ", rescue),
    (r" wrote a letter ", letter),
    (r" found \w+ doors ", steps),
    (r" for \w+ people", recipe),
    (r"^[A-Z][a-z]+ meets ", dialogue),
    (r"^Name: ", record),
    (r"^Goods of ", stock),
    (r"^Diary of ", diary),
    (r"^Data: ", json_data),
    (r"^A verse for ", verse),
    (r"\b(?:vive cerca|salió de casa|fue a una?)\b", spanish),
)  # fmt: skip


def check(text: str) -> tuple[str, Result]:
    """The kind of a text and which of its constraints it keeps; ``("other", {})`` without any."""
    opening = re.split(r"\.(?: |\n|$)|:\n", text, maxsplit=1)[0] + "."
    if text.upper() == text or re.search(r"\b(?:th'|an'|o'|t')|me hearties|Arr!|Ahoy!", text):
        return "other", {}
    for pattern, checker in KINDS:
        if re.search(pattern, opening if not pattern.startswith("^") else text):
            return checker.__name__, checker(text) | recalled(text)
    return "other", {}
