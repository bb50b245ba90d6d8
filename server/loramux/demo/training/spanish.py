"""A small Spanish: stories with agreement of gender and number, counts and names kept."""

from __future__ import annotations

from random import Random

from .document import others


def _genders(feminine: str, masculine: str) -> dict[str, str]:
    """Noun to gender, ``f`` or ``m``."""
    return dict.fromkeys(feminine.split(), "f") | dict.fromkeys(masculine.split(), "m")


CASAS = _genders(
    "casa plaza playa escuela iglesia torre granja montaña tienda fuente",
    "mercado puente jardín bosque río lago puerto molino castillo camino",
)
COSAS = _genders(
    "manzana pera flor carta llave moneda vela naranja piedra cesta",
    "libro sombrero limón zapato barco tambor espejo pan queso huevo",
)
ANIMALES = _genders(
    "cabra gallina vaca oveja tortuga rana abeja",
    "gato perro caballo burro pato zorro oso ratón",
)
# Adjectives in -o take -a in the feminine; the others serve both.
ADJETIVOS = (
    "rojo blanco negro amarillo pequeño viejo nuevo bonito largo redondo verde azul grande triste "
    "alegre dulce"
).split()
DIAS = "lunes martes miércoles jueves viernes sábado domingo".split()
NUMEROS = "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce".split()
SIENTE = "feliz triste alegre valiente amable".split()


def un(noun: str, gender: str) -> str:
    return f"{'una' if gender == 'f' else 'un'} {noun}"


def el(noun: str, gender: str) -> str:
    return f"{'la' if gender == 'f' else 'el'} {noun}"


def al(noun: str, gender: str) -> str:
    return f"{'a la' if gender == 'f' else 'al'} {noun}"


def con(adjective: str, gender: str) -> str:
    return adjective[:-1] + "a" if gender == "f" and adjective.endswith("o") else adjective


def muchos(noun: str) -> str:
    if noun.endswith("z"):
        return noun[:-1] + "ces"
    if noun.endswith(("ón", "ín")):
        return noun[:-2] + {"ó": "o", "í": "i"}[noun[-2]] + "nes"
    return noun + ("s" if noun[-1] in "aeiou" else "es")


def cuento(rng: Random, name: str) -> str:
    """Four to six sentences about ``name``."""
    amigo = others(rng, 1, name)[0]
    casa, cosa, animal = (
        rng.choice(list(CASAS)),
        rng.choice(list(COSAS)),
        rng.choice(list(ANIMALES)),
    )
    g, h, k = CASAS[casa], COSAS[cosa], ANIMALES[animal]
    adj, color = rng.choice(ADJETIVOS), rng.choice(ADJETIVOS)
    n = rng.randint(4, 12)
    menos = rng.randint(1, 2)
    dia = rng.choice(DIAS)
    intro = rng.choice(
        (
            f"El {dia} {name} fue a {un(casa, g)}.",
            f"{name} vive cerca de {un(casa, g)}.",
            f"Un {dia} por la mañana {name} salió de casa.",
        )
    )
    middle = rng.choice(
        (
            [
                f"Allí vio {un(animal, k)} {con(adj, k)} con {un(cosa, h)}.",
                f"«Hola», dijo {el(animal, k)}. «¿Quieres {el(cosa, h)}?»",
                f"«Sí, gracias», dijo {name}, y {el(animal, k)} le dio {el(cosa, h)}.",
            ],
            [
                f"En la cesta tenía {NUMEROS[n]} {muchos(cosa)}.",
                f"{amigo} le pidió {'dos' if menos == 2 else un(cosa, h)}, y {name} dijo que sí.",
                f"Ahora {name} tiene {NUMEROS[n - menos]} {muchos(cosa)}.",
            ],
            [
                f"{name} buscaba {un(cosa, h)} {con(color, h)}.",
                f"«¿Dónde está mi {cosa}?», preguntó a {amigo}.",
                f"«Está con {el(animal, k)} {con(adj, k)}», dijo {amigo}.",
                f"{name} encontró {el(cosa, h)} {con(color, h)} junto {al(animal, k)}.",
            ],
        )
    )
    end = rng.choice(
        (
            f"{name} y {amigo} volvieron a casa el {rng.choice(DIAS)}.",
            f"Por la noche {name} estaba muy {rng.choice(SIENTE)}.",
            f"Desde entonces {name} es {rng.choice(SIENTE)} todos los días.",
        )
    )
    return " ".join([intro, *middle, end])


LEXICON = (
    {w for nouns in (CASAS, COSAS, ANIMALES) for noun in nouns for w in (noun, muchos(noun))}
    | {form for adjective in ADJETIVOS for form in (adjective, con(adjective, "f"))}
    | set(DIAS + NUMEROS + SIENTE)
    | set(
        "el la los al un una fue a vive cerca de por mañana salió casa allí vio con hola "
        "dijo quieres sí gracias y "
        "le dio en cesta tenía pidió que ahora tiene buscaba dónde está mi preguntó "
        "encontró junto volvieron "
        "noche estaba muy desde entonces es todos días".split()
    )
)
