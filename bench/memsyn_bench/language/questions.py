"""Questions with short answers that SmolLM2-135M-Instruct mostly answers rightly: capitals, opposites,
plurals and chemical symbols.

Owns the lists and what counts as right. None of these questions is ever learned from or measured on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CAPITALS = """
France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Austria Vienna, Greece Athens, Poland Warsaw,
Hungary Budapest, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Ireland Dublin,
Belgium Brussels, Russia Moscow, Ukraine Kyiv, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Ethiopia Addis_Ababa,
Morocco Rabat, Ghana Accra, Nigeria Abuja, Senegal Dakar, Tunisia Tunis, Algeria Algiers, Japan Tokyo, China Beijing,
India Delhi, Thailand Bangkok, Vietnam Hanoi, Indonesia Jakarta, Malaysia Kuala_Lumpur, Nepal Kathmandu,
Pakistan Islamabad, Bangladesh Dhaka, Iran Tehran, Iraq Baghdad, Syria Damascus, Lebanon Beirut, Jordan Amman,
Saudi_Arabia Riyadh, Qatar Doha, Canada Ottawa, Mexico Mexico_City, Cuba Havana, Jamaica Kingston,
Brazil Brasilia|Brasília, Argentina Buenos_Aires, Chile Santiago, Peru Lima, Colombia Bogota|Bogotá,
Venezuela Caracas, Ecuador Quito, Uruguay Montevideo, Australia Canberra, New_Zealand Wellington, Czechia Prague,
Romania Bucharest, Bulgaria Sofia, Serbia Belgrade, Croatia Zagreb, Switzerland Bern, the_Netherlands Amsterdam
"""
OPPOSITES = """
hot cold, big small|little, up down, day night, happy sad|unhappy, fast slow, old young|new, rich poor, strong weak,
light dark|heavy, open close|closed|shut, early late, easy hard|difficult, full empty, long short, high low, wet dry,
clean dirty, left right, in out, good bad|evil, true false, war peace, love hate|hatred, north south, east west,
first last, hard soft|easy, loud quiet|silent|soft, wide narrow, thick thin, black white, win lose, buy sell,
push pull, begin end|finish, always never, before after, inside outside, brave cowardly|coward|timid|fearful,
success failure, laugh cry, near far, top bottom, alive dead, sweet sour|bitter
"""
PLURALS = """
cat cats, dog dogs, house houses, book books, car cars, tree trees, box boxes, bus buses, child children, man men,
woman women, foot feet, tooth teeth, mouse mice, goose geese, person people|persons, city cities, baby babies,
leaf leaves, knife knives, wolf wolves, church churches, dish dishes, party parties, story stories, country countries,
river rivers, apple apples, teacher teachers, student students, flower flowers, bird birds, key keys, toy toys,
watch watches, glass glasses, family families, lady ladies, friend friends, table tables
"""
SYMBOLS = """
gold Au, silver Ag, iron Fe, oxygen O, hydrogen H, carbon C, nitrogen N, sodium Na, potassium K, calcium Ca,
copper Cu, lead Pb, helium He, zinc Zn, tin Sn, neon Ne, magnesium Mg, aluminum Al, chlorine Cl, mercury Hg, sulfur S,
iodine I, lithium Li, uranium U, nickel Ni
"""


@dataclass(frozen=True)
class Question:
    """A question of one kind, and the words of which one makes an answer right."""

    kind: str
    text: str
    answers: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        """Whether the answer has one of the words, as a word of its own, in any case.

        Example:
            >>> Question("symbols", "What is the chemical symbol of gold?", ("Au",)).is_right("It is Au.")
            True
            >>> Question("symbols", "What is the chemical symbol of gold?", ("Au",)).is_right("Gold is auric.")
            False
        """
        return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in self.answers)


def _pairs(text: str) -> list[tuple[str, tuple[str, ...]]]:
    pairs = [pair.split() for pair in text.strip().split(",")]
    return [(one.replace("_", " "), tuple(other.replace("_", " ").split("|"))) for one, other in pairs]


def all_questions() -> list[Question]:
    """All questions, kind by kind."""
    return [
        *(Question("capitals", f"What is the capital of {name}?", answers) for name, answers in _pairs(CAPITALS)),
        *(Question("opposites", f'What is the opposite of "{word}"?', answers) for word, answers in _pairs(OPPOSITES)),
        *(Question("plurals", f'What is the plural of "{word}"?', answers) for word, answers in _pairs(PLURALS)),
        *(Question("symbols", f"What is the chemical symbol of {name}?", answers) for name, answers in _pairs(SYMBOLS)),
    ]
