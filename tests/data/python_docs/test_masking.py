import pytest

from fm_jax.data.python_docs import library, masking
from fm_jax.data.python_docs.masking import CLASSES, MASK

ONLY = ("email", "http", "queue", "textwrap", "wsgiref")


@pytest.fixture(scope="module")
def generated() -> list[tuple[str, str, str, int]]:
    return list(masking.generate(library.read(ONLY)))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("See asyncio.events.loop for HTTPServer and emails.", f"See {MASK} for {MASK}Server and {MASK}s."),
        ("The urllib.parse module, or XML.", f"The {MASK} module, or {MASK}."),
        ("Call events.get_loop() on the events.", f"Call {MASK}.get_loop() on the events."),
        ("Nothing of the kind.", "Nothing of the kind."),
    ],
)
def test_names_of_packages_and_qualifying_modules_are_masked(text: str, masked: str) -> None:
    assert masking.mask(text) == masked


def test_no_text_prints_a_label(generated: list[tuple[str, str, str, int]]) -> None:
    assert len(generated) > 200
    for _, module, text, label in generated:
        assert CLASSES[label] == module.partition(".")[0]
        assert not [name for name in CLASSES if name in text.lower()], text


def test_examples_stand_where_the_corpus_has_their_module_and_are_all_different(
    generated: list[tuple[str, str, str, int]],
) -> None:
    assert {split for split, *_ in generated} == set(library.SPLITS)
    assert all(split == library.split_of(module) for split, module, _, _ in generated)
    texts = [text for _, _, text, _ in generated]
    assert len(texts) == len(set(texts))


def test_a_docstring_that_fits_several_packages_is_left_out() -> None:
    def module(name: str, *blocks: library.Block) -> library.Module:
        return library.Module(name, library.split_of(name), blocks)

    def say(text: str, repeated: bool = False) -> library.Block:
        return library.Block("docstring", text, repeated)

    modules = [
        module(
            "email",
            say("Say what every module says of itself.", repeated=True),
            say("Parse an email into its parts now."),
        ),
        module("wsgiref", say("Parse an XML into its parts now."), say("Parse what only one package can parse.")),
    ]
    assert [text for _, _, text, _ in masking.generate(modules)] == ["Parse what only one package can parse."]


def test_a_docstring_that_pretraining_reads_is_no_test() -> None:
    def module(name: str, *texts: str) -> library.Module:
        blocks = tuple(library.Block("docstring", text) for text in texts)
        return library.Module(name, library.split_of(name), blocks)

    seen = "Return the first of all the headers."
    modules = [
        module("textwrap", f"At the start. {seen} At the end."),
        module("wsgiref.headers", seen, "Return the last of all the headers."),
    ]
    assert [text for _, _, text, _ in masking.generate(modules)] == ["Return the last of all the headers."]
