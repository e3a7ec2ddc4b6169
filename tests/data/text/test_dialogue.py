import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.text import dialogue


def test_messages_become_one_document() -> None:
    messages = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": "Hi!"},
    ]
    assert dialogue.text(messages, "messages", "x") == "system: Be brief.\n\nuser: Say hi.\n\nassistant: Hi!"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (["hi"], r"x: messages\[0\] is no message; one is"),
        ([{"content": "hi"}], r"x: messages\[0\] is no message"),
        ([{"role": "user", "content": 3}], r"x: messages\[0\]: field 'content' is int, not text"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"x: messages\[0\]: a part of its content is 'image'"),
        ([], r"x: field 'messages' has no message with text"),
        ([{"role": "user", "content": " "}], r"x: field 'messages' has no message with text"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: list[object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        dialogue.text(messages, "messages", "x")
