"""A run's tokenizer for Hugging Face's library, and the template of a conversation."""

import copy

from data.chat import END, START

from .weights import write_json

PADDING = "<|pad|>"
# ChatML, as data/chat.py renders it. What the assistant says, and that it ends there, is marked for
# those who train on it
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- set said = namespace(text=(message['content'] or '') | trim) -%}
        {%- for call in message['tool_calls'] or [] -%}
            {%- set f = call['function'] or call -%}
            {%- set arguments = f['arguments'] -%}
            {%- if arguments is not string -%}
                {%- set arguments = arguments | tojson -%}
            {%- endif -%}
            {%- set json = '{"name": ' + (f['name'] | tojson) + ', "arguments": ' + arguments -%}
            {%- set before = said.text + '\\n' if said.text else '' -%}
            {%- set said.text = before + '<tool_call>\\n' + json + '}\\n</tool_call>' -%}
        {%- endfor -%}
        {%- generation -%}{{- said.text + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] | trim + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def special_tokens(tokenizer_json):
    """{text: id} of the tokens that are no text, of a parsed tokenizer.json."""
    return {token["content"]: token["id"] for token in tokenizer_json["added_tokens"]}


def can_chat(tokenizer_json):
    """Whether it has the tokens that ChatML is written with."""
    return {START, END} <= special_tokens(tokenizer_json).keys()


def save_tokenizer(tokenizer, said, max_len, folder):
    """Write what Hugging Face's library reads: the file itself, and how it is used.

    said: the run's tokenizer.json, parsed; max_len: tokens in the model's context.
    """
    said = copy.deepcopy(said)
    # Every document begins with end-of-text, here as in training
    special = special_tokens(said)
    end_of_text = next(text for text, i in special.items() if i == tokenizer.eot)
    bos = dict(SpecialToken=dict(id=end_of_text, type_id=0))
    first = dict(Sequence=dict(id="A", type_id=0))
    second = dict(Sequence=dict(id="B", type_id=1))
    said["post_processor"] = dict(
        type="TemplateProcessing",
        single=[bos, first],
        pair=[bos, first, second],
        special_tokens={
            end_of_text: dict(id=end_of_text, ids=[tokenizer.eot], tokens=[end_of_text]),
        },
    )
    write_json(folder / "tokenizer.json", said)

    about = dict(
        # The only name that versions 4 and 5 of transformers both take as "what the file says"
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=end_of_text,
        eos_token=end_of_text,
        pad_token=PADDING if PADDING in special else end_of_text,
        add_bos_token=True,
        clean_up_tokenization_spaces=False,
        model_max_length=max_len,
        model_input_names=["input_ids", "attention_mask"],
    )
    if can_chat(said):
        about["additional_special_tokens"] = [START, END]
        about["chat_template"] = CHAT_TEMPLATE
    write_json(folder / "tokenizer_config.json", about)
