"""Chat templates in transformers' own sandbox and in ours: the same texts, and the same token ids."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import transformers

from experiments.language import generate
from fm_jax.data.text import tokenizer
from fm_jax.hub import families, pretrained
from fm_jax.hub.generation import Generation
from fm_jax.models.language import decoder
from fm_jax.tasks.init import Init
from tests.data.text.test_chat import CHATML, INJECTED, save

# Templates of our own in the shapes of published ones.
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last < 0 %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or not message.tool_calls %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') | trim + '<|im_end|>' + '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role }}
        {%- for call in message.tool_calls %}
            {{- '\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{{- ns.last }}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system<|im_end|>\\n\\n" }}
{{- "Today: " + date_string + "\\n" }}
{{- system_message }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|im_start|>' + message['role'] + '<|im_end|>\\n\\n'+ message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "smollm": SMOLLM, "qwen": QWEN, "llama3": LLAMA3, "mistral": MISTRAL}
TALK = [
    {"role": "user", "content": " the cat sat\n"},
    {"role": "assistant", "content": "on the mat, naïve 漢字 <b>", "name": None},
    {"role": "user", "content": "and you?"},
]
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"of": ["<ü>", 1, None]}}}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "find", "arguments": {"of": "the 'cat'"}}}]}


@pytest.fixture(params=TEMPLATES)
def both(request, tmp_path):
    save(tmp_path, TEMPLATES[request.param], bos_token="<|im_start|>")
    return tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("prompt", [False, True])
def test_the_same_conversation_gives_the_same_text_and_ids(both, prompt):
    ours, theirs = both
    talks = [(TALK, {}), (TALK[:1], {}), (TALK, {"enable_thinking": False, "date_string": "1 May"})]
    if "tool_calls" in ours.chat_templates["default"]:
        talks.append(([*TALK[:1], CALL, *TALK[2:]], {"tools": [TOOL]}))
    if "alternate" not in ours.chat_templates["default"]:
        talks.append(([{"role": "system", "content": "Be brief."}, *TALK], {}))
    for talk, options in talks:
        options = options | {"add_generation_prompt": prompt}
        text = theirs.apply_chat_template(talk, tokenize=False, **options)
        assert ours.chat(talk, **options) == text and "cat" in text
        ids = theirs.apply_chat_template(talk, tokenize=True, return_dict=False, **options)
        assert ours.encode_chat(talk, **options).tolist() == ids == ours.encode(text, special=True).tolist()


def test_a_spelt_out_control_token_is_read_alike_either_way(both):
    ours, theirs = both
    talk = [{"role": "user", "content": INJECTED}]
    for trusted in (True, False):
        ids = theirs.apply_chat_template(talk, tokenize=True, return_dict=False, sanitize_control_tokens=not trusted)
        assert ours.encode_chat(talk, trusted=trusted).tolist() == ids
    assert ours.encode(INJECTED).tolist() == theirs.encode(INJECTED, split_special_tokens=True)


def test_ids_beyond_the_vocabulary_are_left_out_alike(both):
    ours, theirs = both
    ids = [*theirs.encode("the cat", add_special_tokens=False), 301, 302, 5000]
    with pytest.warns(UserWarning, match="beyond"):
        for keep in (False, True):
            assert ours.decode(ids, keep_special=keep) == theirs.decode(ids, skip_special_tokens=not keep)


@pytest.mark.parametrize("chat", [True, False])
def test_the_command_answers_as_transformers_does(chat, tmp_path):
    words = tokenizer.load(save(tmp_path / "words"))
    shape = replace(decoder.llama(2, 32, 4, 2, 48, vocab_size=320), max_length=128)  # more rows than tokens
    model, rng = decoder.Decoder(shape), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), families.abstract(model))
    pretrained.save(tmp_path / "model", model, params, words, generation=Generation({"eos_token_id": None}, {}))
    cfg = generate.Config(Init(tmp_path / "model"), "the cat sat on the mat", chat=chat, max_new_tokens=24)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    talk = [{"role": "user", "content": cfg.prompt}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    asked = tokens.apply_chat_template(talk, **options) if chat else tokens(cfg.prompt, return_tensors="pt")
    start = asked["input_ids"].shape[1]
    new = theirs.generate(**asked, max_new_tokens=24, do_sample=False)[0, start:].tolist()
    assert len(new) == 24  # nothing ends it
    last = max(set(new), key=new.index)  # the token that comes up latest: one of two ends, neither the tokenizer's
    other = min(set(range(300)) - set(new))
    for ends, text in ((None, new), ([other, last], new[: new.index(last)])):
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        measured = generate.run(cfg, tmp_path / "run")
        assert measured["text"] == tokens.decode(text, skip_special_tokens=True)
        assert measured["tokens"] == start
