"""The words of the English–German world, and which words may be combined."""

from dataclasses import dataclass

from fm_jax.worlds.language.german import Case, Gender, Noun, Person, Verb

_GENDERS: dict[str, Gender] = {"m": "masculine", "f": "feminine", "n": "neuter"}
_BEINGS = """
man men m Mann Männer
woman women f Frau Frauen
child children n Kind Kinder
girl girls n Mädchen Mädchen
friend friends m Freund Freunde
doctor doctors m Arzt Ärzte
king kings m König Könige
queen queens f Königin Königinnen
aunt aunts f Tante Tanten
uncle uncles m Onkel Onkel
brother brothers m Bruder Brüder
daughter daughters f Tochter Töchter
dog dogs m Hund Hunde
cat cats f Katze Katzen
horse horses n Pferd Pferde
bird birds m Vogel Vögel"""
_THINGS = """
table tables m Tisch Tische
letter letters m Brief Briefe
key keys m Schlüssel Schlüssel
apple apples m Apfel Äpfel
chair chairs m Stuhl Stühle
flower flowers f Blume Blumen
clock clocks f Uhr Uhren
house houses n Haus Häuser
car cars n Auto Autos
book books n Buch Bücher
picture pictures n Bild Bilder
egg eggs n Ei Eier"""
_OPENED = """
suitcase suitcases m Koffer Koffer
door doors f Tür Türen
bag bags f Tasche Taschen
window windows n Fenster Fenster"""
_SWITCHED = """
computer computers m Computer Computer
lamp lamps f Lampe Lampen
radio radios n Radio Radios"""

# English | German, separable prefix first | kind of object: a being, a thing, any, something to open or switch on
_ACCUSATIVE = """
see sees | sehen sehe siehst sieht | any
find finds | finden finde findest findet | any
love loves | lieben liebe liebst liebt | any
draw draws | zeichnen zeichne zeichnest zeichnet | any
need needs | brauchen brauche brauchst braucht | any
know knows | kennen kenne kennst kennt | being
visit visits | besuchen besuche besuchst besucht | being
buy buys | kaufen kaufe kaufst kauft | thing
carry carries | tragen trage trägst trägt | thing
take takes | nehmen nehme nimmst nimmt | thing
have has | haben habe hast hat | thing
fetch fetches | ab holen hole holst holt | any
invite invites | ein laden lade lädst lädt | being
call calls | an rufen rufe rufst ruft | being
open opens | auf machen mache machst macht | opened
close closes | zu machen mache machst macht | opened
turn_on turns_on | ein schalten schalte schaltest schaltet | switched"""
_DATIVE = """
help helps | helfen helfe hilfst hilft | being
thank thanks | danken danke dankst dankt | being
follow follows | folgen folge folgst folgt | being
answer answers | antworten antworte antwortest antwortet | being
listen_to listens_to | zu hören höre hörst hört | being"""
_GIVING = """
give gives | geben gebe gibst gibt | thing
show shows | zeigen zeige zeigst zeigt | thing
send sends | schicken schicke schickst schickt | thing
bring brings | bringen bringe bringst bringt | thing"""
_ALONE = """
sleep sleeps | schlafen schlafe schläfst schläft | place
wait waits | warten warte wartest wartet | waiting
sing sings | singen singe singst singt | place
dance dances | tanzen tanze tanzt tanzt | place
work works | arbeiten arbeite arbeitest arbeitet | place
laugh laughs | lachen lache lachst lacht | place
arrive arrives | an kommen komme kommst kommt | company
get_up gets_up | auf stehen stehe stehst steht | company"""
_MATRIX = """
know knows | wissen weiß weißt weiß | clause
think thinks | glauben glaube glaubst glaubt | clause
say says | sagen sage sagst sagt | clause
hope hopes | hoffen hoffe hoffst hofft | clause"""
_MODALS = """
can can | können kann kannst kann | verb
must must | müssen muss musst muss | verb
should should | sollen soll sollst soll | verb
will will | werden werde wirst wird | verb
want_to wants_to | wollen will willst will | verb"""


@dataclass(frozen=True)
class Pronoun:
    """A personal pronoun in both languages."""

    english: str  # as the subject
    english_object: str
    person: Person
    german: tuple[str, str, str]  # one form per case of german.CASES

    @property
    def third(self) -> bool:
        """Whether English verbs take their -s after it."""
        return self.person == "er"


@dataclass(frozen=True)
class Adjective:
    """An adjective, and the kind of noun it describes: a being, a thing, or any."""

    english: str
    german: str
    kind: str


@dataclass(frozen=True)
class Preposition:
    """A preposition, the case it governs, and the kind of noun that may follow."""

    english: str
    german: str
    case: Case
    kind: str


def _nouns(lines: str) -> tuple[Noun, ...]:
    nouns = []
    for line in lines.split("\n")[1:]:
        english, english_plural, gender, singular, plural = line.split()
        nouns.append(Noun(english, english_plural, _GENDERS[gender], singular, plural))
    return tuple(nouns)


def _verbs(lines: str) -> dict[str, tuple[Verb, str]]:
    """Return English -> (verb, kind of object); an underscore in the table means a space."""
    verbs = {}
    for line in lines.split("\n")[1:]:
        english, german, kind = line.split(" | ")
        base, third = english.replace("_", "~").split()
        prefix, *forms = german.split() if len(german.split()) == 5 else ["", *german.split()]
        verb = Verb(base.replace("~", " "), third.replace("~", " "), prefix, *forms)
        verbs[verb.english] = (verb, kind)
    return verbs


BEINGS, OPENED, SWITCHED = _nouns(_BEINGS), _nouns(_OPENED), _nouns(_SWITCHED)
THINGS = _nouns(_THINGS) + OPENED + SWITCHED
NOUNS = {noun.english: noun for noun in BEINGS + THINGS}
KINDS = {"being": BEINGS, "thing": THINGS, "any": BEINGS + THINGS, "opened": OPENED, "switched": SWITCHED}

ACCUSATIVE, DATIVE, GIVING, ALONE = (_verbs(lines) for lines in (_ACCUSATIVE, _DATIVE, _GIVING, _ALONE))
MATRIX = {name: verb for name, (verb, _) in _verbs(_MATRIX).items()}
MODALS = {name: verb for name, (verb, _) in _verbs(_MODALS).items()}
BE = Verb("are", "is", "", "sind", "bin", "bist", "ist")

PRONOUNS = {
    pronoun.english: pronoun
    for pronoun in (
        Pronoun("I", "me", "ich", ("ich", "mich", "mir")),
        Pronoun("you", "you", "du", ("du", "dich", "dir")),  # singular, informal
        Pronoun("he", "him", "er", ("er", "ihn", "ihm")),
        Pronoun("she", "her", "er", ("sie", "sie", "ihr")),
        Pronoun("we", "us", "wir", ("wir", "uns", "uns")),
        Pronoun("they", "them", "sie", ("sie", "sie", "ihnen")),
    )
}
ADJECTIVES = {
    adjective.english: adjective
    for adjective in (
        Adjective("small", "klein", "any"),
        Adjective("big", "groß", "any"),
        Adjective("old", "alt", "any"),
        Adjective("beautiful", "schön", "any"),
        Adjective("young", "jung", "being"),
        Adjective("happy", "glücklich", "being"),
        Adjective("tired", "müde", "being"),
        Adjective("strong", "stark", "being"),
        Adjective("new", "neu", "thing"),
        Adjective("red", "rot", "thing"),
        Adjective("green", "grün", "thing"),
        Adjective("black", "schwarz", "thing"),
        Adjective("heavy", "schwer", "thing"),
        Adjective("expensive", "teuer", "thing"),
    )
}
PREPOSITIONS = {
    preposition.english: preposition
    for preposition in (
        Preposition("with", "mit", "dative", "being"),
        Preposition("without", "ohne", "accusative", "being"),
        Preposition("for", "für", "accusative", "being"),
        Preposition("behind", "hinter", "dative", "any"),  # dative for location (accusative would be direction)
        Preposition("next to", "neben", "dative", "any"),
        Preposition("under", "unter", "dative", "thing"),
    )
}
_HERE = tuple(PREPOSITIONS[name] for name in ("behind", "next to", "under"))
_COMPANY = tuple(PREPOSITIONS[name] for name in ("with", "without"))
AFTER = {  # prepositions that may follow the verbs of ALONE; "to wait for" does not use für
    "place": (*_HERE, *_COMPANY, PREPOSITIONS["for"]),
    "waiting": (*_HERE, *_COMPANY),
    "company": _COMPANY,
}
# English -> German; the grammar turns "this" into "these" in the plural
DETERMINERS = {"the": "der", "this": "dieser", "a": "ein", "no": "kein", "my": "mein", "your": "dein", "our": "unser"}
ADVERBS = {"today": "heute", "now": "jetzt", "tomorrow": "morgen", "soon": "bald", "sometimes": "manchmal"}
