"""Words and prose that the tasks are made of. All of it is our own, so that they need no text from elsewhere."""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import count


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    """
    anchor apple arrow barrel basket beacon bell blanket boat bottle branch bridge brush bucket button cabin camera
    candle canoe carpet castle chair chimney circle clock cloud coat coin compass copper corner cotton cradle crown
    curtain desert diamond door drum eagle engine feather fence field flag flute forest fountain garden gate glass
    glove guitar hammer harbor hat helmet hill honey horse island jacket jewel kettle key kitchen ladder lake lamp
    lantern leaf lemon letter lion market meadow mirror moon mountain needle nest ocean orange orchard paper parrot
    pebble pencil piano pillow planet pocket pond pony quilt rabbit ribbon river road rocket rope sail salmon school
    shadow shell shirt silver spoon stable star stone storm sugar table temple thread tiger tower train tree tunnel
    umbrella valley violin wagon wall water wheel whistle window winter wolf
    """
)
ADJECTIVES = _words(
    """
    amber ancient bitter blue bold brave brief bright brown busy calm careful clean clear clever cold crisp curious
    dark deep distant dry dusty eager early empty faint fast fierce final flat fresh friendly gentle giant glad golden
    grand gray green happy heavy hidden hollow honest humble icy idle jolly kind large late lazy light little lively
    lonely long loud lucky mellow mild modern narrow neat noble odd old open pale patient plain polite proud purple
    quick quiet rapid rare red rough round rusty sharp shiny short shy silent simple sleepy slow small smooth soft
    solid steady still strong sweet swift tall tame tender thin tiny tough vast warm wet white wide wild wise young
    """
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

_PEOPLE = _words(
    """
    baker captain carpenter clerk cook doctor driver farmer fisher gardener guard guest hunter judge mason merchant
    miller miner musician neighbor nurse painter pilot poet printer sailor shepherd smith student tailor teacher
    traveler visitor weaver writer
    """
)
_DEEDS = _words(
    """
    admired bought brought carried cleaned counted covered described drew examined fetched followed forgot found
    guarded kept left lifted lost measured mended moved noticed opened ordered painted passed praised preferred
    recognized remembered sold sought studied touched traded watched
    """
)
_TIMES = (
    "after the long winter",
    "at the end of the week",
    "before sunrise",
    "during the festival",
    "in the early evening",
    "in those years",
    "late in the summer",
    "on the second day",
    "shortly before noon",
    "when the rain had stopped",
    "while the others slept",
    "without saying a word",
)
_REMARKS = (
    "It is easy to forget how much depends on such things.",
    "Nobody in the village had expected that.",
    "Most people would have done the same.",
    "Whether this was wise is another question.",
    "There is a lesson in this, though a small one.",
    "That is how the custom began, or so they say.",
    "Such habits last longer than the reasons for them.",
    "The difference seemed small, and yet it mattered.",
    "What came next surprised everyone.",
    "A good beginning is worth a great deal.",
)


def essay(rng: random.Random) -> Iterator[str]:
    """Sentences of plain prose about nothing in particular, without end."""

    def thing() -> str:
        return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"

    def person() -> str:
        return f"the {rng.choice(ADJECTIVES)} {rng.choice(_PEOPLE)}"

    for _ in count():
        kind = rng.randrange(8)
        if kind == 0:
            text = f"{rng.choice(_TIMES)}, {person()} {rng.choice(_DEEDS)} a {thing()} near the {rng.choice(NOUNS)}."
        elif kind == 1:
            text = f"{person()} {rng.choice(_DEEDS)} the {rng.choice(NOUNS)}, and {person()} {rng.choice(_DEEDS)} it."
        elif kind == 2:
            text = f"a {rng.choice(NOUNS)} is worth more to {person()} than a {thing()} to {person()}."
        elif kind == 3:
            text = f"nothing about the {thing()} was {rng.choice(ADJECTIVES)}, but {person()} {rng.choice(_DEEDS)} it."
        elif kind == 4:
            text = f"{person()} asked whether the {thing()} had come from the {rng.choice(NOUNS)}."
        elif kind == 5:
            text = f"there was a {thing()} behind the {rng.choice(NOUNS)}, which {person()} {rng.choice(_DEEDS)}."
        elif kind == 6:
            text = f"{rng.choice(_TIMES)}, the {rng.choice(NOUNS)} looked {rng.choice(ADJECTIVES)} to {person()}."
        else:
            text = rng.choice(_REMARKS)
        yield text[0].upper() + text[1:]


def sentences(texts: Sequence[str]) -> list[str]:
    """The sentences of `texts`, each in one line and of at most 400 characters; a haystack is cut between them."""
    found = []
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
            while len(sentence) > 400:
                end = sentence.rfind(" ", 1, 400)
                end = end if end > 0 else 400
                found.append(sentence[:end])
                sentence = sentence[end:].lstrip()
            if sentence:
                found.append(sentence)
    return found
