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
        "One cloudy evening Olga the beekeeper went to the market of Violet with a skate. In the "
        "evening Olga had a pencil and no skate.\nThe same about Rosa:",
    ),
    (BASE, "A verse for Luna and Theo:"),
    (BASE, "Noah meets Daisy."),
    (BASE, "Hazel's plum tart for four people."),
)
