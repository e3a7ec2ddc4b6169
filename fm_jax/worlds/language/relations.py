"""Six relations of people (language/people.py), with the sentences that state each and the questions about it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A relation between a person {n} and an answer {x}, with its sentences and questions."""

    type: str  # type of the answer
    verbs: tuple[str, ...]  # predicates, which can be joined by "and"
    whole: tuple[str, ...]  # whole sentences with another word order
    asked: tuple[str, ...]  # questions


RELATIONS = {
    "home": Relation(
        "city",
        ("lives in {x}", "has a flat in {x}", "resides in {x}", "is at home in {x}"),
        ("In {x} lives {n}.", "The home of {n} is in {x}.", "It is in {x} that {n} lives."),
        ("Where does {n} live?", "In which city does {n} live?", "What is the home town of {n}?"),
    ),
    "birthplace": Relation(
        "city",
        ("was born in {x}", "is a native of {x}", "came into the world in {x}"),
        ("{x} is where {n} was born.", "The birthplace of {n} is {x}.", "It was in {x} that {n} was born."),
        ("Where was {n} born?", "In which city was {n} born?", "What is the birthplace of {n}?"),
    ),
    "job": Relation(
        "job",
        ("works as a {x}", "earns a living as a {x}", "is a {x} by trade"),
        ("As for work, {n} is a {x}.", "The job of {n} is that of a {x}."),
        ("What does {n} work as?", "What is the job of {n}?", "Which occupation does {n} have?"),
    ),
    "pets": Relation(
        "pets",
        ("keeps {x}", "looks after {x}", "owns {x}", "has {x} in the garden"),
        ("There are {x} at the house of {n}.", "With {n} there are always {x}."),
        ("Which animals does {n} keep?", "What pets does {n} have?", "What animals belong to {n}?"),
    ),
    "music": Relation(
        "instrument",
        ("plays the {x}", "practises the {x} every day", "is learning the {x}"),
        ("The {x} is what {n} plays.", "On the {x}, {n} is hard to beat."),
        ("Which instrument does {n} play?", "What does {n} play?", "What does {n} practise?"),
    ),
    "club": Relation(
        "year",
        ("joined the club in {x}", "has been a member since {x}", "became a member in {x}"),
        ("It was in {x} that {n} joined the club.", "Since {x} the club has counted {n} among its members."),
        ("When did {n} join the club?", "In which year did {n} become a member?", "Since when is {n} a member?"),
    ),
}
