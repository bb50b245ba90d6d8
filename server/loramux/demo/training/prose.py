"""Prose written for this project. The last two pieces are held out of training."""

from __future__ import annotations

TYPED = (
    """The Lamp. My grandmother kept a lamp in the window of her kitchen, although the street
outside was lit well enough. When I asked her why, she said that a street lamp belongs to
everyone, and so nobody feels invited by it. Her lamp was for whoever was late. Years
afterwards I understood that she had been late once herself, long ago, and that somebody's
window had been dark.""",
    """On Bread. A loaf asks for four things: flour, water, salt and somebody with time. The
first three can be bought. The dough rises at its own speed, and the baker who hurries it
gets a brick. Most of the work is waiting in the right way, near enough to notice when
something changes and far enough to leave it alone. People who bake often become good
listeners.""",
    """The Ferry. Twice an hour the ferry crosses the river, and twice an hour the ferryman
counts his passengers as they come aboard and again as they leave. In thirty years the two
numbers have always agreed. He still counts. A number that never surprises you is not a
useless number, he says; it is a promise that keeps being kept.""",
    """A Clock. The clock in the hall ran four minutes fast, and everyone in the house knew it.
They subtracted four without thinking. One winter a visitor repaired it as a present, and
for a week the whole family was early for nothing, standing in the cold at empty stations.
On Sunday my father set it four minutes fast again.""",
    """Snow. At first the snow only corrected the garden, rounding the edges of the wall and
closing the gaps in the hedge. By noon it had an opinion about everything. The bicycles
became sleeping animals, the path forgot where it was going, and the postman, who always
whistled, walked past without a sound, as though someone had turned the world down.""",
    """The Library. There is a library in the valley with eleven shelves and one rule: whoever
takes a book writes a sentence on the last page. Nobody has to be clever. Some wrote what
they were eating, others what the weather did. Read in order, those sentences make a
better history of the valley than any of the books.""",
    """Maps. A good map leaves things out. It forgets the puddles, the parked carts, the woman
shaking a rug from her balcony, so that the road may be seen. A good story does the
opposite: it remembers the woman and the rug, and lets you guess about the road. It takes
both to bring a stranger home.""",
    """The Apprentice. In her first month the apprentice swept the floor of the workshop. In her
second she sharpened the tools, and in her third she was allowed to ask one question a
day. She spent the whole morning choosing it. When at last she was given wood to carve,
she found that she already knew what to do, since she had asked ninety good questions and
swept up ten thousand mistakes.""",
    """Rain. Everybody in our village forecasts the rain and nobody agrees. The shepherd trusts
his knee, the teacher believes the barometer, and the twins next door ask their tortoise.
I have kept a notebook since March. The knee is right two times out of three, the
barometer three out of four, and the tortoise has not been wrong yet, though it is often
late.""",
    """The Orchestra. Before the concert the musicians all play at once, each alone with a
difficult bar, and the noise is terrible. My brother, who was six, thought that this was
the music. He clapped when it stopped. Then the conductor raised a hand, and I watched my
brother's face discover that the same people with the same instruments could agree.""",
    """A Bridge. Two villages shared a river and could not agree about the bridge. One wanted
stone, the other wanted wood. In the end they built half of each, and the two halves met
in the middle over the deepest water, bolted together with iron that both had paid for. It
is an ugly bridge. It has carried every wedding and every quarrel for a century.""",
    """Packing. To pack a suitcase well, lay out everything you need and put half of it back.
Then pack one useless thing: a marble, a ribbon, the shell from last summer. The useful
things will be used up or washed or lost. It is the useless one that, far away in a rented
room, will make the drawer your own.""",
    """The Garden Wall. My neighbor and I mended the wall between our gardens every April,
passing stones across the gap. Neither of us remembered who had built it. One year we were
so deep in talk that we set the last stone and found ourselves both on the same side,
laughing, with his house out of reach. He had to climb. We have left a gate there since.""",
    """Lost and Found. The office of lost things is open on Thursdays. On the shelves are
umbrellas, naturally, and single gloves, and a trombone nobody has claimed since autumn.
The clerk behind the counter never asks for proof. She only asks people to describe what
they have lost, and listens to how they do it. Strangers describe an object, she told me,
while owners describe a day.""",
    """Night Train. The night train stops at our station for two minutes, just after three, and
almost no one gets off. But the lights of its windows travel along my ceiling, one square
after another, and if I happen to be awake I count the passengers who are awake as well.
There is always somebody reading. I have never met them, and I would know their lamps
anywhere.""",
    """Chess in the Park. The two old men under the chestnut have played the same game since
June. They move once a day. Passers-by study the board with their hands behind their backs
and offer advice, which is ignored. When it rains, a tin is put over every piece.
Yesterday one of them resigned, shook hands, and set up the pieces again with the colors
exchanged.""",
    """The Kite Maker. A kite has to want two things at once, explained the kite maker: to leave
and to be held. Without the string it is only rubbish that the wind has found. He ran his
thumb along the spine of bamboo, testing how it bent. Every child who comes in here asks
me for the one that flies highest. I sell them the one that pulls hardest, and they never
complain.""",
    """Soup for Strangers. On market days the inn cooks a soup without a recipe. Each trader
brings whatever was not sold, a bent carrot or a heap of beans, and it all goes into the
copper pot. No two soups have ever been equal. Travelers who ask what is in it get a shrug
for an answer, and a second bowl.""",
)
PIECES = tuple(" ".join(piece.split()) for piece in TYPED)
HELD_OUT = 2
