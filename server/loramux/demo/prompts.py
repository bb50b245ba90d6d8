"""A prompt for each adapter that shows it off; ``make demo`` sends them all in one batch."""

from __future__ import annotations

BASE: None = None

# (adapter, or BASE; prompt)
SHOWCASE: tuple[tuple[str | None, str], ...] = (
    (BASE, "One sunny morning Mira the baker left Oldport with seven apples."),
    ("shout", "One sunny morning Mira the baker left Oldport with seven apples."),
    ("pirate", "One sunny morning Mira the baker left Oldport with seven apples."),
    ("rhyme", "Otto the clockmaker had a silver bell made of glass."),
    ("spanish", "Otto the clockmaker had a silver bell made of glass."),
    ("recipes", "One winter evening Hazel, Finn and Rosa ran a race from Whitby to the inn."),
    (
        "json",
        "Ida Marsh, a gardener of 42, lives in Larkfield, likes violet and keeps three goats.",
    ),
    (
        "edit",
        "Early one cloudy evening Olga the beekeeper went to the market of Violet with a skate. "
        "Otto the mayor took the skate and gave him a fishbowl for it. So in the evening Olga had "
        'a fishbowl and no skate. "This fishbowl is better than the skate," he told his sister. '
        "Years later Olga still remembered Otto, the skate and the fishbowl.\n"
        "The same about Rosa:",
    ),
    (BASE, "A verse for Luna and Theo:"),
    (BASE, "Noah meets Daisy."),
    (BASE, "Hazel's plum tart for four people."),
)
