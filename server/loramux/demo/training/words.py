"""The lexicon of the demo text: plain lists, grouped by the slot they fill."""

from __future__ import annotations

SHE = (
    "Ada Alma Amy Anna Bea Bella Birgit Carla Cora Daisy Dina Edith Ella Elsa Emma Erin Eva Fay "
    "Flora Freya Gilda Grace Greta Hanna Hazel Heidi Ida Ines Iris Ivy Jana Jill Joan Judy June "
    "Kate Kira Lara Lena Lily Lina Lola Lucy Luna Mabel Maya Mia Mina Mira Molly Nadia Nell Nina "
    "Nora Olga Olive Paula Pearl Petra Polly Rita Rosa Rose Ruby Ruth Sara Selma Sofia Stella "
    "Tara Tess Thea Tilda Una Vera Viola Wanda Willa Yara Zelda Zoe"
).split()
HE = (
    "Adam Albert Alfred Anton Arlo Arne Axel Basil Ben Boris Bruno Carl Cole Cyrus Dan Dario "
    "David Dirk Edgar Eli Emil Ernest Felix Finn Frank Fred Gabe Georg Gus Hamid Hans Harry Henry "
    "Hugo Ian Igor Ivan Jack Jan Jasper Joel Jonas Kai Karl Kurt Lars Leo Leon Linus Louis Luca "
    "Luis Magnus Marco Martin Max Miles Milo Nils Noah Omar Oscar Otto Paul Percy Peter Pip Ralf "
    "Remy Robin Rolf Rufus Sam Simon Sven Tariq Theo Tim Tom Toby Udo Victor Walter Wim Yusuf "
    "Zack"
).split()
NAMES = SHE + HE

SURNAMES = (
    "Abbot Ashby Barlow Becker Birch Bolt Brook Carver Clark Cobb Cooper Crane Dale Dyer Falk "
    "Field Finch Fisher Forge Fox Frost Gale Glover Gray Grove Hale Hill Holt Hood Hunter Keller "
    "Kemp Lake Lamb Lark Linden Lowe Marsh Mason Mills Moss Nash North Oakes Orchard Page Parr "
    "Pike Pond Porter Quill Reed Ridge Rook Sage Sharp Shaw Stone Swift Tanner Thorn Tyler Vale "
    "Voss Wade Walsh Ward Webb Wells West Wilder Winter Wolf Wood Wren Yates York"
).split()

TOWNS = (
    "Oldport Ashford Millbrook Redhill Graywick Larkfield Stonebridge Westmoor Foxley Elmstead "
    "Brightwater Coldharbor Duckworth Eastmere Fernhill Goldcrest Hollowdale Ironbury Juniper "
    "Kingsley Longmeadow Marlow Northwold Oakham Pinecliff Quarry Rosedale Saltmarsh Thornbury "
    "Underhill Violet Whitby Yarrow Amberley Birchwood Clearwell Dunmore Everly Fairhaven "
    "Greenloch Heathcote Inkpen Kelso Lindale Mossgate Newbridge Otterby Penrose Rowan Silverton "
    "Tilbury Upwey Wexham Applegarth Barrow Cranmoor Deepwell Farrow Bramble Chesterfield "
    "Dovecote Elderby Fallowfield Gladwin Harrowgate Ivybridge Kettering Lavenham Merriford "
    "Nettleton Oxbow Petersfield Ravenna Shipton Tamworth Ulverston Wetherby"
).split()

JOBS = (
    "baker miller sailor tailor farmer teacher gardener painter potter weaver fisher doctor "
    "carpenter blacksmith shepherd merchant clerk cook nurse hunter singer dancer juggler printer "
    "glassblower beekeeper ferryman lighthouse-keeper librarian locksmith clockmaker shoemaker "
    "bookbinder stonemason beadmaker ropemaker woodcutter postman pilot baron judge mayor student "
    "piper drummer fiddler cheesemaker brewer candlemaker chimney-sweep goatherd mapmaker "
    "toymaker watchman wheelwright plumber electrician astronomer botanist geologist poet "
    "novelist sculptor violinist trumpeter conductor acrobat magician umbrella-mender broom-maker "
    "soap-boiler saddler cobbler butcher grocer florist perfumer inventor explorer engineer"
).split()

ANIMALS = (
    "goat hen duck cat dog pony donkey rabbit goose lamb pig cow horse turtle parrot owl crow "
    "robin sparrow pigeon swan heron otter badger fox hedgehog squirrel mole frog toad snail "
    "beetle bee moth spider lizard ferret hamster bear wolf deer hare raven magpie falcon stork "
    "pelican penguin seal whale crab lobster salmon eel trout camel llama monkey tiger lion "
    "elephant giraffe panda beaver raccoon weasel peacock turkey woodpecker kingfisher flamingo "
    "ostrich dragonfly butterfly grasshopper cricket hippo rhino zebra koala kangaroo walrus "
    "octopus jellyfish salamander newt chameleon iguana alpaca buffalo antelope"
).split()
FARM = (
    "goat hen duck cat dog pony donkey rabbit lamb pig cow horse turtle parrot pigeon swan".split()
)

THINGS = (
    "kite lantern basket drum flute whistle mirror candle hammer ladder bucket blanket pillow "
    "teapot kettle mug plate bowl spoon ring crown button ribbon needle thimble scarf hat coat "
    "boot glove umbrella cloak map compass telescope book letter pencil feather stamp coin purse "
    "box chest key lock bell clock watch violin trumpet guitar harp ball puppet doll puzzle sled "
    "cart wagon wheel rope anchor oar sail net hook broom shovel rake saw axe nail brush jar "
    "bottle barrel sack trunk chair stool table shelf carpet curtain vase statue painting banner "
    "flag tent hammock swing balloon marble domino card rocket robot magnet lamp torch helmet "
    "shield saddle stirrup collar leash nest shell pebble crystal pearl cradle ladle sieve funnel "
    "spade sickle lamppost bookmark notebook chalkboard easel accordion banjo tambourine "
    "xylophone cello inkwell wallet backpack suitcase lunchbox thermos mitten slipper apron "
    "necklace bracelet brooch earring skate surfboard canoe raft paddle windsock weathervane "
    "doorbell doormat pitchfork wheelbarrow scarecrow birdhouse beehive fishbowl snowglobe "
    "pendulum abacus hourglass sundial kaleidoscope microscope periscope typewriter "
    "spinning-wheel bagpipe gong"
).split()
SMALL = (
    "apple pear plum cherry lemon orange peach fig nut acorn egg bun biscuit candle button coin "
    "bead shell pebble marble feather ribbon stamp card nail rose tulip daisy lily carrot turnip "
    "onion potato pumpkin cabbage mushroom pancake pretzel muffin waffle"
).split()

PLACES = (
    "mill market bridge well tower harbor church school library garden orchard forest meadow "
    "river lake hill cave barn stable inn bakery workshop station lighthouse castle square "
    "fountain windmill pier beach island swamp valley cliff quarry field vineyard greenhouse "
    "cellar attic kitchen courtyard gate museum theater post-office smithy dairy tavern chapel "
    "crossroads waterfall ferry dock granary park bandstand boathouse cheese-cellar clocktower "
    "lookout mountain-pass nursery pasture pavilion playground pond prairie racetrack reservoir "
    "rooftop shipyard stadium terrace toll-house tunnel vault warehouse watermill wharf woodshed"
).split()

COLORS = (
    "red blue green yellow white black brown purple orange pink gray golden silver scarlet "
    "crimson violet turquoise ivory copper emerald"
).split()
ADJ = (
    "old new small big tiny huge heavy light strange lovely simple fine broken shiny dusty rusty "
    "wooden wet dry warm cold soft hard round square long short narrow wide deep shallow clean "
    "dirty bright dark quiet noisy gentle wild clever foolish brave shy proud humble merry gloomy "
    "patient hasty honest sly hungry thirsty sleepy lively lazy busy kind grumpy curious careful "
    "careless cheerful lonely lucky clumsy graceful polite rude jolly modest nervous calm "
    "stubborn generous famous ancient empty splendid crooked smooth rough sharp blunt thick thin "
    "sweet bitter sour salty fresh plain fancy faded spotted striped painted polished cracked "
    "tangled hollow sturdy fragile enormous slender chubby feathery furry woolly silky velvety "
    "glittering gleaming cozy drafty muddy sandy mossy leafy thorny prickly slippery wobbly "
    "squeaky creaky rattling mysterious magical ordinary peculiar elegant rustic handsome"
).split()
MOODS = (
    "happy sad glad proud tired worried surprised angry calm cheerful content delighted grateful "
    "puzzled hopeful relieved excited curious ashamed thoughtful amused bored brave confident "
    "confused disappointed eager embarrassed frightened impatient jealous joyful lonesome nervous "
    "peaceful pleased restless serene shocked stubborn tearful weary"
).split()
ADVERBS = (
    "slowly quickly quietly loudly gently carefully happily sadly proudly softly bravely calmly "
    "eagerly kindly politely patiently suddenly warmly wisely gladly cheerfully thoughtfully "
    "lazily neatly firmly nervously honestly brightly merrily solemnly boldly briskly clumsily "
    "courteously dreamily faithfully fearlessly gracefully hastily joyfully loyally modestly "
    "playfully promptly secretly sleepily swiftly tenderly timidly wearily"
).split()
WEATHER = (
    "sunny rainy windy foggy snowy cloudy stormy frosty misty warm cold mild chilly dry wet "
    "bright gray quiet golden hazy"
).split()
TIMES = "morning evening afternoon night day".split()
SEASONS = "spring summer autumn winter".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
KIN = {
    "she": "mother sister aunt grandmother cousin niece daughter neighbor".split(),
    "he": "father brother uncle grandfather nephew son".split(),
}
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()
ORDINALS = "first second third fourth fifth".split()
MATERIALS = (
    "wood clay glass iron brass tin wool silk linen leather stone paper wax straw ivory bone "
).split()

SCENERY = (
    "wind rain sun moon snow fog river sea sky grass road smoke leaf cloud shadow star echo dust "
    "wave stream breeze frost mist thunder lightning rainbow twilight dawn dusk sunset drizzle "
    "hail moonlight sunlight blizzard puddle horizon harvest blossom pollen fragrance"
).split()
DID = (
    "whispered danced wandered drifted rested shimmered trembled waited turned hummed sparkled "
    "rolled sang murmured glowed faded crept slept floated gathered lingered rushed flickered "
    "swirled tumbled stretched sighed vanished ripened scattered thickened brightened"
).split()
LEARNED = ("patience kindness courage honesty friendship hope luck trust wisdom humor").split()

VEGETABLES = (
    "carrot onion leek potato turnip beet parsnip cabbage tomato cucumber pepper pumpkin radish "
    "mushroom spinach celery garlic fennel lentil bean pea corn zucchini eggplant kale"
).split()
FRUITS = (
    "apple pear plum cherry lemon orange peach fig grape melon apricot quince raspberry blueberry "
    "strawberry blackberry currant banana mango date"
).split()
STAPLES = (
    "flour rice oats barley noodles bread butter milk cream cheese honey sugar oil vinegar yeast "
).split()
SPICES = (
    "salt pepper cinnamon nutmeg ginger thyme basil parsley mint saffron rosemary sage dill "
    "paprika cumin vanilla clove mustard"
).split()
DISHES = (
    "soup stew pie cake salad pudding porridge bread pancakes dumplings casserole broth tart jam "
    "omelet curry chowder biscuits crumble noodles"
).split()

# Words in one class rhyme with each other and with no word of another class.
# Few and common: a small model learns a rhyme from many examples of each word.
RHYMES: dict[str, list[str]] = {
    "ight": "light night kite".split(),
    "ee": "sea bee key".split(),
    "ake": "lake cake rake".split(),
    "ell": "bell shell well".split(),
    "oat": "boat goat coat".split(),
    "ock": "clock rock lock".split(),
    "ing": "ring thing spring swing".split(),
    "oon": "moon spoon balloon".split(),
    "ill": "hill mill quill".split(),
    "air": "bear chair pear hare square".split(),
    "ool": "pool stool school".split(),
    "own": "town crown clown".split(),
    "ook": "book hook cook".split(),
    "ower": "flower tower shower".split(),
    "ar": "star jar guitar".split(),
    "est": "nest chest guest".split(),
    "og": "dog frog fog".split(),
    "ed": "bread bed sled".split(),
    "ore": "door oar shore".split(),
    "eel": "wheel eel seal".split(),
}
RHYME_OF = {word: sound for sound, group in RHYMES.items() for word in group}

IRREGULAR_PLURALS = {
    "goose": "geese", "sheep": "sheep", "wolf": "wolves", "deer": "deer", "leaf": "leaves",
    "salmon": "salmon", "trout": "trout", "watch": "watches", "shelf": "shelves", "mouse": "mice",
}  # fmt: skip


def plural(noun: str) -> str:
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun in ("potato", "tomato", "mango"):
        return noun + "es"
    return noun + "s"


def count(n: int, noun: str) -> str:
    """``three apples``, ``one apple``, ``no apples``."""
    if n == 0:
        return f"no {plural(noun)}"
    return f"{NUMBERS[n]} {noun if n == 1 else plural(noun)}"


def a(phrase: str) -> str:
    vowel = phrase[0].lower() in "aeiou" or phrase.startswith(("hon", "hour"))
    return ("an " if vowel else "a ") + phrase


def both(words: list[str]) -> str:
    """``x, y and z``."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
